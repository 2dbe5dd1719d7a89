"""Verdicts on single vectors from a Krylov space of W0, without its decomposition.

For M = W·Wᵀ (p × p), any unit eigenvector x at λ and *every* z:

    |⟨x, y⟩| ≤ ‖y − (M − λ)z‖            (because ⟨x, (M − λ)z⟩ = 0)

and moving λ by t changes the right side by at most t·‖z‖, so finitely many λ cover the whole spectrum.
The residual is evaluated from the projected problem in float64, plus the measured rounding ‖F‖·‖z‖ of
the Lanczos relation; what remains is "up to rounding".

The other way round, a converged Ritz vector of W0 whose cosine with y, less the error of both, is at least
epsilon shows a base vector close by: its error is at most residual/η (Davis & Kahan 1970) if no other
eigenvalue lies within η, which the same residuals show, of random columns in the start block.

On the longer side, where W0's singular vectors are Wᵀx/σ, a vector y is represented by h = W·y, and
⟨Wᵀx/σ, y⟩ = ⟨x, h⟩/σ: the same bounds, divided by √λ.  They cannot reach λ = 0, so there the spectrum's
lower end must be proven (:meth:`Base.has_no_eigenvalue_below`).
"""

from __future__ import annotations

import numpy as np
import scipy.special  # not scipy.stats, whose import takes longer than many an audit
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
NEVER = 1e-5  # about the probability of missing a second singular vector beside a Ritz value
SAFE_FLOOR = 0.25  # of the smallest Ritz value: where the spectrum is supposed to end
LEAST_FLOOR = 1e-5  # of ‖M‖: a float32 Gram matrix proves nothing below


