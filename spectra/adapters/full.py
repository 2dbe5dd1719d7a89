"""Full fine-tuning: a whole checkpoint, whose update is W1 − W0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.plan import Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived, Unreadable, Weight, sources_of
from spectra.files.gguf import BLOCKS, BLOCKS_NOT_READ
from spectra.files.orientation import Layout, as_matrix, is_convolution

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Dense


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
        return Skipped(module, info.reason)
    if len(info.shape) < 2:
        return Skipped(name, "not a matrix: a vector or scalar has no spectrum")
    if info.dtype in BLOCKS:
        return Skipped(name, f"stored as {info.dtype}: {BLOCKS_NOT_READ}")
    if not info.is_float:
        return Skipped(name, f"stored as {info.dtype}: integers and quantised weights are not analysed")
    if info.size == 0:
        return Skipped(name, "empty")
    if len(info.shape) == 3 and "expert" in name:
        return Skipped(name, "a stack of experts by a name that is not known")
    if len(info.shape) > 2 and not is_convolution(name, info.shape, bias):
        reason = "no convolution by name, kernel or bias: how it is a matrix is not known"
        return Skipped(name, f"{len(info.shape)} dimensions, but {reason}")
    notes = (f"read from {info.how}",) if isinstance(info, Derived) else ()
    return WholeTensor(module, (name,), info, notes=notes)


class FullCheckpoint:
    """Anything with whole tensors and no adapter's keys."""

    name = "full"

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None

    def plan(self, tuned: Checkpoint) -> Plan:
        updates: list[PlannedUpdate] = []
        skipped: list[Skipped] = []
        for name, info in tuned.weights.items():
            planned = whole_tensor(info, name, tuned.weights.get(f"{name.removesuffix('weight')}bias"))
            if isinstance(planned, Skipped):
                skipped.append(planned)
            else:
                updates.append(planned)
        return Plan("full", tuple(updates), tuple(skipped), {"rank": None, "alpha": None}, complete=True)
