"""PEFT adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

LoRA in all its forms is read here: ``lora_alpha / r`` and rsLoRA scaling, rank and alpha patterns,
Linear, Conv1D, embeddings, convolutions, ``lora_bias``, ``modules_to_save``, attention's in and out
projections, DoRA.  Names, formulas and defaults are those of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectra.adapters.full import whole_tensor
from spectra.adapters.pattern import Pattern
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.adapters.unsupported import foreign_method
from spectra.checkpoint import Checkpoint, TensorInfo
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.orientation import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates import LowRank, RowScaled

PREFIX = "base_model.model."

# Config fields of any method that do not change what the stored tensors mean, or are read for all.
COMMON_FIELDS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "fan_in_fan_out",
    ]
)
# Config fields of LoRA that are read here, or that do not change what the stored tensors mean.
KNOWN_FIELDS = COMMON_FIELDS | frozenset(
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "use_dora",
        "alora_invocation_tokens",
        "qalora_group_size",
        "lora_bias",
        "ensure_weight_tying",
    ]
)
# Initialisations that leave the base as it was; all others move part of it into the adapter.
NEUTRAL_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
# Methods that train no weight of the model.
PROMPT_METHODS = frozenset(
    ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"]
)

_KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?P<tail>(\.[^.]+)*)$"
)


@dataclass(frozen=True)
class LoraUpdate:
    """The stored factors of one module: A (r, in), B (out, r) and, for DoRA, the magnitudes.

    ``options`` is the name by which the config finds the module's rank and alpha.
    """

    module: str
    targets: tuple[str, ...]
    A: TensorInfo
    B: TensorInfo
    rank: int
    alpha: float
    scaling: float
    layout: Layout | None
    options: str
    magnitude: TensorInfo | None = None
    notes: tuple[str, ...] = ()
    base_copy: str | None = None
    may_be_new: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        own = [self.A.name, self.B.name]
        return tuple(own + ([self.magnitude.name] if self.magnitude else []))

    @property
    def kind(self) -> UpdateKind:
        return "row_scaled" if self.magnitude else "low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], math.prod(self.A.shape[1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.A.shape[2:]

    @property
    def parameters(self) -> int:
        return self.A.size + self.B.size + (self.magnitude.size if self.magnitude else 0)

    def read(
        self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> LowRank | RowScaled:
        from spectra.updates import LowRank, RowScaled

        def factor(info: TensorInfo) -> Tensor:
            # Factors are small and kept in float64: only the weight has the working dtype.
            return checkpoint.read(info.name, digest=True).to(device=device).double()

        A, B = factor(self.A).flatten(1), factor(self.B).flatten(1)
        if rows is not None:  # of a resized vocabulary, which an embedding's A spans
            A = A[:, :rows]
        if self.magnitude is None:
            return LowRank(B, A, self.scaling)
        return RowScaled(B, A, self.scaling, factor(self.magnitude).flatten())


class PeftAdapter:
    """Adapters that ``peft`` writes; today LoRA and its variants."""

    name = "peft"

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is not None

    def plan(self, tuned: Checkpoint) -> Plan:
        assert tuned.adapter_config is not None
        config = _Config(tuned)
        factors: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        plain: dict[str, TensorInfo] = {}
        skipped: list[Skipped] = []
        for key, info in tuned.tensors.items():
            name = key.removeprefix(PREFIX)
            match = _KEY.match(name)
            if match is None:
                plain[name] = info
                continue
            tail = [part for part in match["tail"].split(".") if part]
            if tail and tail[-1] == "bias":
                skipped.append(Skipped(key, "the bias of lora_B: a vector has no spectrum"))
                continue
            adapter = [part for part in tail if part != "weight"]
            slot = factors[match["module"]]
            if match["factor"] in slot:
                raise AdapterError(
                    info.file, f"{match['factor']} occurs twice for one module (a second adapter {adapter}?)", key
                )
            slot[match["factor"]] = info
        updates: list[PlannedUpdate] = []
        for module, slot in factors.items():
            copy = plain.pop(f"{module}.base_layer.weight", None)
            updates.append(_lora_update(config, module, slot, copy))
            if copy is not None:
                skipped.append(Skipped(copy.name, "a copy of the base weight that peft stores beside the adapter"))
        foreign = foreign_method(plain)
        if foreign is not None:
            name, method = foreign
            raise UnsupportedMethodError(
                plain[name].file, f"a LoRA does not hold this: it belongs to {method}, which this version cannot read",
                plain[name].name,
            )  # fmt: skip
        for name, info in plain.items():
            planned = saved_module(name, info)
            if isinstance(planned, Skipped):
                skipped.append(Skipped(info.name, planned.reason))
            else:
                updates.append(planned)
        return Plan(config.format, tuple(updates), tuple(skipped), config.facts(updates))


def saved_module(name: str, info: TensorInfo) -> PlannedUpdate | Skipped:
    """A tensor stored whole: a module to save, a bias, or something peft keeps beside them."""
    plain = _plain_name(name)
    if plain is None:
        return Skipped(info.name, "the untrained original that peft keeps beside a saved module")
    return whole_tensor(info, plain)


def _plain_name(name: str) -> str | None:
    """The model's own name of a tensor stored whole; None for the original that peft keeps beside one."""
    if ".original_module." in name:
        return None
    return re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name).replace(".base_layer.", ".")


