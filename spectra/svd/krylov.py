"""The Krylov engine: verdicts on a low-rank update without any decomposition of the base.

One block Lanczos process on M = W0·W0ᵀ serves both sides.  Its start block holds the ranges of B and
of W0·Aᵀ, so in its basis the tuned operator W1·W1ᵀ differs from the base's tridiagonal T in the first
block alone: T gives base Ritz pairs, T + corner the top of the tuned spectrum.

*Not an intruder*: a converged Ritz vector of W0 whose cosine with y, less the error of both, is at
least epsilon.  *Intruder*: for every λ and every z in the Krylov space,

    |⟨y, x⟩| ≤ ‖y − (M − λ)z‖      (x any unit eigenvector of M at λ: ⟨(M − λ)z, x⟩ = 0)

and moving λ by t changes the right side by at most t·‖z‖, so finitely many λ cover the whole
spectrum.  The residual is evaluated from the projected problem in float64, plus the measured rounding
‖F‖·‖z‖ of the Lanczos relation; what remains is "up to rounding".  A residual proves a singular value,
not that none above or beside it was missed: that holds with probability one over the random start.

Whatever this cannot decide goes to the exact engine, so its verdicts are the exact engine's.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectra.svd.engine import Comparison, Match, Question
from spectra.svd.exact import ExactBase, ExactEngine
from spectra.svd.matching import BORDERLINE
from spectra.svd.spectrum import CLUSTER_WIDTH, EPS32, Side
from spectra.updates import TunedWeight

MAX_BLOCK = 64  # wider start blocks cost more than they save
RANDOM_COLUMNS = 8
FIRST_STEPS, MORE_STEPS, MAX_STEPS = 12, 4, 28  # trained-like weights of 1024 to 4096 took 12
FEWEST_STEPS = 8  # fewer have decided nothing
LARGEST_SHARE = 2  # the basis stays below half of the matrix; beyond, a full decomposition is as cheap
PROBES = 16
MAX_EVALUATIONS = 4000
DIRECTION_ERROR = 0.02  # how well a tuned vector must be known before it is judged


@dataclass(frozen=True)
class KrylovBase:
    """W0, and its exact decomposition for what the certificates leave open."""

    W0: Tensor
    side: Side
    exact: ExactBase


class KrylovEngine:
    """Block Lanczos with certificates; falls back to the exact engine layer by layer."""

    name = "krylov"

    def prepare(self, W0: Tensor, side: Side) -> KrylovBase:
        return KrylovBase(W0, side, ExactBase(W0, side))

    def compare(self, base: KrylovBase, tuned: TunedWeight, question: Question) -> Comparison:
        return self._certified(base, tuned, question) or ExactEngine().compare(base.exact, tuned, question)

    def _certified(self, base: KrylovBase, tuned: TunedWeight, question: Question) -> Comparison | None:
        factors = tuned.low_rank()
        if factors is None:
            return None
        W, (B, A) = base.W0, factors
        if question.side == "right":
            W, B, A = W.T, A.T, B.T
        p, q = W.shape
        width = _block_width(p, B.shape[1])
        most = min(MAX_STEPS, int(p / (LARGEST_SHARE * width)))
        if p > q or width > MAX_BLOCK or most < FEWEST_STEPS or question.top_k >= width:
            return None  # the null space of a tall W0 would hide what lies near 0
        lanczos = _Lanczos(W, B, A, width)
        for steps in range(min(FIRST_STEPS, most), most + 1, MORE_STEPS):
            if not lanczos.extend(steps):
                return None
            verdict = _Verdict(lanczos, question)
            if verdict.is_hopeless:
                return None
            if verdict.is_complete():
                return verdict.comparison()
        return None


def _block_width(p: int, rank: int) -> int:
    """2r columns for the update and some random ones; a multiple of 16 where products are large."""
    width = 2 * rank + RANDOM_COLUMNS
    return -(-width // 16) * 16 if p >= 512 else width


class _Lanczos:
    """Block Lanczos on M = W·Wᵀ with full reorthogonalisation, done twice."""

    def __init__(self, W: Tensor, B: Tensor, A: Tensor, width: int):
        self.W, self.A, self.B, self.width = W, A, B, width
        seed = zlib.crc32(A.cpu().numpy().tobytes())
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(W.shape[0], width - 2 * B.shape[1], generator=generator, dtype=torch.float64)
        start = torch.cat([B, (W @ A.T.to(W.dtype)).double(), random.to(W.device)], 1)
        start = start / start.norm(dim=0).clamp_min(1e-300)
        self.P = torch.linalg.qr(start).Q.to(W.dtype)  # columns are added as it grows
        self.diagonal: list[Tensor] = []
        self.below: list[Tensor] = []

    def extend(self, steps: int) -> bool:
        """Goes on to ``steps`` blocks; False where the basis breaks down."""
        while len(self.diagonal) < steps:
            b = self.width
            last = self.P[:, -b:]
            image = self.W @ (self.W.T @ last)
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
        b, steps = self.width, len(self.diagonal)
        T = torch.zeros(b * steps, b * steps, dtype=torch.float64, device=self.P.device)
        for j in range(steps):
            here = slice(j * b, (j + 1) * b)
            T[here, here] = self.diagonal[j]
            if j + 1 < steps:
                there = slice((j + 1) * b, (j + 2) * b)
                T[there, here] = self.below[j]
                T[here, there] = self.below[j].T
        return T

    def corner(self) -> Tensor:
        """What the update adds to the first block of T: W1W1ᵀ = M + F·Bᵀ + B·Fᵀ + B·A·Aᵀ·Bᵀ, F = W·Aᵀ."""
        first = self.P[:, : self.width].double()
        E = first.T @ self.B
        F = first.T @ (self.W @ self.A.T.to(self.W.dtype)).double()
        mixed = F @ E.T
        added: Tensor = mixed + mixed.T + E @ (self.A @ self.A.T) @ E.T
        return added

    def rounding(self, T: Tensor) -> float:
        """An upper estimate of ‖F‖₂ in M·P = P·T + P₊·B₊·Eᵀ + F, from random combinations."""
        d, b = T.shape[0], self.width
        generator = torch.Generator().manual_seed(d)
        probes = torch.linalg.qr(torch.randn(d, PROBES, generator=generator, dtype=torch.float64)).Q.to(T.device)
        Y = self.basis @ probes.to(self.P.dtype)
        image = (self.W @ (self.W.T @ Y)).double()
        expected = torch.cat([T @ probes, self.below[-1] @ probes[-b:]])
        lost = image - self.P.double() @ expected
        return 2 * float(lost.norm()) * float(np.sqrt(d / PROBES))

    def tuned_residuals(self, C: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(‖W1·W1ᵀ·y − θ·y‖, ‖y‖) of y = P·c, computed with the operator itself."""
        Y = (self.basis.double() @ C).to(self.P.dtype)
        A, B = self.A.to(Y.dtype), self.B.to(Y.dtype)
        right = self.W.T @ Y + A.T @ (B.T @ Y)
        image = self.W @ right + B @ (A @ right)
        return (image.double() - Y.double() * values).norm(dim=0), Y.double().norm(dim=0)


