"""The algebra of a fine-tune: what it adds to a weight, kept in the form it was trained in.

An *update* (:class:`LowRank`, :class:`RowScaled`, :class:`Dense` and others) is what a checkpoint stores.
Bound to the base weight by ``update.tuned(W0)`` it becomes a *tuned weight*, the operator
``W1 = L·W0 + B·A`` that the engines see: they may multiply by it without ever forming it.

Everything is oriented ``(out_features, in_features)``.  W0 has the working dtype; the small
factors are float64, so that scaling them rounds nothing, and are cast when they meet W0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spectra.updates.products import times

SLAB = 256  # rows or columns that are upcast at once

MAGNITUDE_ROUNDING = 1e-6  # of norms computed and stored in float32

ALL = slice(None)


class TunedWeight(Protocol):
    """The fine-tuned weight W1 (m × n) as an operator; engines rely on nothing else.

    ``matmul`` takes X (n, b) and ``rmatmul`` Y (m, b), both in the working dtype.  ``block`` gives
    the exact entries of a part of W1 in float64, ``dense`` all of it in the working dtype, each
    entry rounded once.  ``delta`` is W1 − W0 and
    ``delta_norm`` its Frobenius norm.  ``low_rank()`` is (B, A) in float64 with W1 = W0 + B·A where the update
    has that form, else None.  ``parts`` is what W1 is made of besides W0.  ``scaled(weight)`` is W0 + weight·(W1 − W0).
    """

    @property
    def W0(self) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def matmul(self, X: Tensor) -> Tensor: ...
    def rmatmul(self, Y: Tensor) -> Tensor: ...
    def block(self, rows: slice, columns: slice) -> Tensor: ...
    def dense(self) -> Tensor: ...
    def delta(self) -> Tensor: ...
    def delta_norm(self) -> float: ...
    def low_rank(self) -> tuple[Tensor, Tensor] | None: ...
    def parts(self) -> tuple[Tensor, ...]: ...
    def is_unchanged(self) -> bool: ...
    def scaled(self, weight: float) -> TunedWeight: ...


class Update(Protocol):
    """What a fine-tune stores for one weight, before it meets the base."""

    def tuned(self, W0: Tensor) -> TunedWeight: ...


def slabs(length: int) -> list[slice]:
    """Consecutive slices of at most ``SLAB`` that cover ``range(length)``."""
    return [slice(at, min(at + SLAB, length)) for at in range(0, length, SLAB)]


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """W1 = diag(left)·W0 + B·A.

    Shapes: W0 (m, n) in the working dtype; B (m, r), A (r, n) and left (m,), or None for the
    identity, in float64.  ``normed`` : left is from norms, which were rounded when they were stored.
    """

    W0: Tensor
    B: Tensor
    A: Tensor
    left: Tensor | None = None
    normed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.W0.shape[0], self.W0.shape[1]

    def matmul(self, X: Tensor) -> Tensor:
        base = times(self.W0, X)
        if self.left is not None:
            base *= self.left.to(X.dtype)[:, None]
        return base.addmm_(self.B.to(X.dtype), self.A.to(X.dtype) @ X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        scaled = Y if self.left is None else self.left.to(Y.dtype)[:, None] * Y
        return times(self.W0.T, scaled).addmm_(self.A.T.to(Y.dtype), self.B.T.to(Y.dtype) @ Y)

    def block(self, rows: slice, columns: slice) -> Tensor:
        part = self.W0[rows, columns].double()
        if self.left is not None:
            part = self.left[rows, None] * part
        return part + self.B[rows] @ self.A[:, columns]

    def dense(self) -> Tensor:
        return _assemble(self)

    def delta(self) -> Tensor:
        return _assemble(self, minus=self.W0)

    def delta_norm(self) -> float:
        return _delta_norm(self)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return (self.B, self.A) if self.left is None else None

    def parts(self) -> tuple[Tensor, ...]:
        return (self.B, self.A) if self.left is None else (self.B, self.A, self.left)

    def is_unchanged(self) -> bool:
        # An untrained DoRA's magnitudes are the base's norms; IA3's scales are ones, exactly.
        rounding = MAGNITUDE_ROUNDING if self.normed else 0.0
        identity = self.left is None or bool(((self.left - 1).abs() <= rounding).all())
        return identity and not (bool(self.B.any()) and bool(self.A.any()))

    def scaled(self, weight: float) -> FactoredWeight:
        left = None if self.left is None else 1 + weight * (self.left - 1)
        return FactoredWeight(self.W0, weight * self.B, self.A, left, self.normed)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """W1 whole, in the working dtype; ``free`` where each entry was trained by itself: its bulk can be noise."""

    W0: Tensor
    W1: Tensor
    free: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.W1.shape[0], self.W1.shape[1]

    def matmul(self, X: Tensor) -> Tensor:
        return times(self.W1, X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return times(self.W1.T, Y)

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.W1[rows, columns].double()

    def dense(self) -> Tensor:
        return self.W1

    def delta(self) -> Tensor:
        return self.W1 - self.W0

    def delta_norm(self) -> float:
        return _delta_norm(self)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return None

    def parts(self) -> tuple[Tensor, ...]:
        return (self.W1,)

    def is_unchanged(self) -> bool:
        return torch.equal(self.W0, self.W1)

    def scaled(self, weight: float) -> DenseWeight:
        return DenseWeight(self.W0, torch.lerp(self.W0, self.W1, weight), self.free)


def merged(W0: Tensor, parts: Iterable[tuple[float, TunedWeight]]) -> TunedWeight:
    """W0 + Σ weight·(W1 − W0) over fine-tunes of W0; in factors where all of them are.

    The parts are taken one at a time, and of a dense one only the sum is kept.
    """
    whole: Tensor | None = None
    scaled: list[FactoredWeight] = []
    for weight, tuned in parts:
        if isinstance(tuned, FactoredWeight):
            scaled.append(tuned.scaled(weight))
        else:
            delta = tuned.delta().mul_(weight)
            whole = delta if whole is None else whole.add_(delta)
    if scaled:
        lefts = [part.left - 1 for part in scaled if part.left is not None]
        factored = FactoredWeight(
            W0,
            torch.cat([part.B for part in scaled], 1),
            torch.cat([part.A for part in scaled], 0),
            1 + torch.stack(lefts).sum(0) if lefts else None,
            all(part.normed for part in scaled if part.left is not None),
        )
        if whole is None:
            return factored
        whole.add_(factored.delta())
    assert whole is not None
    return DenseWeight(W0, whole.add_(W0))


def _assemble(weight: FactoredWeight, minus: Tensor | None = None) -> Tensor:
    whole = torch.empty_like(weight.W0, memory_format=torch.contiguous_format)
    for rows in slabs(weight.shape[0]):
        part = weight.block(rows, ALL)
        whole[rows] = part if minus is None else part - minus[rows]
    return whole


def computed(W0: Tensor, block: Callable[[slice], Tensor]) -> DenseWeight:
    """W1 from ``block(rows)``, float64 and exact, each entry rounded once."""
    whole = torch.empty_like(W0, memory_format=torch.contiguous_format)
    for rows in slabs(W0.shape[0]):
        whole[rows] = block(rows).to(W0.dtype)
    return DenseWeight(W0, whole, free=False)


def _delta_norm(weight: TunedWeight) -> float:
    squares = 0.0
    for rows in slabs(weight.shape[0]):
        squares += float((weight.block(rows, ALL) - weight.W0[rows].double()).square().sum())
    return float(np.sqrt(squares))


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: dW = scaling · B · A, with B (m, r) and A (r, n); Hu et al. 2021, arXiv 2106.09685."""

    B: Tensor
    A: Tensor
    scaling: float

    def tuned(self, W0: Tensor) -> FactoredWeight:
        return FactoredWeight(W0, self.B.double() * self.scaling, self.A.double())


