"""What the updates of PEFT's methods besides LoRA have in common.

Their factors do not always tell both sides of the weight, so that an update is asked whether a stored weight fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.derived import Weight
from spectra.files.orientation import Layout, Orientation, matrix_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import Update

Slot = Mapping[str, TensorInfo]  # the factors of one module, by name


@dataclass(frozen=True)
class MethodUpdate:
    """The stored factors of one module, by name; what they are is the subclasses' own.

    ``shape`` is (out, in) where the headers tell both, ``layouts`` those in which peft has the method.
    """

    module: str
    factors: tuple[tuple[str, TensorInfo], ...]
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    notes: tuple[str, ...] = ()

    layout: Layout | None = None
    kernel: tuple[int, ...] = ()
    base_copy: str | None = None
    may_be_new: bool = False

    @property
    def kind(self) -> UpdateKind:
        raise NotImplementedError

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return "linear", "conv"

    @property
    def targets(self) -> tuple[str, ...]:
        return (f"{self.module}.weight",)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(info.name for _, info in self.factors)

    @property
    def shape(self) -> tuple[int, int] | None:
        return None

    @property
    def parameters(self) -> int:
        return sum(info.size for _, info in self.factors)

    @property
    def scales_bias(self) -> bool:
        """Whether the module's bias changes with its weight."""
        return False

    def layout_in(self, stored: tuple[int, ...], orientation: Orientation) -> Layout | None:
        """The layout in which a stored base tensor fits, or None; square ones go by what is known of the base."""
        possible: tuple[Layout, ...] = ("conv",) if len(stored) > 2 else ("linear", "conv1d", "embedding")
        if len(stored) < 2:
            return None
        fitting = [
            layout for layout in possible if layout in self.layouts and self.fits(matrix_shape(stored, layout), stored)
        ]
        if len(fitting) > 1 and orientation.is_transposed(self.module):
            return "conv1d"
        return fitting[0] if fitting else None

    def groups_in(self, stored: tuple[int, ...], orientation: Orientation) -> int:
        """How many groups a convolution has that the factors fit only ungrouped; else 1."""
        if len(stored) < 3 or self.layout_in(stored, orientation) is not None:
            return 1
        for groups in range(2, stored[0] + 1):
            whole = (stored[0], stored[1] * groups, *stored[2:])
            if stored[0] % groups == 0 and self.layout_in(whole, orientation) is not None:
                return groups
        return 1

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        """Whether a weight stored as ``stored``, a matrix of ``shape`` (out, in), can be the base."""
        return shape == self.shape

    def rescaled(self, factor: float, note: str) -> MethodUpdate:
        """The update as a running model multiplies it."""
        assert self.scaling is not None
        return replace(self, scaling=self.scaling * factor, notes=(*self.notes, note))

    def on(self, base: Weight) -> MethodUpdate:
        """The update, once its base weight is known."""
        return self

    def notes_in(self, stored: tuple[int, ...]) -> tuple[str, ...]:
        """What a reader of the report should know, once the base is."""
        return ()

    def why_not_merged(self, stored: tuple[int, ...]) -> str | None:
        """Why a base weight stored with this shape has no place for the update, if it has none."""
        return None

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Update:
        values = {
            name: checkpoint.read(info.name, digest=True).to(device=device).double() for name, info in self.factors
        }
        return self.form(values, layout)

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        """The update from its factors, float64."""
        raise NotImplementedError

    def _info(self, name: str) -> TensorInfo:
        return dict(self.factors)[name]


def all_of(module: str, slot: Slot, *names: str) -> list[TensorInfo]:
    """The named factors; an AdapterError names one that is missing."""
    for name in names:
        if name not in slot:
            present = next(iter(slot.values()))
            raise AdapterError(present.file, f"its partner {module}.{name} is missing", present.name)
    return [slot[name] for name in names]


def named(slot: Slot, *names: str) -> tuple[tuple[str, TensorInfo], ...]:
    """Those of the named factors that are there, by name."""
    return tuple((name, slot[name]) for name in names if name in slot)


def dimensions(allowed: tuple[int, ...], *infos: TensorInfo) -> None:
    """Raises AdapterError unless the tensors have one of these numbers of dimensions."""
    for info in infos:
        if len(info.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise AdapterError(info.file, f"expected {expected} dimensions, found shape {list(info.shape)}", info.name)


def equal(info: TensorInfo, dimension: int, wanted: int, because: str) -> None:
    """Raises AdapterError unless a tensor has the wanted size in one dimension, counted from 0."""
    if info.shape[dimension] != wanted:
        raise AdapterError(
            info.file, f"its shape is {list(info.shape)}, where dimension {dimension + 1} must be {wanted}: {because}",
            info.name,
        )  # fmt: skip
