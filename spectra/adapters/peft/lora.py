"""PEFT adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

LoRA in all its forms is read here: ``lora_alpha / r`` and rsLoRA scaling, rank and alpha patterns,
Linear, Conv1D, embeddings, convolutions, ``lora_bias``, ``modules_to_save``, attention's in and out
projections, DoRA.  Names, formulas and defaults are those of peft 0.21.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spectra.adapters.peft.fields import COMMON_FIELDS, INERT, ConfigFields, common
from spectra.adapters.peft.keys import BASE_COPY, BIAS_OF_B, FACTORS, TOKENS, VELORA, StoredKeys, unwrapped
from spectra.adapters.peft.method import Slot
from spectra.adapters.peft.parameters import parameter_updates
from spectra.adapters.peft.refused import refuse_method, refuse_option
from spectra.adapters.peft.replication import replicated, replication
from spectra.adapters.peft.tokens import replaced_tokens
from spectra.adapters.peft.unknown import stored_whole
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.errors import AdapterError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.orientation import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import LowRank, RowScaled

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
# Fields that only PEFT's own folders have a meaning for.
OWN_FIELDS = frozenset(["trainable_token_indices", "layer_replication", "velora_config", "target_parameters"])
CONDITIONAL = "conditional: this update is active only after the adapter's invocation tokens (aLoRA)"
# Initialisations that leave the base as it was; all others move part of it into the adapter.
NEUTRAL_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


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

    def rescaled(self, factor: float, note: str) -> LoraUpdate:
        """The update as a running model multiplies it."""
        return replace(self, scaling=self.scaling * factor, notes=(*self.notes, note))

    def read(
        self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> LowRank | RowScaled:
        from spectra.updates.algebra import LowRank, RowScaled

        def factor(info: TensorInfo) -> Tensor:
            # Factors are small and kept in float64: only the weight has the working dtype.
            return checkpoint.read(info.name, digest=True).to(device=device).double()

        whole, B = factor(self.A).flatten(1), factor(self.B).flatten(1)
        A = whole if rows is None else whole[:, :rows]  # of a resized vocabulary, which an embedding's A spans
        if self.magnitude is None:
            return LowRank(B, A, self.scaling)
        beyond = None
        if rows is not None and rows < whole.shape[1]:
            assert self.base_copy is not None, "why_not_cut is asked before"
            new = factor(checkpoint.tensors[self.base_copy])[rows:].T + self.scaling * (B @ whole[:, rows:])
            beyond = new.square().sum(1)
        return RowScaled(B, A, self.scaling, factor(self.magnitude).flatten(), beyond)

    def why_not_cut(self, checkpoint: Checkpoint, rows: int) -> str | None:
        """Why an embedding's update is not known for the leading rows of its vocabulary alone, or None."""
        if self.magnitude is None or rows >= self.shape[1]:
            return None
        if self.base_copy is not None and checkpoint.tensors[self.base_copy].shape == self.shape[::-1]:
            return None
        return (
            f"DoRA's magnitudes are over all {self.shape[1]} rows of the resized vocabulary, of which the base has "
            f"{rows}, and the adapter holds no copy of the others"
        )


