"""BOFT: a weight turned by a product of block-diagonal rotations, and its rows scaled.  arXiv 2311.06243."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.method import MethodUpdate, Slot, all_of, dimensions, equal, named
from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError
from spectra.files.orientation import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.updates.algebra import Update


@dataclass(frozen=True)
class BoftUpdate(MethodUpdate):
    """boft_R (factors, blocks, b, b), of whose skew-symmetric parts R is made; boft_s, one for each output."""

    @property
    def kind(self) -> UpdateKind:
        return "rotated"

    @property
    def formula(self) -> str:
        return "W1 = l ⊙ (W0·R), by row, with R a rotation"

    @property
    def shape(self) -> tuple[int, int]:
        _, blocks, size, _ = self._info("boft_R").shape
        return self._info("boft_s").size, blocks * size

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        import torch

        from spectra.updates.algebra import Butterfly

        skew = (values["boft_R"] - values["boft_R"].transpose(-1, -2)) / 2
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        turns = torch.linalg.solve(one + skew, (one - skew).expand_as(skew), left=False)
        factors, blocks, size, _ = skew.shape
        orders = tuple(
            torch.tensor(_order(blocks * size, blocks >> factor, size, factors), device=skew.device)
            for factor in range(factors)
        )
        return Butterfly(turns, orders, values["boft_s"].flatten())


def _order(features: int, groups: int, size: int, factors: int) -> list[int]:
    """The order in which one factor's blocks take the features: in each group, every second half block first."""
    if factors == 1:
        return list(range(features))
    half, length = size // 2, features // groups
    within = [
        at * half + place
        for first in (0, 1)
        for at in range(first, length // half, 2)
        for place in range(half)
    ]  # fmt: skip
    return [start + place for start in range(0, features, length) for place in within]


def boft(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    R, s = all_of(module, slot, "boft_R", "boft_s")
    dimensions((4,), R)
    dimensions((2,), s)
    factors, blocks, size, _ = R.shape
    equal(R, 3, size, "blocks are square")
    if R.size == 0 or 1 not in s.shape:
        raise AdapterError(
            s.file if R.size else R.file, "expected blocks, and one scale for each output", s.name if R.size else R.name
        )
    wanted, count = config.whole("boft_block_size", 4), config.whole("boft_block_num", 0)
    if (wanted != 0) == (count != 0):
        raise AdapterError(config.file, "expected one of boft_block_size and boft_block_num to be 0, and the other not")
    if (blocks != count) if count else (size != wanted):
        option = f"boft_block_num = {count}" if count else f"boft_block_size = {wanted}"
        raise AdapterError(R.file, f"it holds {blocks} blocks of {size}, but the config says {option}", R.name)
    butterfly = config.whole("boft_n_butterfly_factor", 1)
    # Without its CUDA extension peft takes one factor, whatever the config says.
    if factors not in (1, butterfly):
        raise AdapterError(
            R.file, f"it holds {factors} factors, but the config says boft_n_butterfly_factor = {butterfly}", R.name
        )
    if factors > 1 and (size % 2 or factors > 32 or blocks % (1 << (factors - 1))):
        raise AdapterError(R.file, f"{factors} factors cannot have {blocks} blocks of {size}", R.name)
    notes = ["BOFT turns the input side and scales the output: --side right shows the turning by itself"]
    if factors != butterfly:
        notes.append(f"boft_n_butterfly_factor is {butterfly}, but one was trained, as without peft's CUDA extension")
    return BoftUpdate(module, named(slot, "boft_R", "boft_s"), notes=tuple(notes))
