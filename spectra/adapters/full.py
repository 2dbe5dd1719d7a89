"""Full fine-tuning: a whole checkpoint, whose update is W1 − W0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.plan import VECTOR, Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived, Unreadable, Weight, sources_of
from spectra.files.orientation import Layout, as_matrix, is_convolution
from spectra.files.stored.experts import BIASES

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Dense

_BASE_LAYER = re.compile(r"(?<=\.)base_layer\.")  # what peft's wrappers call the layer inside: here it is all there is
# What models keep as integers or masks, of which nothing is trained.
BUFFERS = frozenset(
    ["bias", "masked_bias", "position_ids", "token_type_ids", "attention_mask", "relative_position_index",
     "running_mean", "running_var", "num_batches_tracked", "inv_freq", "q_scale", "k_scale", "v_scale", "kv_scale"]
)  # fmt: skip


@dataclass(frozen=True)
class WholeTensor:
    """A tensor stored whole, with the base's own layout."""

    module: str
    targets: tuple[str, ...]
    info: Weight
    may_be_new: bool = True
    kind: UpdateKind = "dense"
    layout: Layout | None = None
    shape: tuple[int, int] | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    kernel: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    base_copy: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return sources_of(self.info)

    @property
    def parameters(self) -> int:
        return self.info.size

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Dense:
        from spectra.updates.algebra import Dense

        stored = checkpoint.load(self.info, digest=True)[:rows]
        return Dense(as_matrix(stored.to(device=device, dtype=dtype), layout))


def whole_tensor(info: Weight, name: str, bias: Weight | None = None) -> PlannedUpdate | Skipped:
    """How a tensor that is stored whole, under the module name ``name``, is treated; ``bias`` is its module's."""
    module = name.removesuffix(".weight")
    if isinstance(info, Unreadable):
        return Skipped(module, info.reason, "without_spectrum" if info.reason == BIASES else "not_read", info.size)
    if len(info.shape) < 2:
        return Skipped(name, VECTOR, "without_spectrum", info.size)
    if not info.is_float:
        why = f"stored as {info.dtype}: integers and quantised weights are not analysed"
        return Skipped(name, why, "no_update" if _is_buffer(name, info) else "not_read", info.size)
    if info.size == 0:
        return Skipped(name, "empty", "not_read", 0)
    if len(info.shape) == 3 and "expert" in name:
        return Skipped(name, "a stack of experts by a name that is not known", "not_read", info.size)
    if len(info.shape) > 2 and not is_convolution(name, info.shape, bias):
        reason = "no convolution by name, kernel or bias: how it is a matrix is not known"
        return Skipped(name, f"{len(info.shape)} dimensions, but {reason}", "without_spectrum", info.size)
    notes = (f"read from {info.how}",) if isinstance(info, Derived) else ()
    return WholeTensor(module, (name,), info, notes=notes)


def _is_buffer(name: str, info: Weight) -> bool:
    """Whether integers are a model's own bookkeeping (positions, masks) and no weights in a form that is not read."""
    return info.dtype in ("I64", "BOOL") or name.rpartition(".")[2] in BUFFERS


class FullCheckpoint:
    """Anything with whole tensors and no adapter's keys."""

    name = "full"
    reads = (("whole models, fine-tuned in full or in part", "W1"),)

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None

    def plan(self, tuned: Checkpoint) -> Plan:
        updates: list[PlannedUpdate] = []
        skipped: list[Skipped] = []
        for name, info in tuned.weights.items():
            bias = tuned.weights.get(f"{name.removesuffix('weight')}bias")
            planned = whole_tensor(info, _BASE_LAYER.sub("", name), bias)
            if isinstance(planned, Skipped):
                skipped.append(planned)
            else:
                updates.append(planned)
        return Plan("full", tuple(updates), tuple(skipped), {"rank": None, "alpha": None}, complete=True)