@dataclass(frozen=True, eq=False)
class RowScaled:
    """DoRA: W1 = m ⊙ (W0 + s·B·A) / ‖W0 + s·B·A‖ row by row; Liu et al. 2024, arXiv 2402.09353.

    ``magnitude`` is m, one per output row, shape (m,).  ``beyond`` (m,) is what columns that W0 does not have, those of
    a resized vocabulary, add to the squares of the norms.
    """

    B: Tensor
    A: Tensor
    scaling: float
    magnitude: Tensor
    beyond: Tensor | None = None

    def tuned(self, W0: Tensor) -> FactoredWeight:
        plain = FactoredWeight(W0, self.B.double() * self.scaling, self.A.double())
        norms = torch.cat([plain.block(rows, ALL).norm(dim=1) for rows in slabs(W0.shape[0])])
        if self.beyond is not None:
            norms = (norms.square() + self.beyond).sqrt()
        # A row that is zero stays zero whatever its magnitude.
        left = torch.where(norms > 0, self.magnitude.double() / norms, 1.0)
        return FactoredWeight(W0, plain.B * left[:, None], plain.A, left, normed=True)


@dataclass(frozen=True, eq=False)
class Dense:
    """A full fine-tune: the tuned weight itself, (m, n)."""

    W1: Tensor

    def tuned(self, W0: Tensor) -> DenseWeight:
        return DenseWeight(W0, self.W1.to(W0.dtype))


