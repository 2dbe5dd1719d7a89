"""Block Lanczos with full reorthogonalisation, and the leading singular vectors of W1 from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spectra.svd.base import Base
from spectra.svd.decompose import leading_eigenpairs, singular_values
from spectra.svd.perturbation import GUARDS as MIXED
from spectra.svd.perturbation import direction_bounds
from spectra.svd.spectrum import CLUSTER_WIDTH, EPS32
from spectra.updates.algebra import ALL, TunedWeight, slabs
from spectra.updates.products import times

PROBES = 16
GUARDS = 6  # vectors beyond the top k that keep the last of them from converging slowly
MULTIPLE = 16  # of columns, where products are large: others are up to five times slower per column
LARGE = 512
FIRST_STEPS, MAX_STEPS = 4, 96
GROWTH = 1.25  # from one look at the projected problem to the next, whose cost grows with the cube
FORESIGHT = 1.5  # as far as anything seen at one look says when the next will do
ROUNDING = 1e-7  # of ‖M‖, about what float32 leaves of each residual
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
        self._columns = torch.linalg.qr(start).Q.to(dtype)  # room for more than are filled
        self._filled = self.width
        self.diagonal: list[Tensor] = []
        self.below: list[Tensor] = []

    @property
    def P(self) -> Tensor:
        """(p, b·(steps + 1)), a view: the basis and the block that closes the Lanczos relation."""
        filled: Tensor = self._columns[:, : self._filled]
        return filled

    @property
    def steps(self) -> int:
        return len(self.diagonal)

    def extend(self, steps: int) -> bool:
        """Goes on to ``steps`` blocks; False where the basis breaks down."""
        while self.steps < steps:
            P = self.P
            # Twice against the whole basis, before and after the columns are made orthonormal.
            image = self.gram(P[:, -self.width :])
            weights = P.T @ image
            block, first = _orthonormal(image - P @ weights)
            if block is None:
                return False
            more = P.T @ block
            block, second = _orthonormal(block - P @ more)
            if block is None:
                return False
            inner = weights[-self.width :].double() + more[-self.width :].double() @ first
            self.diagonal.append((inner + inner.T) / 2)
            self.below.append(second @ first)
            self._append(block, steps)
        return True

    def _append(self, block: Tensor, steps: int) -> None:
        b = self.width
        if self._filled + b > self._columns.shape[1]:
            # One block more than is needed: rows whose length is a power of two share their places in the cache.
            room = self._columns.new_empty(self._columns.shape[0], b * (steps + 2))
            room[:, : self._filled] = self.P
            self._columns = room
        self._columns[:, self._filled : self._filled + b] = block
        self._filled += b

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
    return (X64 @ torch.linalg.inv(R)).to(X.dtype), R


def random_columns(p: int, count: int, seed: int) -> Tensor:
    """(p, count) normal numbers, float64, the same for the same seed."""
    return torch.randn(p, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(columns: int, p: int) -> int:
    """The next width at which products are fast."""
    return -(-columns // MULTIPLE) * MULTIPLE if p >= LARGE else columns


class Looks:
    """After how many steps to look at the projected problem next, while the basis is at most p/share columns.

    ``next`` is None where there is no room for more.
    """

    def __init__(self, first: int, p: int, width: int, share: float):
        self.most = min(MAX_STEPS, int(p / (share * width)))
        self.next = first if first <= self.most else None
        self._before: tuple[int, float] | None = None

    def wait(self, needed: float | None = None) -> None:
        """Puts the next look off: to about as many steps as are ``needed``, where something tells."""
        steps = self.next
        assert steps is not None
        if needed is None:
            after = max(steps + 2, int(steps * GROWTH))
        else:
            after = max(steps + 1, int(min(np.ceil(needed), steps * FORESIGHT)))
        self.next = after if after <= self.most else None

    def wait_for(self, bound: float, wanted: float, residual: float) -> None:
        """The same, for a ``bound`` below 1 that falls as the residuals do."""
        steps, before, needed = self.next, self._before, None
        assert steps is not None
        if wanted < bound < 1 and before is not None and 0 < residual < before[1]:
            rate = np.log(before[1] / residual) / (steps - before[0])
            needed = steps + np.log(bound / wanted) / rate
        self._before = (steps, residual)
        self.wait(needed)


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
class Ritz:
    """The leading singular vectors of W1 (turned), as far as a Krylov space holds them.

    Attributes
    ----------
    theta : (≥ k + 1,) float64, descending: σ², converged for the first k.
    lost : ‖W1·W1ᵀ·y − θ·y‖ of the first of these, more than k.
    Y : (p, k) of the working dtype, of unit length up to rounding.
    """

    theta: Tensor
    lost: Tensor
    Y: Tensor

    @property
    def k(self) -> int:
        return self.Y.shape[1]

    @property
    def residuals(self) -> Tensor:
        return self.lost[: self.k]

    @property
    def next_residual(self) -> float:
        """Of the pair after the top k."""
        return float(self.lost[self.k])

    @property
    def sigma(self) -> Tensor:
        return self.theta.clamp_min(0).sqrt()

    def direction_errors(self, aligned: bool) -> Tensor:
        """Bound on ‖ŷ − y‖ of each vector, at most 1: of Y itself, or else of W1ᵀ·y/σ."""
        return self._short_errors if aligned else self._long_errors

    @cached_property
    def _short_errors(self) -> Tensor:
        return self._errors(long=False)

    @cached_property
    def _long_errors(self) -> Tensor:
        return self._errors(long=True)

    def _errors(self, long: bool) -> Tensor:
        count = self.lost.numel()
        sine = direction_bounds(self.theta[:count].cpu().numpy(), self.lost.cpu().numpy(), self.k, long=long)
        length = (self.Y.double().norm(dim=0) - 1).abs()
        chord = torch.from_numpy(np.sqrt(2 - 2 * np.sqrt(1 - sine**2))).to(length.device)  # of that angle
        bound: Tensor = (chord + length).clamp_max(1.0)
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


@dataclass(frozen=True, eq=False)
class Leading(Ritz):
    """With what the operator itself makes of them.

    Attributes
    ----------
    half, image : W1ᵀ·Y (q, k) and W1·W1ᵀ·Y (p, k, float64).
    steps : of the process that they come from.
    weights : like ``theta``, the part of the start block along each Ritz vector (squares).
    """

    half: Tensor
    image: Tensor
    steps: int
    weights: Tensor


def residual_norms(lanczos: BlockLanczos, vectors: Tensor, k: int) -> Tensor:
    """Of the first k eigenvectors (by columns) of a projected problem and some more, by the Lanczos relation."""
    norms: Tensor = (lanczos.below[-1] @ vectors[-lanczos.width :, : k + MIXED + 1]).norm(dim=0)
    return norms


def worst_direction(theta: Tensor, lost: Tensor, k: int, aligned: bool) -> float:
    """The largest bound on the direction of the first k Ritz vectors; see :func:`direction_bounds`."""
    known = lost.cpu().numpy()
    return float(direction_bounds(theta[: known.size].cpu().numpy(), known, k, long=not aligned).max())


def ritz_leading(lanczos: BlockLanczos, values: Tensor, vectors: Tensor, turned: Turned, k: int) -> Leading:
    """From the leading eigenpairs (descending) of W1·W1ᵀ projected on the basis of ``lanczos``."""
    taken = min(padded(k, lanczos.P.shape[0]), values.numel() - 1)  # more of them take no longer
    Y = (lanczos.basis.double() @ vectors[:, :taken]).to(lanczos.P.dtype)
    half = turned.rmatmul(Y)
    image = turned.matmul(half).double()
    lost = residual_norms(lanczos, vectors, max(k, taken))
    measured = (image - Y.double() * values[:taken]).norm(dim=0)
    rounding = (measured - lost[:taken]).max().clamp_min(0)
    lost = torch.cat([measured, lost[taken:] + rounding])
    weights = vectors[: lanczos.width].square().sum(0)
    return Leading(values, lost, Y[:, :k], half[:, :k], image[:, :k], lanczos.steps, weights)


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
    looks = Looks(FIRST_STEPS, p, width, LARGEST_SHARE)
    while (steps := looks.next) is not None:
        if not lanczos.extend(steps):
            return None
        values, vectors = leading_eigenpairs(lanczos.projected())
        lost = residual_norms(lanczos, vectors, k) + ROUNDING * values[0]
        bound = worst_direction(values, lost, k, base.is_aligned)
        looks.wait_for(bound, accuracy, float(lost[:k].max()))
        if bound > accuracy:  # the operator itself would say no better
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
    start = random_columns(p, width, p).to(W.device)
    lanczos = BlockLanczos(lambda X: times(turned, times(turned.T, X)), start, W.dtype)
    looks = Looks(FIRST_STEPS, p, width, LARGEST_SHARE)
    while (steps := looks.next) is not None:
        looks.wait()
        if not lanczos.extend(steps):
            break
        values, vectors = leading_eigenpairs(lanczos.projected())
        # The error of a Ritz value is at most its residual, and near residual²/gap.
        if float((lanczos.below[-1] @ vectors[-width:, 0]).norm()) <= 1e-4 * float(values[0]):
            return float(values[0].sqrt())
    return float(singular_values(W)[0])