def beside_factors(tuned: Checkpoint, plan: Plan) -> Iterator[tuple[str, str, float | None]]:
    """(tensor, the model's own name of what it changes, scaling) of all that an adapter holds besides factors.

    Without a scaling it takes the model's place; a bias of lora_B is multiplied by it and added.
    """
    factors = {update.module: update for update in plan.updates if isinstance(update, LoraUpdate)}
    copies = {update.base_copy for update in plan.updates}
    # What other methods than LoRA store is in their updates as a whole.
    copies |= {name for update in plan.updates if update.kind != "dense" for name in update.tensors}
    for key in tuned.tensors:
        name = key.removeprefix(PREFIX)
        match = _KEY.match(name)
        if match is not None:
            module = match["module"].replace(".base_layer", "")
            if match["tail"].endswith(".bias"):
                yield key, f"{module}.bias", factors[module].scaling
        elif key not in copies:
            plain = _plain_name(name)
            if plain is not None:
                yield key, plain, None


def _lora_update(config: _Config, module: str, slot: dict[str, TensorInfo], copy: TensorInfo | None) -> LoraUpdate:
    embedding = "lora_embedding_A" in slot or "lora_embedding_B" in slot
    kind = "lora_embedding_" if embedding else "lora_"
    present = next(iter(slot.values()))
    for factor in (kind + "A", kind + "B"):
        if factor not in slot:
            raise AdapterError(present.file, f"its partner {module}.{factor} is missing", present.name)
    A, B, magnitude = slot[kind + "A"], slot[kind + "B"], slot.get("lora_magnitude_vector")
    # The out_proj inside a MultiheadAttention gets the options of the attention itself.
    options = module.removesuffix(".base_layer.out_proj")
    rank, alpha, scaling = config.scaling_of(options)
    for info in slot.values():
        if not info.is_float:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
    for info in (A, B):
        if len(info.shape) < 2 or info.size == 0:
            raise AdapterError(
                info.file,
                f"expected a matrix, found shape {list(info.shape)}: the adapter was saved incompletely",
                info.name,
            )
    if A.shape[0] != rank:
        raise AdapterError(
            A.file, f"its first dimension is {A.shape[0]}, but the config gives this module r = {rank}", A.name
        )
    if B.shape[1] != rank:
        raise AdapterError(
            B.file, f"its second dimension is {B.shape[1]}, but the config gives this module r = {rank}", B.name
        )
    if any(size != 1 for size in B.shape[2:]):
        raise AdapterError(B.file, f"expected a 1×1 convolution, found shape {list(B.shape)}", B.name)
    if config.use_dora != (magnitude is not None):
        found = "there is none" if magnitude is None else "there is one"
        raise AdapterError(
            A.file,
            f"use_dora is {str(config.use_dora).lower()}, but of lora_magnitude_vector {found} for this module",
            A.name,
        )
    if magnitude is not None and magnitude.size != B.shape[0]:
        raise AdapterError(
            magnitude.file, f"expected {B.shape[0]} magnitudes, found shape {list(magnitude.shape)}", magnitude.name
        )
    layout: Layout | None = "embedding" if embedding else "conv" if len(A.shape) > 2 else None
    plain_name = module.replace(".base_layer", "")
    notes: tuple[str, ...] = ()
    if module.endswith(".base_layer.out_proj"):
        # peft's MultiheadAttention adds this update itself and then has out_proj add it again, in its
        # forward pass and its merge alike (0.21.2, measured), so that is what the model was trained with.
        scaling *= 2
        notes = ("peft applies the update of a MultiheadAttention's out_proj twice; so does this report",)
    return LoraUpdate(
        module=plain_name,
        targets=(f"{plain_name}.weight", f"{plain_name}.in_proj_weight"),
        A=A,
        B=B,
        rank=rank,
        alpha=alpha,
        scaling=scaling,
        layout=layout,
        options=options,
        magnitude=magnitude,
        notes=notes,
        base_copy=copy.name if copy else None,
    )