@dataclass(frozen=True, eq=False)
class SharedLowRank:
    """VeRA: dW = B · A[:, :n], B (m, r) and an A (r, n or more) that modules share; arXiv 2310.11454."""

    B: Tensor
    A: Tensor

    def tuned(self, W0: Tensor) -> FactoredWeight:
        return FactoredWeight(W0, self.B.double(), self.A[:, : W0.shape[1]].double())


FACTORED = 4  # an update is kept in factors while its rank is at most this part of the shorter side


def _worth_factors(rank: int, W0: Tensor) -> bool:
    return FACTORED * rank <= min(W0.shape)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: dW = scaling · (B1·A1) ⊙ (B2·A2); Hyeon-Woo et al. 2021, arXiv 2108.06098.

    B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n) in float64.  Its rank is at most r1·r2: row i of the left factor is
    kron(B1[i], B2[i]), and likewise the columns of the right one.
    """

    B1: Tensor
    A1: Tensor
    B2: Tensor
    A2: Tensor
    scaling: float

    def tuned(self, W0: Tensor) -> TunedWeight:
        if _worth_factors(self.A1.shape[0] * self.A2.shape[0], W0):
            B = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)
            A = (self.A1[:, None, :] * self.A2[None, :, :]).flatten(0, 1)
            return FactoredWeight(W0, B * self.scaling, A)

        def block(rows: slice) -> Tensor:
            return W0[rows].double() + self.scaling * (self.B1[rows] @ self.A1) * (self.B2[rows] @ self.A2)

        return computed(W0, block)


def _kron(X: Tensor, Y: Tensor) -> Tensor:
    """The Kronecker product of two matrices; torch.kron fails on transposed vectors (2.13)."""
    product = X[:, None, :, None] * Y[None, :, None, :]
    return product.reshape(X.shape[0] * Y.shape[0], X.shape[1] * Y.shape[1])


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: dW = scaling · kron(B1·A1, B2·A2), float64, with m and n the products of the sides; arXiv 2309.14859."""

    B1: Tensor
    A1: Tensor
    B2: Tensor
    A2: Tensor
    scaling: float

    def tuned(self, W0: Tensor) -> TunedWeight:
        if _worth_factors(self.A1.shape[0] * self.A2.shape[0], W0):
            return FactoredWeight(W0, _kron(self.B1, self.B2) * self.scaling, _kron(self.A1, self.A2))
        first, second = self.B1 @ self.A1, self.B2 @ self.A2
        places = torch.arange(W0.shape[0], device=W0.device)
        outer, inner = places // second.shape[0], places % second.shape[0]

        def block(rows: slice) -> Tensor:
            product = first[outer[rows], :, None] * second[inner[rows], None, :]
            return W0[rows].double() + self.scaling * product.flatten(1)

        return computed(W0, block)


@dataclass(frozen=True, eq=False)
class Added:
    """W1 = W0 + dW with dW (m, n) whole, in float64; ``free`` where each of its entries was trained by itself."""

    dW: Tensor
    free: bool = False

    def tuned(self, W0: Tensor) -> DenseWeight:
        made = computed(W0, lambda rows: W0[rows].double() + self.dW[rows])
        return DenseWeight(W0, made.W1, self.free)


