"""The methods of PEFT that are read through PEFT itself: what it merges into a weight is what is analysed.

One module at a time: a layer of the base weight's shape is wrapped by PEFT from the adapter's config, the module's
tensors are loaded, and PEFT merges them.  What a method draws or sizes over *all* modules would come out as something
else than in the whole model; the methods here have nothing of the kind, which the tests hold to merges of whole models
with modules of unequal shapes.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.adapters.peft.fields import COMMON_FIELDS, INERT, ConfigFields
from spectra.adapters.peft.keys import StoredKeys, unwrapped
from spectra.adapters.peft.lora import NEUTRAL_INIT
from spectra.adapters.peft.method import MethodUpdate
from spectra.adapters.peft.refused import how_to_ignore
from spectra.adapters.peft.unknown import plan_of
from spectra.adapters.plan import Plan, UpdateKind
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.derived import Weight
from spectra.files.orientation import Layout
from spectra.files.values import half_precision

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Update

SPREAD = "spreads the update over all modules at once, so that none can be read by itself"


@dataclass(frozen=True)
class _Method:
    """``label`` : what people call it; ``refused`` : options, if they are set, and why each cannot be read."""

    label: str
    refused: Mapping[str, str] = field(default_factory=dict)
    changes_bias: bool = False
    notes: tuple[str, ...] = ()


METHODS: dict[str, _Method] = {
    "MISS": _Method("MiSS"),
    "SHIRA": _Method("SHiRA"),
    "HIRA": _Method("HiRA"),
    "C3A": _Method("C3A"),
    "FOURIERFT": _Method("FourierFT"),
    "HRA": _Method("HRA"),
    "ROAD": _Method("RoAd", changes_bias=True),
    "GRALORA": _Method("GraLoRA"),
    "DELORA": _Method("DeLoRA"),
    "WAVEFT": _Method("WaveFT", {"proportional_parameters": SPREAD}),
    "OSF": _Method("OSF"),
    "GLORA": _Method("GLoRA", changes_bias=True),
    "PEANUT": _Method("PEANuT"),
    "SUPERTUNING": _Method("SuperTuning"),
    "DEFT": _Method("DEFT"),
    "PSOFT": _Method(
        "PSOFT",
        notes=(
            "PSOFT turns the base weight's leading singular vectors, which peft computes anew whenever it loads the "
            "adapter; where another machine gives them other signs, peft merges something else there",
        ),
    ),
}

# Options of LoRA that change what the stored factors mean, and what does not go with them here.
ALONE = "is not read together with this variant of LoRA"
_WITH_LORA = dict.fromkeys(
    (
        "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
        "monteclora_config", "megatron_config", "use_qalora", "velora_config", "loftq_config",
    ),
    ALONE,
)  # fmt: skip
VARIANTS: dict[str, _Method] = {
    "use_bdlora": _Method("BD-LoRA", _WITH_LORA),
    "kasa_config": _Method("KaSA", _WITH_LORA),
}


@dataclass(frozen=True)
class ThroughPeft(MethodUpdate):
    """The stored tensors of one module, by their names within it, and the config that peft wraps the module by."""

    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    label: str = ""
    changes_bias: bool = False
    stored: str = "F32"  # the base weight's dtype, once it is known
    factor: float = 1.0  # beyond the scaling that peft gives it

    @property
    def kind(self) -> UpdateKind:
        return "by_peft"

    @property
    def formula(self) -> str:
        return f"W1 as peft merges {self.label} into W0"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        if any("_embedding_" in name for name, _ in self.factors):
            return ("embedding",)
        return "linear", "conv1d", "conv"

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        return True  # peft says so when it loads the tensors

    def why_not_merged(self, stored: tuple[int, ...]) -> str | None:
        return f"{self.label} changes biases as well, which only peft computes" if self.changes_bias else None

    def rescaled(self, factor: float, note: str) -> ThroughPeft:
        return replace(self, factor=factor, notes=(*self.notes, note))

    def on(self, base: Weight) -> ThroughPeft:
        """The update for a base weight, of which peft's layer must have the kernel."""
        return replace(self, kernel=tuple(base.shape[2:]), stored=base.dtype)

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Update:
        from spectra.updates.merging import Merging

        values = {name: checkpoint.read(info.name, digest=True) for name, info in self.factors}
        return Merging(partial(self._merge, values, layout))

    def _merge(self, values: dict[str, torch.Tensor], layout: Layout, W0: torch.Tensor) -> torch.Tensor:
        import torch

        from spectra.adapters.peft.one_module import Module, NotLoadedError

        try:
            # As the model has it, since what methods take out of W0 or decompose is rounded so; merged in float64.
            stored = W0.to(half_precision(self.stored) or (torch.float64 if self.stored == "F64" else torch.float32))
            return Module(self.config, self.module, values, layout, self.kernel).merged(stored, self.factor)
        except NotLoadedError as error:
            first = self.factors[0][1]
            raise AdapterError(
                first.file,
                f"peft cannot load the {self.label} of {self.module} into its base weight: {error}",
                first.name,
            ) from None