def _orthonormal(X: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) by Cholesky QR in float64; Q is None where the columns are dependent."""
    X64 = X.double()
    R, info = torch.linalg.cholesky_ex(X64.T @ X64, upper=True)
    diagonal = R.diagonal()
    if int(info) or float(diagonal.min()) <= 1e-5 * float(diagonal.max()):
        return None, R
    return torch.linalg.solve_triangular(R, X64, upper=True, left=False).to(X.dtype), R


class _Verdict:
    """What a Lanczos space says of the top vectors of W1."""

    def __init__(self, lanczos: _Lanczos, question: Question):
        self.question = question
        k, b = question.top_k, lanczos.width
        T = lanczos.projected()
        tuned = T.clone()
        tuned[:b, :b] += lanczos.corner()
        values, vectors = torch.linalg.eigh(tuned)
        values, vectors = values.flip(0), vectors.flip(1)
        C = vectors[:, :k]
        self.theta, self.Q = torch.linalg.eigh(T)
        self.top = float(self.theta[-1])
        self.rounding = lanczos.rounding(T)
        residuals, lengths = lanczos.tuned_residuals(C, values[:k])
        next_residual = float((lanczos.below[-1] @ vectors[-b:, k]).norm()) + self.rounding
        self.tuned_values = values[: k + 1]
        self.sigma = values[:k].clamp_min(0).sqrt()
        largest = float(values[0])
        spread = values[:k] - values[1 : k + 1]
        above = torch.cat([torch.tensor([np.inf], dtype=torch.float64, device=values.device), spread[:-1]])
        gap = torch.minimum(above, spread) - residuals.max() - next_residual
        self.direction_error = torch.where(gap > 0, np.sqrt(2) * residuals / gap.clamp_min(1e-300), 1.0)
        self.direction_error += (lengths - 1).abs()
        self.residual = float(residuals.max()) / largest if largest > 0 else 0.0
        # Ties and null space are the exact engine's business: no polynomial resolves them.
        cluster = 4 * CLUSTER_WIDTH * largest
        tolerance = (2 * max(lanczos.W.shape) * EPS32) ** 2
        self.is_hopeless = (
            not bool(torch.isfinite(values).all())
            or self.top <= 0
            or float(spread.min()) <= cluster
            or float(values[k - 1]) <= tolerance * largest
        )
        self.G = lanczos.below[-1] @ self.Q[-b:]  # B₊ times the last rows of the Ritz vectors
        self.C = self.Q.T @ C
        self._judge_by_ritz(tolerance)

    def _judge_by_ritz(self, tolerance: float) -> None:
        """Lower bounds from converged Ritz vectors of W0."""
        theta, error = self.theta, self.G.norm(dim=0) + self.rounding
        infinite = torch.tensor([np.inf], dtype=torch.float64, device=theta.device)
        spread = theta[1:] - theta[:-1]
        gap = torch.minimum(torch.cat([infinite, spread]), torch.cat([spread, infinite])) - error
        # A Ritz vector whose neighbours have not converged may have company: count their error too.
        neighbours = torch.maximum(torch.cat([error[1:], error[-1:]]), torch.cat([error[:1], error[:-1]]))
        gap = gap - neighbours
        sine = torch.where(gap > 0, error / gap.clamp_min(1e-300), 1.0).clamp_max(1.0)
        sine = torch.where(theta > tolerance * self.top, sine, 1.0)
        cosines = self.C.abs().clamp_max(1.0)
        inside = (1 - sine**2).sqrt()[:, None]
        lower = cosines * inside - (1 - cosines**2).sqrt() * sine[:, None]
        self.lower, self.best = lower.max(0)
        self.lower = (self.lower - self.direction_error).clamp_min(0)
        columns = torch.arange(cosines.shape[1], device=cosines.device)
        self.cosine = cosines[self.best, columns]
        reach = self.cosine + sine[self.best] + self.direction_error
        # With a cosine above √½ no other base vector can be closer.
        self.upper = torch.where(self.lower**2 > 0.5, reach.clamp_max(1.0), 1.0)
        self.known = self.direction_error <= DIRECTION_ERROR
        self.not_intruder = self.known & (self.lower >= self.question.epsilon + BORDERLINE)
        self.intruder = torch.zeros_like(self.not_intruder)

    def is_complete(self) -> bool:
        """Whether every vector is decided; marches along the spectrum for those that Ritz left open."""
        open_ones = torch.nonzero(~self.not_intruder).flatten()
        if not bool(self.known.all()):
            return False
        for j in open_ones.tolist():
            if not self._is_certified(j):
                return False
            self.intruder[j] = True
        return True

    def _is_certified(self, j: int) -> bool:
        """Whether the residual bound is below epsilon for every λ from 0 to beyond ‖W0‖²."""
        slack = self.question.epsilon - BORDERLINE - float(self.direction_error[j])
        c = self.C[:, j]
        # Beyond this, z = −y/λ alone gives ‖M·y‖/λ < slack.
        image = torch.cat([self.theta * c, self.G @ c]).norm()
        end = max((float(image) + self.rounding) / max(slack, 1e-9), self.top) * (1 + 1e-9)
        pending = torch.linspace(0, 1, 64, dtype=torch.float64, device=c.device) ** 2 * end
        starts: list[Tensor] = []
        stops: list[Tensor] = []
        evaluated = 0
        while pending.numel():
            evaluated += int(pending.numel())
            residual, size = self._residual(pending, c)
            # A cluster's whole mass is bounded once its width is allowed for.
            reach = (slack - residual) / size - 2 * CLUSTER_WIDTH * self.top
            if evaluated > MAX_EVALUATIONS or not bool((reach > 0).all()):
                return False
            starts.append(pending - reach)
            stops.append(pending + reach)
            pending = _uncovered(torch.cat(starts), torch.cat(stops), end)
        return True

    def _residual(self, lam: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(‖y − (M − λ)z‖, ‖z‖) at each λ for a z that nearly minimises it; true for any z."""
        shift = self.theta[None] - lam[:, None]  # (L, d)
        damping = max(10 * self.rounding, 1e-12 * self.top)  # keeps ‖z‖ in bounds near an eigenvalue
        weight = 1 / (shift**2 + damping**2)
        Gw = self.G[None] * weight[:, None, :]
        small = torch.eye(self.G.shape[0], dtype=torch.float64, device=c.device) + Gw @ self.G.T
        right = shift * c
        v = weight * (right - torch.linalg.solve(small, Gw @ right[:, :, None])[:, :, 0] @ self.G)
        inside = (c - shift * v).square().sum(1)
        outside = (v @ self.G.T).square().sum(1)
        size = v.norm(dim=1).clamp_min(1e-300)
        return (inside + outside).sqrt() + self.rounding * size, size

    def comparison(self) -> Comparison:
        """The matches of every vector; cosines only where they are known to 1e-4."""
        matches = []
        for j in range(self.question.top_k):
            intruder = bool(self.intruder[j])
            lower = float(self.lower[j])
            upper = self.question.epsilon - BORDERLINE if intruder else float(self.upper[j])
            exact = not intruder and upper - lower <= 1e-4
            theta = float(self.theta[self.best[j]])
            matches.append(
                Match(
                    index=j,
                    sigma=float(self.sigma[j]),
                    max_cosine=min(float(self.cosine[j]), upper) if exact else None,
                    bounds=(min(lower, upper), upper),
                    base_index=None,
                    base_sigma=None if intruder else float(np.sqrt(max(theta, 0.0))),
                    base_capture=None,
                    decided_by="certificate",
                )
            )
        return Comparison(
            matches=tuple(matches),
            engine="krylov",
            base_norm_spectral=float(np.sqrt(self.top)),
            residual=self.residual,
            orthogonality=None,
            settled_in_float64=False,
            methods=("block lanczos",),
        )


def _uncovered(starts: Tensor, stops: Tensor, end: float) -> Tensor:
    """Midpoints of what the intervals leave open of [0, end]."""
    order = starts.argsort()
    starts, stops = starts[order], stops[order]
    reached = torch.cummax(stops, 0).values
    left = torch.cat([reached.new_zeros(1), reached]).clamp(0, end)
    right = torch.cat([starts, starts.new_tensor([end])]).clamp(0, end)
    open_ones = right > left
    return (left[open_ones] + right[open_ones]) / 2