class ConfigFields:
    """The values of ``adapter_config.json``, each checked as it is asked for."""

    def __init__(self, tuned: Checkpoint):
        assert tuned.adapter_config is not None
        self.file = (
            tuned.path / "adapter_config.json" if tuned.path.is_dir() else tuned.path.parent / "adapter_config.json"
        )
        self.values = tuned.adapter_config

    def whole(self, key: str, default: int) -> int:
        """A whole number, at least 0."""
        value = self.number(key, self.values.get(key, default))
        if value < 0 or value != int(value):
            raise AdapterError(self.file, f"{key} = {value:g}; expected a whole number")
        return int(value)

    def number(self, key: str, value: Any) -> float:
        """A number that is no boolean, of sane size."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -1e15 < value < 1e15:
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r}; expected a number")
        return float(value) if isinstance(value, float) else value

    def switch(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r}; expected true or false")
        return bool(value)

    def pattern(self, key: str) -> Pattern:
        """Numbers by patterns of module names."""
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(self.file, f"{key} is not an object")
        return Pattern(
            self.file, {name: self.number(f"{key} for {name[:80]!r}", value) for name, value in pattern.items()}
        )


class _Config(ConfigFields):
    """``adapter_config.json``, checked: anything that is not understood is refused by name."""

    def __init__(self, tuned: Checkpoint):
        super().__init__(tuned)
        method = self.values.get("peft_type")
        if method is not None and not isinstance(method, str):
            raise AdapterError(self.file, f"peft_type = {method!r}; expected a name")
        if method in PROMPT_METHODS:
            raise UnsupportedMethodError(
                self.file, f"{method} changes no weight of the model, so there is no spectrum to compare"
            )
        if method != "LORA":
            raise UnsupportedMethodError(
                self.file,
                f"the method {method or 'of this adapter (no peft_type)'} cannot be read by this version "
                "(LoRA, rsLoRA, DoRA, AdaLoRA, VeRA, IA3, LoHa, LoKr and OFT can)",
            )
        init = self.values.get("init_lora_weights", True)
        if not any(init is value or init == value for value in NEUTRAL_INIT):
            raise UnsupportedMethodError(
                self.file,
                f"init_lora_weights = {init!r} changed the base weights when training began; convert the adapter "
                "to plain LoRA with peft (save_pretrained(path_initial_model_for_weight_conversion=…)) first",
            )
        for key, value in self.values.items():
            if key not in KNOWN_FIELDS and value:
                raise UnsupportedMethodError(self.file, f"the option {key} = {value!r} cannot be read by this version")
        self.rank = self.number("r", self.values.get("r", 8))
        self.alpha = self.number("lora_alpha", self.values.get("lora_alpha", 8))
        self.use_rslora = self.switch("use_rslora")
        self.use_dora = self.switch("use_dora")
        self.rank_pattern = self.pattern("rank_pattern")
        self.alpha_pattern = self.pattern("alpha_pattern")

    @property
    def format(self) -> str:
        return "peft-dora" if self.use_dora else "peft-rslora" if self.use_rslora else "peft-lora"

    def scaling_of(self, module: str) -> tuple[int, float, float]:
        """(r, alpha, scaling) of a module: alpha / r, or alpha / √r for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_pattern.lookup(module, self.rank)
        alpha = self.alpha_pattern.lookup(module, self.alpha)
        if rank < 1 or rank != int(rank):
            raise AdapterError(self.file, f"r = {rank:g} for module {module}; expected a whole number, at least 1")
        return int(rank), alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def facts(self, updates: list[PlannedUpdate]) -> dict[str, Any]:
        """What the report says of the fine-tune as a whole; null where modules differ."""
        lora = [update for update in updates if update.rank is not None]
        return {
            "rank": common(update.rank for update in lora),
            "alpha": common(update.alpha for update in lora),
            "scaling": common(update.scaling for update in lora),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "conditional": bool(self.values.get("alora_invocation_tokens")),
            "base_model_name_or_path": self.values.get("base_model_name_or_path"),
        }


def common(values: Any) -> Any:
    """The value that all share, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
