"""Block Lanczos with full reorthogonalisation, and the leading singular vectors of W1 from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectra.svd.base import Base
from spectra.svd.decompose import eigh, singular_values
from spectra.svd.spectrum import CLUSTER_WIDTH, EPS32
from spectra.updates.algebra import ALL, TunedWeight, slabs

PROBES = 16
GUARDS = 6  # vectors beyond the top k that keep the last of them from converging slowly
MULTIPLE = 16  # of columns, where products are large: others are up to five times slower per column
LARGE = 512
FIRST_STEPS, MAX_STEPS = 4, 96
GROWTH = 1.25  # from one look at the projected problem to the next, whose cost grows with the cube
LARGEST_SHARE = 2  # the basis stays below half of the matrix; beyond, a full decomposition is as cheap


class BlockLanczos:
    """A basis P of the Krylov space of a symmetric operator, and its block tridiagonal T.

    Parameters
    ----------
    gram : X (p, b) to M·X, M positive semidefinite.
    start : (p, b), float64, made orthonormal; the first block.
    dtype : of the basis; T is float64.
    """

    def __init__(self, gram: Callable[[Tensor], Tensor], start: Tensor, dtype: torch.dtype):
        self.gram, self.width = gram, start.shape[1]
        start = start / start.norm(dim=0).clamp_min(1e-300)
        self.P = torch.linalg.qr(start).Q.to(dtype)  # columns are added as it grows
        self.diagonal: list[Tensor] = []
        self.below: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self.diagonal)

    def extend(self, steps: int) -> bool:
        """Goes on to ``steps`` blocks; False where the basis breaks down."""
        while self.steps < steps:
            b = self.width
            last = self.P[:, -b:]
            image = self.gram(last)
            inner = torch.zeros(b, b, dtype=torch.float64, device=last.device)
            for _ in range(2):
                weights = self.P.T @ image
                image = image - self.P @ weights
                inner += weights[-b:].double()
            block, first = _orthonormal(image)
            if block is None:
                return False
            block = block - self.P @ (self.P.T @ block)
            block, second = _orthonormal(block)
            if block is None:
                return False
            self.diagonal.append((inner + inner.T) / 2)
            self.below.append(second @ first)
            self.P = torch.cat([self.P, block], 1)
        return True

    @property
    def basis(self) -> Tensor:
        """P, without the block that only closes the Lanczos relation."""
        inner: Tensor = self.P[:, : -self.width]
        return inner

    def projected(self) -> Tensor:
        """T = Pᵀ M P, block tridiagonal, float64."""
        b = self.width
        T = torch.zeros(b * self.steps, b * self.steps, dtype=torch.float64, device=self.P.device)
        for j in range(self.steps):
            here = slice(j * b, (j + 1) * b)
            T[here, here] = self.diagonal[j]
            if j + 1 < self.steps:
                there = slice((j + 1) * b, (j + 2) * b)
                T[there, here] = self.below[j]
                T[here, there] = self.below[j].T
        return T

    def rounding(self, T: Tensor) -> float:
        """An upper estimate of ‖F‖₂ in M·P = P·T + P₊·B₊·Eᵀ + F, from random combinations."""
        d, b = T.shape[0], self.width
        generator = torch.Generator().manual_seed(d)
        probes = torch.linalg.qr(torch.randn(d, min(d, PROBES), generator=generator, dtype=torch.float64)).Q
        probes = probes.to(T.device)
        image = self.gram(self.basis @ probes.to(self.P.dtype)).double()
        expected = torch.cat([T @ probes, self.below[-1] @ probes[-b:]])
        lost = image - self.P.double() @ expected
        return 2 * float(lost.norm()) * float(np.sqrt(d / probes.shape[1]))


def _orthonormal(X: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) by Cholesky QR in float64; Q is None where the columns are dependent."""
    X64 = X.double()
    R, info = torch.linalg.cholesky_ex(X64.T @ X64, upper=True)
    diagonal = R.diagonal()
    if int(info) or float(diagonal.min()) <= 1e-5 * float(diagonal.max()):
        return None, R
    return torch.linalg.solve_triangular(R, X64, upper=True, left=False).to(X.dtype), R


