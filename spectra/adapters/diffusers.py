"""LoRAs of diffusers: ``transformer.<module>.lora_A.weight`` and so on in one file, no config.

The config of each component lies in the header under ``lora_adapter_metadata`` in files of later versions; else alphas
may be stored beside the factors; else the scaling is 1.  Before PEFT the factors were ``lora.down`` and ``lora.up``, in
text encoders ``lora_linear_layer.down`` and ``.up``.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectra.adapters.factors import StoredFactors, check_factors, common_facts, scalar
from spectra.adapters.pattern import Pattern
from spectra.adapters.peft import KNOWN_FIELDS, NEUTRAL_INIT
from spectra.adapters.plan import Plan, Skipped
from spectra.adapters.unsupported import foreign_method
from spectra.checkpoint import Checkpoint, TensorInfo
from spectra.errors import AdapterError, CorruptFileError, UnsupportedMethodError

METADATA = "lora_adapter_metadata"

_MODULE = r"(?P<component>unet|transformer(?:_[0-9])?|text_encoder(?:_[0-9])?|diffusion_model)\.(?P<name>.+)"
_KEY = re.compile(
    _MODULE + r"\.(?P<tail>lora_[AB]\.weight|lora_B\.bias|lora\.(?:down|up)\.weight"
    r"|lora_linear_layer\.(?:down|up)\.weight|alpha)"
)
_DOWN = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
_UP = ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight")
_GPT = re.compile(r"transformer\.h\.[0-9]+\..*")  # a language model's own name, by PEFT without its config

NO_ALPHA = "no alpha is stored: the scaling is 1, as diffusers has it"
ZERO_ALPHA = "the stored alpha is 0, so the scaling is 0"


class DiffusersLora:
    """What ``save_lora_weights`` of diffusers' pipelines writes."""

    name = "diffusers"

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None and any(
            (match := _KEY.fullmatch(name)) is not None and match["tail"] != "alpha" and not _GPT.fullmatch(name)
            for name in tuned.tensors
        )

    def plan(self, tuned: Checkpoint) -> Plan:
        components: dict[str, dict[str, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
        skipped: list[Skipped] = []
        rest: dict[str, TensorInfo] = {}
        for key, info in tuned.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None or _GPT.fullmatch(key):
                rest[key] = info
            elif match["tail"] == "lora_B.bias":
                skipped.append(Skipped(key, "the bias of lora_B: a vector has no spectrum"))
            else:
                components[match["component"]][match["name"]][match["tail"]] = info
        if rest:
            name, method = foreign_method(rest) or (next(iter(rest)), "another method")
            raise UnsupportedMethodError(
                rest[name].file,
                f"beside a LoRA of diffusers, this belongs to {method}, which this version cannot read",
                name,
            )
        configs = _configs(tuned, components)
        updates = [
            update
            for component, modules in components.items()
            for update in _updates(component, modules, configs.get(component))
        ]
        return Plan("diffusers-lora", tuple(updates), tuple(skipped), common_facts(updates))


@dataclass(frozen=True)
class _Factors:
    """The factors of one module as found, before it is known how they are scaled."""

    name: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    alpha: TensorInfo | None


def _updates(
    component: str, modules: Mapping[str, Mapping[str, TensorInfo]], config: _Config | None
) -> list[StoredFactors]:
    found = [_factors(f"{component}.{name}", name, slot) for name, slot in modules.items()]
    if config is None:
        _check_alphas(component, found)
    updates = []
    for item in found:
        notes: tuple[str, ...] = ()
        if item.alpha is not None:
            alpha: float | None = scalar(item.alpha)
            assert alpha is not None
            scaling = alpha / item.rank
            notes = () if alpha else (ZERO_ALPHA,)
            if config is not None and not math.isclose(scaling, config.scaling_of(item)[1], rel_tol=1e-2):
                raise AdapterError(
                    item.alpha.file,
                    f"it gives a scaling of {scaling:g}, but {METADATA} in the header one of "
                    f"{config.scaling_of(item)[1]:g}",
                    item.alpha.name,
                )
        elif config is not None:
            alpha, scaling = config.scaling_of(item)
        else:
            alpha, scaling, notes = None, 1.0, (NO_ALPHA,)
        updates.append(StoredFactors(
            module=f"{component}.{item.name}",
            targets=(f"{item.name}.weight",),
            down=(item.down,),
            up=(item.up,),
            alpha=alpha,
            scaling=scaling,
            others=() if item.alpha is None else (item.alpha,),
            component=component,
            name=item.name,
            layout="conv" if len(item.down.shape) > 2 else None,
            kernel=item.down.shape[2:],
            notes=notes,
        ))  # fmt: skip
    return updates


def _factors(module: str, name: str, slot: Mapping[str, TensorInfo]) -> _Factors:
    present = next(iter(slot.values()))
    downs, ups = [slot[tail] for tail in _DOWN if tail in slot], [slot[tail] for tail in _UP if tail in slot]
    if len(downs) > 1 or len(ups) > 1:
        raise AdapterError(present.file, f"{module} has factors of several kinds", present.name)
    if not downs or not ups:
        missing = "lora_A" if not downs else "lora_B"
        raise AdapterError(present.file, f"its partner {module}.{missing} (or as it was called before) is missing",
                           present.name)  # fmt: skip
    return _Factors(name, downs[0], ups[0], check_factors(downs[0], ups[0]), slot.get("alpha"))


def _check_alphas(component: str, found: Sequence[_Factors]) -> None:
    """Raises where no config and not all alphas are there, and what is missing could be several numbers."""
    without = [item for item in found if item.alpha is None]
    if len(without) == len(found) and len({item.rank for item in found}) > 1:
        first, other = found[0], next(item for item in found if item.rank != found[0].rank)
        raise UnsupportedMethodError(
            other.down.file,
            f"the modules of {component} have several ranks and no alpha is stored: the scaling could be 1, or "
            f"{first.rank}/{other.rank} as diffusers loads it (alpha is then the rank of one module for all)",
            other.down.name,
        )
    if without and len(without) < len(found):
        raise UnsupportedMethodError(
            without[0].down.file,
            f"other modules of {component} have an alpha, this one has none: it could be its rank, or theirs",
            without[0].down.name,
        )


def _configs(tuned: Checkpoint, components: Mapping[str, object]) -> dict[str, _Config]:
    """component → PEFT's config of it, as the headers hold it."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in tuned.files:
        for key, value in _metadata(file).items():
            component, _, field = key.partition(".")
            if component in components:
                found[component][field] = value
    return {component: _Config(tuned.files[0], values) for component, values in found.items()}


def _metadata(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            raw = (opened.metadata() or {}).get(METADATA, "{}")
        value = json.loads(raw)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(file, f"{METADATA} in its header is not readable as JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(file, f"{METADATA} in its header is no JSON object")
    return value


class _Config:
    """The fields of PEFT's LoraConfig, checked: anything that is not understood is refused by name."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file, self.values = file, values
        for key, value in values.items():
            if (key not in KNOWN_FIELDS or key == "use_dora") and value:
                raise UnsupportedMethodError(
                    file, f"the option {key[:80]} = {str(value)[:80]!r} in {METADATA} cannot be read by this version"
                )
        method = values.get("peft_type", "LORA")
        if method != "LORA":
            raise UnsupportedMethodError(file, f"the method {str(method)[:80]!r} in {METADATA} cannot be read")
        init = values.get("init_lora_weights", True)
        if not any(init is value or init == value for value in NEUTRAL_INIT):
            raise UnsupportedMethodError(
                file, f"init_lora_weights = {str(init)[:80]!r} changed the base weights when training began"
            )
        self.rank = self._number("r", values.get("r", 8))
        self.alpha = self._number("lora_alpha", values.get("lora_alpha", 8))
        rslora = values.get("use_rslora")
        if rslora is not None and not isinstance(rslora, bool):
            raise AdapterError(file, f"use_rslora = {str(rslora)[:80]!r} in {METADATA}; expected true or false")
        self.use_rslora = bool(rslora)
        self.ranks, self.alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def scaling_of(self, item: _Factors) -> tuple[float, float]:
        """(alpha, scaling) of a module: alpha / r, or alpha / √r for rsLoRA."""
        rank, alpha = self.ranks.lookup(item.name, self.rank), self.alphas.lookup(item.name, self.alpha)
        if rank != item.rank:
            raise AdapterError(
                item.down.file, f"its first dimension is {item.rank}, but {METADATA} gives this module r = {rank:g}",
                item.down.name,
            )  # fmt: skip
        return alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _number(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e15 < value < 1e15:
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r} in {METADATA}; expected a number")
        return value

    def _pattern(self, key: str) -> Pattern:
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(self.file, f"{key} in {METADATA} is not an object")
        return Pattern(self.file, {name: self._number(key, value) for name, value in pattern.items()})