@dataclass(frozen=True, eq=False)
class Scaled:
    """IA3: W1 = diag(rows)·W0 or W0·diag(columns); Liu et al. 2022, arXiv 2205.05638.

    One of ``rows`` (m,) and ``columns`` is given, in float64; a column of a convolution's channel is one of all that
    the channel has, so that there may be a divisor of n of them.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def tuned(self, W0: Tensor) -> TunedWeight:
        if self.rows is not None:
            nothing = torch.zeros(1, dtype=torch.float64, device=W0.device)
            return FactoredWeight(W0, nothing.expand(W0.shape[0], 1), nothing.expand(1, W0.shape[1]), self.rows)
        assert self.columns is not None
        columns = self.columns.repeat_interleave(W0.shape[1] // self.columns.numel())
        return computed(W0, lambda rows: W0[rows].double() * columns)


@dataclass(frozen=True, eq=False)
class Rotated:
    """OFT: W1 = W0·Rᵀ, with R block-diagonal; Qiu et al. 2023, arXiv 2306.07280.

    ``blocks`` (b, d, d) in float64, or (1, d, d) where all blocks are that one.  With ``output`` it is Rᵀ·W0 instead,
    as for embeddings.
    """

    blocks: Tensor
    output: bool = False

    def tuned(self, W0: Tensor) -> DenseWeight:
        m, n = W0.shape
        d = self.blocks.shape[-1]
        if not self.output:
            turns = self.blocks.expand(n // d, d, d)
            return computed(
                W0,
                lambda rows: torch.einsum("mbj,bij->mbi", W0[rows].double().reshape(-1, n // d, d), turns).flatten(1),
            )
        whole = torch.empty_like(W0, memory_format=torch.contiguous_format)
        turns = self.blocks.expand(m // d, d, d)
        for columns in slabs(n):
            part = W0[:, columns].double().reshape(m // d, d, -1)
            whole[:, columns] = torch.einsum("bji,bjn->bin", turns, part).flatten(0, 1).to(W0.dtype)
        return DenseWeight(W0, whole, free=False)


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """Trainable tokens: W1 = W0 with some rows replaced, or with ``columns`` some columns, as of an embedding (d, V).

    ``places`` (k,) are their numbers, those beyond W0's left out; ``rows`` (k, d) their values, float64.
    """

    places: Tensor
    rows: Tensor
    columns: bool = False

    def tuned(self, W0: Tensor) -> TunedWeight:
        W = W0.T if self.columns else W0
        there = self.places < W.shape[0]
        places, rows = self.places[there], self.rows[there]
        if not _worth_factors(places.numel(), W0):
            whole = W0.clone()
            (whole.T if self.columns else whole)[places] = rows.to(W0.dtype)
            return DenseWeight(W0, whole, free=False)
        chosen = torch.zeros(W.shape[0], places.numel(), dtype=torch.float64, device=W0.device)
        chosen[places, torch.arange(places.numel(), device=W0.device)] = 1
        change = rows - W[places].double()
        return FactoredWeight(W0, change.T, chosen.T) if self.columns else FactoredWeight(W0, chosen, change)


@dataclass(frozen=True, eq=False)
class Butterfly:
    """BOFT: W1 = diag(scale)·W0·Rᵀ, R = F_k … F_1 with F = P·blockdiag·Pᵀ; Liu et al. 2023, arXiv 2311.06243.

    ``blocks`` (factors, b, d, d) and ``scale`` (m,) in float64; each of ``orders`` (n,) is a P, as row i's column.
    """

    blocks: Tensor
    orders: tuple[Tensor, ...]
    scale: Tensor

    def tuned(self, W0: Tensor) -> DenseWeight:
        _, count, d, _ = self.blocks.shape

        def block(rows: slice) -> Tensor:
            part = W0[rows].double()
            for turns, order in zip(self.blocks, self.orders, strict=True):
                sorted_part = torch.empty_like(part)
                sorted_part[:, order] = part
                turned = torch.einsum("mbj,bij->mbi", sorted_part.reshape(-1, count, d), turns)
                part = turned.flatten(1)[:, order]
            return self.scale[rows, None] * part

        return computed(W0, block)