class PeftAdapter:
    """Adapters that ``peft`` writes; today LoRA and its variants."""

    name = "peft"
    reads = (
        ("PEFT: LoRA, rsLoRA, on every layer type, with patterns, biases and saved modules", "W0 + s·BA"),
        ("PEFT: DoRA", "m ⊙ (W0 + s·BA) / ‖W0 + s·BA‖"),
        (
            "PEFT: LoRA on stacks of experts (`target_parameters`), on replicated layers, aLoRA (*conditional*: on "
            "some tokens only)",
            "the same, by expert or layer",
        ),
        (
            "PEFT: PiSSA, OLoRA; with `--initial-adapter` also `pissa_niter_*`, CorDA, LoRA-GA",
            "W0 − s·B₀A₀ + s·BA, against the original base",
        ),
    )

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is not None

    def plan(self, tuned: Checkpoint) -> Plan:
        assert tuned.adapter_config is not None
        config = _Config(tuned)
        stored = StoredKeys(tuned, FACTORS["LORA"])
        copies = stored.copies()
        skipped = [Skipped(info.name, BIAS_OF_B, "without_spectrum") for info in stored.biases.values()]
        updates: list[PlannedUpdate] = []
        for stack in parameter_updates(config, config, stored.modules):
            own = {item.parameter: copies.get(f"{stack.home}.{item.parameter}") for item in stack.candidates}
            base_copies = {parameter: copy for parameter, copy in own.items() if copy is not None}
            for name, info in base_copies.values():
                if stored.plain.pop(name, None) is not None:  # several updates of a module may be of it
                    skipped.append(Skipped(info.name, BASE_COPY, "no_update"))
            copied_as = tuple((parameter, info.name) for parameter, (_, info) in base_copies.items())
            updates.append(replace(stack, copies=copied_as))
        for module, slot in stored.modules.items():
            if VELORA in slot:
                why = "what VeLoRA compresses activations with, for training"
                skipped.append(Skipped(slot.pop(VELORA).name, why, "no_update"))
            copy = copies.get(f"{unwrapped(module)}.weight") or copies.get(f"{unwrapped(module)}.in_proj_weight")
            if copy is not None and stored.plain.pop(copy[0], None) is not None:
                skipped.append(Skipped(copy[1].name, BASE_COPY, "no_update"))
            copied = copy[1].name if copy is not None else None
            if TOKENS in slot:
                updates.append(replaced_tokens(config, module, slot, copied))
            else:
                updates.append(_lora_update(config, module, slot, copied))
        for planned in stored_whole(stored, "LoRA"):
            if isinstance(planned, Skipped):
                skipped.append(planned)
            else:
                updates.append(planned)
        facts = config.facts(updates)
        layers = replication(config)
        if layers is None:
            return Plan(config.format, tuple(updates), tuple(skipped), facts)
        updates = [replicated(config.file, update, layers) for update in updates]
        sharing = frozenset(update.module for update in updates)
        return Plan(config.format, tuple(updates), tuple(skipped), facts, sharing=sharing)


def _lora_update(config: _Config, module: str, slot: Slot, copy: str | None) -> LoraUpdate:
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
        if not info.holds_floats:
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
        stored = "there is none" if magnitude is None else "there is one"
        raise AdapterError(
            A.file,
            f"use_dora is {str(config.use_dora).lower()}, but of lora_magnitude_vector {stored} for this module",
            A.name,
        )
    if magnitude is not None and magnitude.size != B.shape[0]:
        raise AdapterError(
            magnitude.file, f"expected {B.shape[0]} magnitudes, found shape {list(magnitude.shape)}", magnitude.name
        )
    layout: Layout | None = "embedding" if embedding else "conv" if len(A.shape) > 2 else None
    plain_name = unwrapped(module)
    notes: tuple[str, ...] = ()
    if module.endswith(".base_layer.out_proj"):
        # peft's MultiheadAttention adds this update itself and then has out_proj add it again, in its
        # forward pass and its merge alike (0.21.2, measured), so that is what the model was trained with.
        scaling *= 2
        notes = ("peft applies the update of a MultiheadAttention's out_proj twice; so does this report",)
    if config.conditional:
        notes += (CONDITIONAL,)
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
        base_copy=copy,
    )


class _Config(ConfigFields):
    """``adapter_config.json``, checked: anything that is not understood is refused by name."""

    def __init__(self, tuned: Checkpoint):
        super().__init__(tuned)
        method = self.values.get("peft_type")
        if method is not None and not isinstance(method, str):
            raise AdapterError(self.file, f"peft_type = {method!r}; expected a name")
        if method != "LORA":
            raise refuse_method(self.file, method or None)
        for key, value in self.values.items():
            if key not in KNOWN_FIELDS | OWN_FIELDS | INERT.keys() and value:
                raise refuse_option(self.file, key, value)
        self.rank = self.number("r", self.values.get("r", 8))
        self.alpha = self.number("lora_alpha", self.values.get("lora_alpha", 8))
        self.use_rslora = self.switch("use_rslora")
        self.use_dora = self.switch("use_dora")
        self.rank_pattern = self.pattern("rank_pattern")
        self.alpha_pattern = self.pattern("alpha_pattern")

    @property
    def conditional(self) -> bool:
        """Whether it is active on some tokens only (aLoRA, arXiv 2504.12397)."""
        return bool(self.values.get("alora_invocation_tokens"))

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
            "conditional": self.conditional,
            "base_model_name_or_path": self.values.get("base_model_name_or_path"),
        }