class PeftItself:
    """Adapters of a method in ``METHODS``, or of LoRA with one of ``VARIANTS``."""

    name = "peft-itself"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        labels = ", ".join(method.label for method in (*METHODS.values(), *VARIANTS.values()))
        return ((f"PEFT: {labels} (`pip install '.[peft]'`)", "what PEFT itself merges, a module at a time"),)

    def recognises(self, tuned: Checkpoint) -> bool:
        return _method_of(tuned) is not None

    def plan(self, tuned: Checkpoint) -> Plan:
        fields = ConfigFields(tuned)
        name, method = fields.values["peft_type"], _method_of(tuned)
        assert method is not None
        config = _checked(fields, name, method)

        from spectra.adapters.peft.one_module import prefix_of

        stored = StoredKeys(tuned, ())
        slots = _by_module(stored, prefix_of(name))
        rank = fields.whole("r", 0) or None if fields.values.get("r") is not None else None
        own = [
            ThroughPeft(
                unwrapped(module), tuple(slot.items()), rank, notes=method.notes, config=config, label=method.label,
                changes_bias=method.changes_bias,
            )
            for module, slot in slots.items()
        ]  # fmt: skip
        return plan_of(stored, method.label, own, fields.values.get("base_model_name_or_path"))


def _method_of(tuned: Checkpoint) -> _Method | None:
    config = tuned.adapter_config or {}
    name = config.get("peft_type")
    if name == "LORA":
        return next((method for option, method in VARIANTS.items() if config.get(option)), None)
    return METHODS.get(name) if isinstance(name, str) else None


def _checked(fields: ConfigFields, name: str, method: _Method) -> dict[str, Any]:
    """The config's values that peft is given.

    Raises
    ------
    UnsupportedMethodError : peft is not installed or does not know them, or an option cannot be read.
    AdapterError : peft does not take the config.
    """
    known = _known_fields(fields.file, name, method.label)
    config = {}
    for key, value in fields.values.items():
        if key in known:
            config[key] = value
        elif key not in COMMON_FIELDS | INERT.keys() and value:
            raise UnsupportedMethodError(
                fields.file,
                f"the installed peft does not know the option {key[:80]} = {str(value)[:80]!r} of {method.label}; "
                f"{how_to_ignore(key)}",
            )
    for key, why in method.refused.items():
        if config.get(key):
            raise UnsupportedMethodError(fields.file, f"{method.label}: {key} = {str(config[key])[:80]!r} {why}")
    if name == "LORA" and config.get("init_lora_weights", True) not in NEUTRAL_INIT:
        raise UnsupportedMethodError(
            fields.file, f"{method.label}: init_lora_weights = {str(config['init_lora_weights'])[:80]!r} {ALONE}"
        )
    from spectra.adapters.peft.one_module import NotLoadedError, config_of

    try:
        config_of(config, "module")
    except NotLoadedError as error:
        raise AdapterError(fields.file, f"peft does not take this config of {method.label}: {error}") from None
    return config


def _known_fields(file: Path, name: str, label: str) -> frozenset[str]:
    if importlib.util.find_spec("peft") is None:
        raise UnsupportedMethodError(
            file,
            f"{label} is read through peft, which is not installed: in the folder of Spectra, pip install '.[peft]'",
        )
    from dataclasses import fields

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if name not in PeftType.__members__:
        raise UnsupportedMethodError(file, f"{label} is read through peft, and the installed one does not have it")
    return frozenset(item.name for item in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]))


def _by_module(stored: StoredKeys, prefix: str) -> dict[str, dict[str, TensorInfo]]:
    """Module, wrappers included → name within it → tensor; taken out of what is stored whole."""
    factor = re.compile(rf"(.+?)\.({re.escape(prefix)}.+)", re.DOTALL)
    slots: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name in list(stored.plain):
        match = factor.fullmatch(name)
        if match is not None:
            slots[match[1]][match[2]] = stored.plain.pop(name)
    stored.modules.update(slots)
    stored.has_factors = bool(slots)
    return slots