class Certificate:
    """What a Lanczos space of W0 says of the leading vectors of W1.

    ``X`` (p, k) stands for them: W1's vectors themselves, or W times those of the longer side.  ``random`` (p, c)
    are the normal columns of variance 1/p in the start block.
    """

    def __init__(
        self, base: Base, lanczos: BlockLanczos, X: Tensor, random: Tensor, leading: Leading, question: Question
    ):
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
        self.random = self.Q.T @ (lanczos.basis.T @ random.to(lanczos.P.dtype)).double()
        self.aligned = base.is_aligned
        self.direction_error = leading.direction_errors(self.aligned)
        self.known = self.direction_error <= DIRECTION_ERROR
        self._judge_by_ritz()

    def _judge_by_ritz(self) -> None:
        """Lower bounds from converged Ritz vectors of W0, for each vector from the one it resembles most."""
        error = self.G.norm(dim=0) + self.rounding
        size = (self.C.square().sum(0) + self.outside.square().sum(0)).sqrt()
        weight = self.C.abs() if self.aligned else self.C.abs() / self.theta.clamp_min(1e-300).sqrt()[:, None]
        tolerance = (2 * max(self.base.W.shape) * EPS32) ** 2
        weight[self.theta <= tolerance * self.top] = 0
        self.best = weight.argmax(0)
        theta, error = self.theta[self.best], error[self.best]
        radius = self._isolation(self.best)
        sine = torch.where(radius > 0, error / radius.clamp_min(1e-300), 1.0).clamp_max(1.0)
        overlap = torch.minimum(self.C.gather(0, self.best[None])[0].abs(), size)
        rest = (size**2 - overlap**2).clamp_min(0).sqrt()
        lower = overlap * (1 - sine**2).sqrt() - rest * sine - self.lost
        reach = overlap + size * sine + self.lost
        self.cosine = overlap
        if not self.aligned:
            least = theta - error
            lower = lower / (theta + error).clamp_min(1e-300).sqrt()
            reach = torch.where(least > 0, reach / least.clamp_min(1e-300).sqrt(), 1.0)
            self.cosine = overlap / theta.clamp_min(1e-300).sqrt()
        self.cosine = self.cosine.clamp_max(1.0)
        self.lower = (lower - self.direction_error).clamp(0, 1)
        # With a cosine above √½ no other base vector can be closer, unless it counts as one with its neighbours.
        alone = (self.lower**2 > 0.5) & (radius > 2 * CLUSTER_WIDTH * self.top + error)
        self.upper = torch.where(alone, (reach + self.direction_error).clamp_max(1.0), 1.0)
        self.not_intruder = self.known & (self.lower >= self.question.epsilon + BORDERLINE)
        self.intruder = torch.zeros_like(self.not_intruder)

    def _isolation(self, chosen: Tensor) -> Tensor:
        """How far around each of the ``chosen`` Ritz values W0 has no second singular vector; 0 where that is open.

        The distance to the next *Ritz* value would not do: where only y reaches into a bunch of eigenvalues,
        one Ritz vector stands for all of them, with a small residual.  But were there two eigenvectors within η
        of θ, some unit vector e of their span would be orthogonal to the Ritz vector, and its scalar product
        with a random column w (normal, variance 1/p) is itself normal; while, w' being w without
        its part along the Ritz vector, |⟨e, w'⟩| ≤ ‖w' − (M − θ)z‖ + η·‖z‖ for every z.  So η is what keeps the right
        side, over all c random columns, below what such a product is as good as never: χ² with c − 1 degrees
        of freedom, since the Ritz vector itself may lean on the columns in one direction.
        """
        lam, at = self.theta[chosen], torch.arange(chosen.numel(), device=chosen.device)
        mask = torch.ones(chosen.numel(), self.theta.numel(), dtype=torch.float64, device=chosen.device)
        mask[at, chosen] = 0
        residuals, sizes = [], []
        for w in self.random.T:
            residual, length = self.residual(lam, w * mask, torch.zeros_like(self.outside[:, 0]), mask)
            residuals.append(residual)
            sizes.append(length)
        residual, length = torch.stack(residuals), torch.stack(sizes)
        # ‖residual + η·length‖ over the columns ≤ limit, by the triangle inequality.
        never = 2 * scipy.special.gammaincinv((residual.shape[0] - 1) / 2, NEVER)  # the quantile of that χ²
        limit = float(np.sqrt(never / self.base.W.shape[0]))
        radius: Tensor = (limit - residual.norm(dim=0)) / length.norm(dim=0).clamp_min(1e-300)
        return radius.clamp_min(0)

    def decide(self) -> bool:
        """Decides the vectors that Ritz left open, by a march along the spectrum; False where one stays undecided."""
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

    def residual(self, lam: Tensor, c: Tensor, out: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(‖y − (M − λ)z‖, ‖z‖) at each λ for a z that nearly minimises it; true for any z.

        y has the coordinates ``c`` on the Ritz vectors (or a row of them for each λ) and ``out`` on the block
        that closes the basis; z is zero where ``mask`` is.
        """
        shift = self.theta[None] - lam[:, None]  # (L, d)
        damping = max(10 * self.rounding, 1e-12 * self.top)  # keeps ‖z‖ in bounds near an eigenvalue
        weight = 1 / (shift**2 + damping**2)
        if mask is not None:
            weight = weight * mask
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
        matches = []
        for j in range(self.leading.k):
            intruder = bool(self.intruder[j])
            lower = float(self.lower[j])
            upper = self.question.epsilon - BORDERLINE if intruder else float(self.upper[j])
            exact = not intruder and upper - lower <= 1e-4
            matches.append(
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
        return tuple(matches)


def _uncovered(starts: Tensor, stops: Tensor, begin: float, end: float) -> Tensor:
    """Midpoints of what the intervals leave open of [begin, end]."""
    order = starts.argsort()
    starts, stops = starts[order], stops[order]
    reached = torch.cummax(stops, 0).values
    left = torch.cat([reached.new_tensor([begin]), reached]).clamp(begin, end)
    right = torch.cat([starts, starts.new_tensor([end])]).clamp(begin, end)
    open_ones = right > left
    return (left[open_ones] + right[open_ones]) / 2
