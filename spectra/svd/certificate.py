"""Verdicts on single vectors from a Krylov space of W0, without its decomposition.

For M = W·Wᵀ (p × p), any unit eigenvector x at λ and *every* z:

    |⟨x, y⟩| ≤ ‖y − (M − λ)z‖            (because ⟨x, (M − λ)z⟩ = 0)

and moving λ by t changes the right side by at most t·‖z‖, so finitely many λ cover the whole spectrum.
The residual is evaluated from the projected problem in float64, plus the measured rounding ‖F‖·‖z‖ of
the Lanczos relation; what remains is "up to rounding".  The other way round, a converged Ritz vector of
W0 whose cosine with y, less the error of both, is at least epsilon shows a base vector close by.

On the longer side, where W0's singular vectors are Wᵀx/σ, a vector y is represented by h = W·y, and
⟨Wᵀx/σ, y⟩ = ⟨x, h⟩/σ: the same bounds, divided by √λ.  They cannot reach λ = 0, so there the spectrum's
lower end must be proven (:meth:`Base.has_no_eigenvalue_below`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.svd.base import Base
from spectra.svd.decompose import eigh
from spectra.svd.engine import Match, Question
from spectra.svd.lanczos import BlockLanczos, Leading
from spectra.svd.matching import BORDERLINE
from spectra.svd.spectrum import CLUSTER_WIDTH, EPS32

MAX_EVALUATIONS = 4000
DIRECTION_ERROR = 0.02  # how well a tuned vector must be known before it is judged
RESOLVED = 0.5  # sine of the error of a Ritz vector that has begun to converge
SAFE_FLOOR = 0.25  # of the smallest Ritz value: where the spectrum is supposed to end
LEAST_FLOOR = 1e-5  # of ‖M‖: a float32 Gram matrix proves nothing below


class Certificate:
    """What a Lanczos space of W0 says of the leading vectors of W1.

    ``X`` (p, k) stands for them: W1's vectors themselves, or W times those of the longer side.
    """

    def __init__(self, base: Base, lanczos: BlockLanczos, X: Tensor, leading: Leading, question: Question):
        self.base, self.leading, self.question = base, leading, question
        T = lanczos.projected()
        self.theta, self.Q = eigh(T)
        self.top = float(self.theta[-1])
        self.rounding = lanczos.rounding(T)
        self.G = lanczos.below[-1] @ self.Q[-lanczos.width :]  # B₊ times the last rows of the Ritz vectors
        coordinates = (lanczos.P.T @ X.to(lanczos.P.dtype)).double()
        self.lost = (X.double() - lanczos.P.double() @ coordinates).norm(dim=0)
        d = T.shape[0]
        self.C, self.outside = self.Q.T @ coordinates[:d], coordinates[d:]
        self.aligned = base.is_aligned
        self.direction_error = leading.direction_errors(self.aligned)
        self.known = self.direction_error <= DIRECTION_ERROR
        self._judge_by_ritz()

    def _judge_by_ritz(self) -> None:
        """Lower bounds from converged Ritz vectors of W0."""
        theta, error = self.theta, self.G.norm(dim=0) + self.rounding
        infinite = theta.new_tensor([torch.inf])
        spread = theta[1:] - theta[:-1]
        gap = torch.minimum(torch.cat([infinite, spread]), torch.cat([spread, infinite])) - error
        # A Ritz vector whose neighbours have not converged may have company: count their error too.
        neighbours = torch.maximum(torch.cat([error[1:], error[-1:]]), torch.cat([error[:1], error[:-1]]))
        gap = gap - neighbours
        sine = torch.where(gap > 0, error / gap.clamp_min(1e-300), 1.0).clamp_max(1.0)
        # Lanczos resolves a spectrum from its upper end.  Below the first pair that has not converged, and in the
        # last block, a Ritz value may stand for many singular values at once, however small its residual.
        resolved = (sine < RESOLVED).flip(0).cummin(0).values.flip(0)
        resolved[: self.G.shape[0]] = False
        tolerance = (2 * max(self.base.W.shape) * EPS32) ** 2
        sine = torch.where(resolved & (theta > tolerance * self.top), sine, 1.0)[:, None]
        size = (self.C.square().sum(0) + self.outside.square().sum(0)).sqrt()
        overlap = torch.minimum(self.C.abs(), size)
        rest = (size**2 - overlap**2).clamp_min(0).sqrt()
        lower = overlap * (1 - sine**2).sqrt() - rest * sine - self.lost
        if not self.aligned:
            lower = lower / (theta + error).clamp_min(1e-300).sqrt()[:, None]
        self.lower, self.best = lower.max(0)
        self.lower = (self.lower - self.direction_error).clamp(0, 1)
        columns = torch.arange(overlap.shape[1], device=overlap.device)
        self.cosine = overlap[self.best, columns]
        reach = self.cosine + size * sine[self.best, 0] + self.lost
        if not self.aligned:
            self.cosine = self.cosine / theta[self.best].clamp_min(1e-300).sqrt()
            least = (theta - error)[self.best]
            reach = torch.where(least > 0, reach / least.clamp_min(1e-300).sqrt(), 1.0)
        reach = reach + self.direction_error
        self.cosine = self.cosine.clamp_max(1.0)
        # With a cosine above √½ no other base vector can be closer.
        self.upper = torch.where(self.lower**2 > 0.5, reach.clamp_max(1.0), 1.0)
        self.not_intruder = self.known & (self.lower >= self.question.epsilon + BORDERLINE)
        self.intruder = torch.zeros_like(self.not_intruder)

    def is_complete(self) -> bool:
        """Whether every vector is decided; marches along the spectrum for those that Ritz left open."""
        if not bool(self.known.all()):
            return False
        open_ones = torch.nonzero(~self.not_intruder).flatten().tolist()
        floor = 0.0
        if open_ones and not self.aligned:
            floor = max(SAFE_FLOOR * float(self.theta[0]), 0.0)
            if floor < LEAST_FLOOR * self.top:
                return False
        for j in open_ones:
            if not self._is_certified(j, floor):
                return False
        if floor and not self.base.has_no_eigenvalue_below(floor):
            return False
        self.intruder[open_ones] = True
        return True

    def _is_certified(self, j: int, floor: float) -> bool:
        """Whether the bound is below epsilon for every λ from ``floor`` to beyond ‖W0‖²."""
        slack = self.question.epsilon - BORDERLINE - float(self.direction_error[j])
        if slack <= 0:
            return False
        c, out = self.C[:, j], self.outside[:, j]
        end = self._end(c, out, slack, float(self.lost[j]))
        pending = floor + torch.linspace(0, 1, 64, dtype=torch.float64, device=c.device) ** 2 * (end - floor)
        starts: list[Tensor] = []
        stops: list[Tensor] = []
        evaluated = 0
        while pending.numel():
            evaluated += int(pending.numel())
            residual, size = self.residual(pending, c, out)
            residual = residual + self.lost[j]
            if self.aligned:
                left = right = (slack - residual) / size
            else:  # √(λ − t) ≥ √λ − t/√λ
                root = pending.sqrt()
                room = slack * root - residual
                left, right = room / (size + slack / root), room / size
            # A cluster's whole mass is bounded once its width is allowed for.
            left, right = left - 2 * CLUSTER_WIDTH * self.top, right - 2 * CLUSTER_WIDTH * self.top
            if evaluated > MAX_EVALUATIONS or not bool((left > 0).all()):
                return False
            starts.append(pending - left)
            stops.append(pending + right)
            pending = _uncovered(torch.cat(starts), torch.cat(stops), floor, end)
        return True

    def _end(self, c: Tensor, out: Tensor, slack: float, lost: float) -> float:
        """A λ beyond which z = −y/λ alone is enough: ‖M·y‖/λ (over √λ on the longer side) < slack.

        M times the part outside the basis is at most ‖M‖ times its length, and 2·θ₁ stands for ‖M‖,
        which the largest Ritz value has reached to a few digits by then.
        """
        outside = float(out.norm()) + lost
        image = float(torch.cat([self.theta * c, self.G @ c]).norm()) + self.rounding + 2 * self.top * outside
        end = image / slack if self.aligned else (image / slack) ** (2 / 3)
        return max(end, self.top) * (1 + 1e-9)

    def residual(self, lam: Tensor, c: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """(‖y − (M − λ)z‖, ‖z‖) at each λ for a z that nearly minimises it; true for any z.

        y has the coordinates ``c`` on the Ritz vectors and ``out`` on the block that closes the basis.
        """
        shift = self.theta[None] - lam[:, None]  # (L, d)
        damping = max(10 * self.rounding, 1e-12 * self.top)  # keeps ‖z‖ in bounds near an eigenvalue
        weight = 1 / (shift**2 + damping**2)
        Gw = self.G[None] * weight[:, None, :]
        small = torch.eye(self.G.shape[0], dtype=torch.float64, device=c.device) + Gw @ self.G.T
        right = shift * c + out @ self.G
        # Where rounding makes it singular the bound becomes NaN, and certifies nothing.
        solved, _ = torch.linalg.solve_ex(small, Gw @ right[:, :, None])
        v = weight * (right - solved[:, :, 0] @ self.G)
        inside = (c - shift * v).square().sum(1)
        outside = (out - v @ self.G.T).square().sum(1)
        size = v.norm(dim=1).clamp_min(1e-300)
        return (inside + outside).sqrt() + self.rounding * size, size

    def matches(self) -> tuple[Match, ...]:
        """The verdict on every vector; cosines only where they are known to 1e-4."""
        found = []
        for j in range(self.leading.k):
            intruder = bool(self.intruder[j])
            lower = float(self.lower[j])
            upper = self.question.epsilon - BORDERLINE if intruder else float(self.upper[j])
            exact = not intruder and upper - lower <= 1e-4
            found.append(
                Match(
                    index=j,
                    sigma=float(self.leading.sigma[j]),
                    max_cosine=min(float(self.cosine[j]), upper) if exact else None,
                    bounds=(min(lower, upper), upper),
                    base_index=None,
                    base_sigma=None if intruder else float(self.theta[self.best[j]].clamp_min(0).sqrt()),
                    base_capture=None,
                    decided_by="certificate",
                )
            )
        return tuple(found)


def _uncovered(starts: Tensor, stops: Tensor, begin: float, end: float) -> Tensor:
    """Midpoints of what the intervals leave open of [begin, end]."""
    order = starts.argsort()
    starts, stops = starts[order], stops[order]
    reached = torch.cummax(stops, 0).values
    left = torch.cat([reached.new_tensor([begin]), reached]).clamp(begin, end)
    right = torch.cat([starts, starts.new_tensor([end])]).clamp(begin, end)
    open_ones = right > left
    return (left[open_ones] + right[open_ones]) / 2
