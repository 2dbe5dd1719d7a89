"""OFT, BOFT, (IA)³ and GLoRA of LyCORIS, which multiply a weight; and the OFT of sd-scripts.

As ``lycoris`` 4.1 writes them, and ``networks/oft.py`` and ``oft_flux.py`` of sd-scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.factors import alpha_of, check_factors, scalar
from spectra.adapters.lycoris_products import LycorisUpdate
from spectra.adapters.peft.method import Slot, all_of, dimensions
from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.updates.algebra import Update

KOHYA_OFT = "oft_unet"  # the prefix of sd-scripts' own OFT
OUTPUT = "this turns the output side: where nothing is rescaled, right singular vectors stay as they are"
GLORA = "the scaling is alpha/r, as lycoris loads it; that of rsLoRA would be alpha/√r, and is not recorded for GLoRA"


@dataclass(frozen=True)
class OftUpdate(LycorisUpdate):
    """oft_blocks (n, b, b), of which the differences with their transposes are turned into rotations of the output.

    Several belong to parts of the output.  With four dimensions, (s, n, b, b), they are the s stages of BOFT's
    butterflies; ``oft_diag`` are the rotations themselves.  ``limit`` bounds the norm of those differences, in units of
    the number of outputs.
    """

    limit: float | None = None

    @property
    def kind(self) -> UpdateKind:
        return "rotated"

    @property
    def formula(self) -> str:
        turned = "l ⊙ (R·W0), by row" if "rescale" in dict(self.factors) else "R·W0"
        return f"W1 = {turned}, with R a rotation"

    @property
    def blocks(self) -> list[tuple[str, TensorInfo]]:
        return [(name, info) for name, info in self.factors if name.startswith("oft_")]

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        rescale = dict(self.factors).get("rescale")
        outputs = sum(info.shape[-3] * info.shape[-1] for _, info in self.blocks)
        return shape[0] == outputs and (rescale is None or rescale.size == outputs)

    def change(self, values: Mapping[str, Tensor]) -> Update:
        import torch

        from spectra.updates.multiplied import Turned

        parts = [
            values[name]
            if name == "oft_diag"
            else rotations(values[name], self.limit, kohya=self.component == KOHYA_OFT)
            for name, _ in self.blocks
        ]
        sizes = [part.shape[-3] * part.shape[-1] for part in parts]
        rescale = values["rescale"].flatten()[:, None] if "rescale" in values else None

        def turn(columns: Tensor) -> Tensor:
            turned = torch.cat([
                _turn(part, rows) for part, rows in zip(parts, torch.split(columns, sizes), strict=True)
            ])  # fmt: skip
            return turned if rescale is None else turned * rescale

        return Turned(turn)


def rotations(blocks: Tensor, limit: float | None, *, kohya: bool = False) -> Tensor:
    """R = (1 + Q)(1 − Q)⁻¹ of Q = blocks − blocksᵀ, (…, b, b), whose norm over all blocks is bounded.

    The bound is ``limit`` times the number of outputs.  LyCORIS has none where that is 0; sd-scripts has, and adds
    1e-8 to numerator and denominator.
    """
    import torch

    Q = blocks - blocks.transpose(-1, -2)
    norm = Q.norm()
    bound = math.inf if limit is None else limit * blocks.shape[-3] * blocks.shape[-1]
    if kohya:
        Q = Q * ((norm.clamp(max=bound) + 1e-8) / (norm + 1e-8))
    elif 0 < bound < norm + 1e-8:
        Q = Q * (bound / (norm + 1e-8))
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    turned: Tensor = torch.linalg.solve(one - Q, one + Q, left=False)
    return turned


def _turn(R: Tensor, rows: Tensor) -> Tensor:
    """Rᵀ times the rows (out, c), block by block; of four dimensions, the stages of a butterfly, not transposed."""
    import torch

    if R.ndim == 3:
        return torch.einsum("kij,kic->kjc", R, torch.unflatten(rows, 0, R.shape[:2])).flatten(0, 1)
    for stage, factor in enumerate(R):
        half = factor.shape[-1] * 2**stage // 2
        mixed = torch.unflatten(rows, 0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
        turned = torch.einsum("kij,kjc->kic", factor, torch.unflatten(mixed, 0, factor.shape[:2])).flatten(0, 1)
        rows = torch.unflatten(turned, 0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return rows


def oft(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    names = sorted((name for name in slot if name.startswith("oft_")), key=lambda name: (len(name), name))
    numbered = [f"oft_blocks.{number}" for number in range(len(names))]
    first = slot[names[0]]
    if len(names) > 1 and names != numbered:
        raise AdapterError(
            first.file, f"expected oft_blocks.0 to .{len(names) - 1}, found {', '.join(names)}", first.name
        )
    for name in names:
        info = slot[name]
        dimensions((3, 4) if name == "oft_blocks" else (3,), info)
        if info.size == 0 or info.shape[-1] != info.shape[-2]:
            raise AdapterError(info.file, f"expected square blocks, found shape {list(info.shape)}", info.name)
        if len(info.shape) == 4:
            stages, count, size, _ = info.shape
            if size % 2 or stages > 60 or count * size % (size * 2 ** (stages - 1)):
                raise AdapterError(
                    info.file, f"{stages} stages of blocks of {size} do not fit {count * size} outputs", info.name
                )
    rescale, alpha = slot.get("rescale"), slot.get("alpha")
    if rescale is not None and (not rescale.shape or rescale.size != rescale.shape[0]):
        raise UnsupportedMethodError(
            rescale.file, f"expected one value per output, found shape {list(rescale.shape)}", rescale.name
        )
    limit = None if alpha is None or names == ["oft_diag"] else scalar(alpha)
    return OftUpdate(module, (), alpha=limit, notes=(OUTPUT,), limit=limit)


@dataclass(frozen=True)
class Ia3Update(LycorisUpdate):
    """weight (n,) or (1, n, 1…), and on_input: rows, or columns, are multiplied by 1 + weight."""

    columns: bool = False

    @property
    def kind(self) -> UpdateKind:
        return "scaled"

    @property
    def formula(self) -> str:
        return f"W1 = (1 + l) ⊙ W0, by {'column' if self.columns else 'row'}"

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        return self._info("weight").size == (stored[1] if self.columns else stored[0])

    def change(self, values: Mapping[str, Tensor]) -> Update:
        from spectra.updates.algebra import Scaled

        scale = 1 + values["weight"].flatten()
        return Scaled(columns=scale) if self.columns else Scaled(rows=scale)


def ia3(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    weight, on_input = all_of(module, slot, "weight", "on_input")
    if weight.size == 0 or max(weight.shape, default=1) != weight.size:
        raise AdapterError(weight.file, f"expected one row or column, found shape {list(weight.shape)}", weight.name)
    value = scalar(on_input)
    if value not in (0, 1):
        raise AdapterError(on_input.file, f"it is {value:g}; expected 0 or 1", on_input.name)
    return Ia3Update(module, (), columns=bool(value))


@dataclass(frozen=True)
class GloraUpdate(LycorisUpdate):
    """a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, k…): dW = s · (W0·a1·a2 + b1·b2)."""

    @property
    def kind(self) -> UpdateKind:
        return "mixed"

    @property
    def shape(self) -> tuple[int, int]:
        return self._info("b1.weight").shape[0], math.prod(self._info("b2.weight").shape[1:])

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        kernel = self._info("b2.weight").shape[2:]
        same = kernel == stored[2:] or all(size == 1 for size in (*kernel, *stored[2:]))
        return shape == self.shape and same and self._info("a1.weight").shape[0] == stored[1]

    def change(self, values: Mapping[str, Tensor]) -> Update:
        from spectra.updates.multiplied import Mixed

        assert self.scaling is not None
        a1, a2, b1, b2 = (values[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        return Mixed(a1, a2, b1, b2, self.scaling)


def glora(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    a1, a2, b1, b2 = all_of(module, slot, "a1.weight", "a2.weight", "b1.weight", "b2.weight")
    rank = check_factors(b2, b1)
    if check_factors(a2, a1) != rank or any(size != 1 for size in a2.shape[2:]) or a2.shape[1] != a1.shape[0]:
        raise AdapterError(a2.file, f"expected ({rank}, {a1.shape[0]}), found shape {list(a2.shape)}", a2.name)
    alpha, scaling, notes = alpha_of(slot.get("alpha"), rank)
    return GloraUpdate(module, (), rank, alpha, scaling, (*notes, *(() if alpha == rank else (GLORA,))))