def random_columns(p: int, count: int, seed: int) -> Tensor:
    """(p, count) normal numbers, float64, the same for the same seed."""
    return torch.randn(p, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(columns: int, p: int) -> int:
    """The next width at which products are fast."""
    return -(-columns // MULTIPLE) * MULTIPLE if p >= LARGE else columns


def schedule(first: int, p: int, width: int, share: float) -> Iterator[int]:
    """The numbers of steps after which to look, while a basis of that width is at most p/share columns."""
    most = min(MAX_STEPS, int(p / (share * width)))
    steps = first
    while steps <= most:
        yield steps
        steps = max(steps + 2, int(steps * GROWTH))


@dataclass(frozen=True, eq=False)
class Turned:
    """W1 turned as :attr:`Base.W` is: p × q with p ≤ q."""

    weight: TunedWeight
    left: bool

    def matmul(self, X: Tensor) -> Tensor:
        return self.weight.matmul(X) if self.left else self.weight.rmatmul(X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self.weight.rmatmul(Y) if self.left else self.weight.matmul(Y)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(B, A) of W1 = W + B·A where the update has that form, turned likewise."""
        factors = self.weight.low_rank()
        return factors if factors is None or self.left else (factors[1].T, factors[0].T)

    def rmatmul64(self, Y: Tensor) -> Tensor:
        """W1ᵀ·Y from exact entries, in float64."""
        parts = []
        for part in slabs(max(self.weight.shape)):
            block = self.weight.block(ALL, part) if self.left else self.weight.block(part, ALL).T
            parts.append(block.T @ Y.double())
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading singular vectors of W1 (turned), as far as a Krylov space holds them.

    Attributes
    ----------
    theta : (≥ k + 1,) float64, descending: σ², converged for the first k.
    Y : (p, k) of the working dtype, of unit length up to rounding.
    half, image : W1ᵀ·Y (q, k) and W1·W1ᵀ·Y (p, k, float64), by the operator itself.
    next_residual : of the pair after the top k.
    """

    theta: Tensor
    Y: Tensor
    half: Tensor
    image: Tensor
    next_residual: float

    @property
    def k(self) -> int:
        return self.Y.shape[1]

    @property
    def residuals(self) -> Tensor:
        """‖W1·W1ᵀ·y − θ·y‖ of each."""
        lost: Tensor = torch.linalg.vector_norm(self.image - self.Y.double() * self.theta[: self.k], dim=0)
        return lost

    @property
    def sigma(self) -> Tensor:
        return self.theta.clamp_min(0).sqrt()

    def direction_errors(self, aligned: bool) -> Tensor:
        """Bound on ‖ŷ − y‖ of each vector, at most 1: of Y itself, or else of W1ᵀ·y/σ (Davis & Kahan 1970)."""
        k, residuals = self.k, self.residuals
        length = (self.Y.double().norm(dim=0) - 1).abs()
        values, lost, next_lost = self.theta[: k + 1], residuals, self.next_residual
        if not aligned:
            values = values.clamp_min(0).sqrt()
            least = values[k - 1].clamp_min(1e-300)
            lost, next_lost = residuals / values[:k].clamp_min(1e-300), self.next_residual / float(least)
        spread = values[:k] - values[1:]
        above = torch.cat([spread.new_tensor([np.inf]), spread[:-1]])
        gap = torch.minimum(above, spread)
        if not aligned:
            gap = torch.minimum(gap, values[:k])
        gap = gap - lost.max() - next_lost
        error = torch.where(gap > 0, np.sqrt(2) * lost / gap.clamp_min(1e-300), 1.0)
        bound: Tensor = (error + length).clamp_max(1.0)
        return bound

    def is_degenerate(self, shape: tuple[int, int]) -> bool:
        """Ties among the top k, or null space: no polynomial resolves them."""
        k, values = self.k, self.theta
        if not bool(torch.isfinite(values).all()) or not float(values[0]) > 0:
            return True
        spread = values[:k] - values[1 : k + 1]
        tolerance = (2 * max(shape) * EPS32) ** 2
        tied = float(spread.min()) <= 4 * CLUSTER_WIDTH * float(values[0])
        return tied or float(values[k - 1]) <= tolerance * float(values[0])


def ritz_leading(lanczos: BlockLanczos, values: Tensor, vectors: Tensor, turned: Turned, k: int) -> Leading:
    """From the eigenpairs (descending) of W1·W1ᵀ projected on the basis of ``lanczos``."""
    Y = (lanczos.basis.double() @ vectors[:, :k]).to(lanczos.P.dtype)
    half = turned.rmatmul(Y)
    next_residual = float((lanczos.below[-1] @ vectors[-lanczos.width :, k]).norm())
    return Leading(values, Y, half, turned.matmul(half).double(), next_residual)


def leading_pairs(base: Base, tuned: TunedWeight, k: int, accuracy: float) -> Leading | None:
    """The k leading singular vectors of W1 by block Lanczos on W1·W1ᵀ, or None where that is hopeless.

    ``accuracy`` is asked of the direction of each vector.  That none was missed holds with
    probability one over the random start.
    """
    p = base.W.shape[0]
    width = padded(k + GUARDS, p)
    turned = Turned(tuned, base.short == "left")
    start = random_columns(p, width, p).to(base.W.device)
    lanczos = BlockLanczos(lambda X: turned.matmul(turned.rmatmul(X)), start, base.W.dtype)
    for steps in schedule(FIRST_STEPS, p, width, LARGEST_SHARE):
        if not lanczos.extend(steps):
            return None
        values, vectors = eigh(lanczos.projected())
        values, vectors = values.flip(0), vectors.flip(1)
        lost = (lanczos.below[-1] @ vectors[-width:, : k + 1]).norm(dim=0)
        gap = (values[:k] - values[1 : k + 1]).clamp_min(1e-300)
        gap[1:] = torch.minimum(gap[1:], gap[:-1].clone())
        if float((lost[:k] / gap).max()) > accuracy:  # the operator itself would say no better
            continue
        leading = ritz_leading(lanczos, values, vectors, turned, k)
        if leading.is_degenerate(tuned.shape):
            return None
        if float(leading.direction_errors(base.is_aligned).max()) <= 2 * accuracy + 1e-3:
            return leading
    return None


def spectral_norm(W: Tensor) -> float:
    """‖W‖₂ to four digits or better, by block Lanczos, or by all singular values where that does not get there."""
    turned = W if W.shape[0] <= W.shape[1] else W.T
    p = turned.shape[0]
    width = padded(GUARDS, p)
    lanczos = BlockLanczos(lambda X: turned @ (turned.T @ X), random_columns(p, width, p).to(W.device), W.dtype)
    for steps in schedule(FIRST_STEPS, p, width, LARGEST_SHARE):
        if not lanczos.extend(steps):
            break
        values, vectors = eigh(lanczos.projected())
        # The error of a Ritz value is at most its residual, and near residual²/gap.
        if float((lanczos.below[-1] @ vectors[-width:, -1]).norm()) <= 1e-4 * float(values[-1]):
            return float(values[-1].sqrt())
    return float(singular_values(W)[0])
