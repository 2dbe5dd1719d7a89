"""Updates that multiply the base weight, besides what they add to it.

Like those of :mod:`spectra.updates`, they are bound to W0 (m, n) by ``tuned(W0)``; their own tensors are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.updates.algebra import ALL, DenseWeight, FactoredWeight, TunedWeight, Update, computed, slabs


@dataclass(frozen=True, eq=False)
class Normed:
    """DoRA of any change dW: W1 = magnitude ⊙ (W0 + dW) / ‖W0 + dW‖; Liu et al. 2024, arXiv 2402.09353.

    The norms are those of rows, with ``magnitude`` (m,), or with ``columns`` those of columns.  A column of a
    convolution's channel is one of all that the channel has, so that the magnitudes may be a divisor of n in number.
    """

    change: Update
    magnitude: Tensor
    columns: bool = False

    def tuned(self, W0: Tensor) -> TunedWeight:
        plain = self.change.tuned(W0)
        if self.columns:
            squares = torch.zeros(W0.shape[1], dtype=torch.float64, device=W0.device)
            for rows in slabs(W0.shape[0]):
                squares += plain.block(rows, ALL).square().sum(0)
            each = W0.shape[1] // self.magnitude.numel()
            scale = _ratio(self.magnitude, squares.reshape(-1, each).sum(1).sqrt()).repeat_interleave(each)
            return computed(W0, lambda rows: plain.block(rows, ALL) * scale)
        left = _ratio(self.magnitude, torch.cat([plain.block(rows, ALL).norm(dim=1) for rows in slabs(W0.shape[0])]))
        if isinstance(plain, FactoredWeight):
            before = plain.left if plain.left is not None else torch.ones_like(left)
            return FactoredWeight(W0, plain.B * left[:, None], plain.A, left * before, normed=True)
        return computed(W0, lambda rows: plain.block(rows, ALL) * left[rows, None])


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """What each row or column is multiplied by; one that is zero stays zero whatever its magnitude."""
    return torch.where(norms > 0, magnitude / norms, 1.0)


@dataclass(frozen=True, eq=False)
class Turned:
    """W1 = Q·W0 with Q (m, m) given by what it does to columns: ``turn`` takes (m, b) to (m, b), float64."""

    turn: Callable[[Tensor], Tensor]

    def tuned(self, W0: Tensor) -> DenseWeight:
        whole = torch.empty_like(W0, memory_format=torch.contiguous_format)
        for columns in slabs(W0.shape[1]):
            whole[:, columns] = self.turn(W0[:, columns].double()).to(W0.dtype)
        return DenseWeight(W0, whole, free=False)


@dataclass(frozen=True, eq=False)
class Mixed:
    """GLoRA: W1 = W0 + scaling · (W0·A1·A2 + B1·B2); Chavan et al. 2023, arXiv 2306.07967.

    A1 (c, r), A2 (r, c), B1 (m, r), B2 (r, n); A1·A2 acts on the c input channels, of n/c columns each.
    """

    A1: Tensor
    A2: Tensor
    B1: Tensor
    B2: Tensor
    scaling: float

    def tuned(self, W0: Tensor) -> TunedWeight:
        channels = self.A1.shape[0]
        if channels == W0.shape[1]:
            inner = torch.cat([W0[rows].double() @ self.A1 for rows in slabs(W0.shape[0])])
            return FactoredWeight(W0, torch.cat([inner, self.B1], 1) * self.scaling, torch.cat([self.A2, self.B2]))

        def block(rows: slice) -> Tensor:
            base = W0[rows].double()
            mixed = torch.einsum("mck,cr,rd->mdk", base.reshape(len(base), channels, -1), self.A1, self.A2)
            return base + self.scaling * (mixed.flatten(1) + self.B1[rows] @ self.B2)

        return computed(W0, block)
