"""Verdicts on single vectors from a Krylov space of W0, without its decomposition.

For M = W·Wᵀ (p × p), any unit eigenvector x at λ and *every* z:

    |⟨x, y⟩| ≤ ‖y − (M − λ)z‖            (because ⟨x, (M − λ)z⟩ = 0)

and moving λ by t changes the right side by at most t·‖z‖, so finitely many λ cover the whole spectrum.
The residual is evaluated from the projected problem in float64, plus the measured rounding ‖F‖·‖z‖ of
the Lanczos relation; what remains is "up to rounding".

The other way round, a converged Ritz vector of W0 whose cosine with y, less the error of both, is at least
epsilon shows a base vector close by: its error is at most residual/η (Davis & Kahan 1970) if no other
eigenvalue lies within η, which the same residuals show, of random columns in the start block.  Where the
rounding of the whole space, ‖F‖, is too coarse for that, one product with the operator measures those Ritz vectors.

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
from spectra.svd.lanczos import BlockLanczos, Ritz
from spectra.svd.matching import BORDERLINE
from spectra.svd.perturbation import GUARDS as MIXED
from spectra.svd.perturbation import direction_bounds
from spectra.svd.spectrum import CLUSTER_WIDTH, EPS32

POINTS, MAX_EVALUATIONS = 64, 4000  # of λ: at first, and for one vector
DIRECTION_ERROR = 0.02  # how well a tuned vector must be known before it is judged
SAFETY = 1.5  # times what was measured, for somewhat larger spaces
EXPECTED = 40  # roundings of the Lanczos relation, relative to ‖M‖: float32's has been about 2e-6
EXTRA = 2  # leading vectors of W0 beyond as many as of W1 that are judged by what follows them
NEVER = 1e-5  # about the probability of missing a second singular vector beside a Ritz value
SAFE_FLOOR = 0.25  # of the smallest Ritz value: where the spectrum is supposed to end
LEAST_FLOOR = 1e-5  # of ‖M‖: a float32 Gram matrix proves nothing below


class Rounding:
    """What is known of the rounding of a Lanczos relation, relative to ‖M‖, from one look at its space to the next."""

    def __init__(self) -> None:
        self.relative: float | None = None

    def measure(self, undecided: Certificate) -> None:
        """For those after a certificate that left something open: what is expected may have been too much."""
        if self.relative is None:
            self.relative = SAFETY * undecided.lanczos.rounding(undecided.T) / undecided.top


class Certificate:
    """What a Lanczos space of W0 says of the leading vectors of W1.

    ``X`` (p, k) stands for them: W1's vectors themselves, or W times those of the longer side.  ``random`` (p, c)
    are the normal columns of variance 1/p in the start block.  ``complete`` : they are so many that no leading
    vector of W0 is missed, either.
    """

    def __init__(
        self,
        base: Base,
        lanczos: BlockLanczos,
        X: Tensor,
        random: Tensor,
        leading: Ritz,
        question: Question,
        rounding: Rounding,
        *,
        complete: bool = False,
    ):
        self.base, self.lanczos, self.leading, self.question = base, lanczos, leading, question
        self.complete = complete
        self.T = lanczos.projected()
        self.theta, self.Q = eigh(self.T)
        self.top = float(self.theta[-1])
        expected = EXPECTED * torch.finfo(lanczos.P.dtype).eps if rounding.relative is None else rounding.relative
        self.rounding = expected * self.top  # until it is measured
        self.G = lanczos.below[-1] @ self.Q[-lanczos.width :]  # B₊ times the last rows of the Ritz vectors
        coordinates = (lanczos.P.T @ X.to(lanczos.P.dtype)).double()
        self.lost = (X.double() - (lanczos.P @ coordinates.to(lanczos.P.dtype)).double()).norm(dim=0)
        d = self.T.shape[0]
        self.C, self.outside = self.Q.T @ coordinates[:d], coordinates[d:]
        self.random = self.Q.T @ (lanczos.basis.T @ random.to(lanczos.P.dtype)).double()
        self.aligned = base.is_aligned
        self.direction_error = leading.direction_errors(self.aligned)
        self.known = self.direction_error <= DIRECTION_ERROR
        self.worst = 1.0  # of the open vectors' residuals, in units of what they may be
        self._judge_by_ritz()

    def _judge_by_ritz(self, measured: Tensor | None = None) -> None:
        """Lower bounds from converged Ritz vectors of W0, for each vector from the one it resembles most.

        ``measured`` : what :meth:`_residuals_of_best` gives, where the relation's rounding is too coarse.
        """
        error = self.G.norm(dim=0) + self.rounding
        size = (self.C.square().sum(0) + self.outside.square().sum(0)).sqrt()
        weight = self.C.abs() if self.aligned else self.C.abs() / self.theta.clamp_min(1e-300).sqrt()[:, None]
        tolerance = (2 * max(self.base.W.shape) * EPS32) ** 2
        weight[self.theta <= tolerance * self.top] = 0
        self.best = weight.argmax(0)
        theta, error = self.theta[self.best], error[self.best] if measured is None else measured
        radius = self._isolation(self.best)
        sine = torch.where(radius > 0, error / radius.clamp_min(1e-300), 1.0).clamp_max(1.0)
        if self.complete:
            sine = torch.minimum(sine, self._leading_sines()[self.best])
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

    def _sharpen(self) -> None:
        """Measures the Ritz vectors themselves, where cosines above epsilon are open by no more than rounding."""
        above = self.cosine >= self.question.epsilon + BORDERLINE + self.direction_error
        converged = self.G.norm(dim=0)[self.best] <= self.rounding
        if bool((~self.not_intruder & above & converged).any()):
            self._judge_by_ritz(self._residuals_of_best())

    def _residuals_of_best(self) -> Tensor:
        """(k,): ‖M·x − θ·x‖ of the Ritz vector that each vector resembles most, by the operator itself."""
        vectors = (self.lanczos.basis.double() @ self.Q[:, self.best]).to(self.lanczos.P.dtype)
        lost: Tensor = (self.lanczos.gram(vectors).double() - vectors.double() * self.theta[self.best]).norm(dim=0)
        return lost

    def _leading_sines(self) -> Tensor:
        """Bounds on the angles of all Ritz vectors of W0: of the leading ones by what follows them, else 1."""
        k, d = min(self.question.top_k + EXTRA, self.theta.numel() - 1), self.theta.numel()
        count = min(k + MIXED + 1, d)
        error = self.G[:, d - count :].norm(dim=0) + self.rounding
        values, residuals = (part.flip(0).cpu().numpy() for part in (self.theta[d - count :], error))
        sines = torch.ones_like(self.theta)
        sines[d - k :] = torch.from_numpy(direction_bounds(values, residuals, k)[::-1].copy()).to(sines.device)
        return sines

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
        nothing = torch.zeros(self.G.shape[0], self.random.shape[1], dtype=torch.float64, device=chosen.device)
        residual, length = self.residual(lam, self.random * mask[:, :, None], nothing, mask)
        # ‖residual + η·length‖ over the columns ≤ limit, by the triangle inequality.
        never = 2 * scipy.special.gammaincinv((residual.shape[1] - 1) / 2, NEVER)  # the quantile of that χ²
        limit = float(np.sqrt(never / self.base.W.shape[0]))
        radius: Tensor = (limit - residual.norm(dim=1)) / length.norm(dim=1).clamp_min(1e-300)
        return radius.clamp_min(0)

    def needed(self) -> float | None:
        """About as many steps as would decide what is open: a residual falls as one over their square root."""
        return max(self.lanczos.steps * self.worst**2, self.lanczos.steps + 2) if self.worst > 1 else None

    @property
    def is_borderline(self) -> bool:
        """Whether some cosine is known to lie so close to epsilon that no larger space would decide it."""
        beside = (self.cosine - self.question.epsilon).abs() < BORDERLINE - self.direction_error
        converged = self.G.norm(dim=0)[self.best] <= self.rounding
        return bool((~self.not_intruder & beside & converged).any())

    def decide(self) -> bool:
        """Decides the vectors that Ritz left open, by a march along the spectrum; False where one stays undecided."""
        self._sharpen()
        floor = self._marched()
        if floor is None:
            return False
        measured = self.lanczos.rounding(self.T)
        if measured > self.rounding:
            self.rounding = measured
            self._judge_by_ritz()
            self._sharpen()
            floor = self._marched()
        return floor is not None and (not floor or self.base.has_no_eigenvalue_below(floor))

    def _marched(self) -> float | None:
        """Below which eigenvalue W0's spectrum must end for all to be decided (0: wherever it ends), or None."""
        if not bool(self.known.all()):
            return None
        open_ones = torch.nonzero(~self.not_intruder).flatten().tolist()
        floor = 0.0
        if open_ones and not self.aligned:
            floor = max(SAFE_FLOOR * float(self.theta[0]), 0.0)
            if floor < LEAST_FLOOR * self.top:
                return None
        if open_ones and not self._are_certified(open_ones, floor):
            return None
        self.intruder[open_ones] = True
        return floor

    def _are_certified(self, open_ones: list[int], floor: float) -> bool:
        """Whether the bound of each is below epsilon for every λ from ``floor`` to beyond ‖W0‖²."""
        slack = self.question.epsilon - BORDERLINE - self.direction_error[open_ones]
        if not bool((slack > 0).all()):
            return False
        C, out, lost = self.C[:, open_ones], self.outside[:, open_ones], self.lost[open_ones]
        end = max(self._end(C[:, i], out[:, i], float(slack[i]), float(lost[i])) for i in range(len(open_ones)))
        lam = floor + torch.linspace(0, 1, POINTS, dtype=torch.float64, device=C.device) ** 2 * (end - floor)
        # At a Ritz value itself z has no part along its vector, so that the bound holds far around it; close
        # by, that part times the rounding would add some 1e-3.
        nearest = self.theta[self.best[open_ones]]
        lam = torch.cat([lam, nearest[(nearest > floor) & (nearest < end)]])
        left, right = self._covered(lam, C, out, slack, lost)
        if not bool((left > 0).all()):
            return False
        return all(
            self._is_covered(
                lam - left[:, i], lam + right[:, i], floor, end, (C[:, [i]], out[:, [i]], slack[[i]], lost[[i]])
            )
            for i in range(len(open_ones))
        )

    def _is_covered(
        self,
        starts: Tensor,
        stops: Tensor,
        floor: float,
        end: float,
        vector: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> bool:
        """Whether what those intervals leave open of [floor, end] can be covered, too, for one vector."""
        evaluated = starts.numel()
        while (pending := _uncovered(starts, stops, floor, end)).numel():
            evaluated += pending.numel()
            left, right = self._covered(pending, *vector)
            if evaluated > MAX_EVALUATIONS or not bool((left > 0).all()):
                return False
            starts, stops = torch.cat([starts, pending - left[:, 0]]), torch.cat([stops, pending + right[:, 0]])
        return True

    def _covered(self, lam: Tensor, C: Tensor, out: Tensor, slack: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """How far to the left and right of each λ the bound of each vector stays below ``slack``: (L, o) each."""
        residual, size = self.residual(lam, C, out)
        residual = residual + lost
        if self.aligned:
            left = right = (slack - residual) / size
            self.worst = max(self.worst, float((residual / slack).max()))
        else:  # √(λ − t) ≥ √λ − t/√λ
            root = lam.sqrt()[:, None]
            room = slack * root - residual
            left, right = room / (size + slack / root), room / size
        # A cluster's whole mass is bounded once its width is allowed for.
        return left - 2 * CLUSTER_WIDTH * self.top, right - 2 * CLUSTER_WIDTH * self.top

    def _end(self, c: Tensor, out: Tensor, slack: float, lost: float) -> float:
        """A λ beyond which z = −y/λ alone is enough: ‖M·y‖/λ (over √λ on the longer side) < slack.

        M times the part outside the basis is at most ‖M‖ times its length, and 2·θ₁ stands for ‖M‖,
        which the largest Ritz value has reached to a few digits by then.
        """
        outside = float(out.norm()) + lost
        image = float(torch.cat([self.theta * c, self.G @ c]).norm()) + self.rounding + 2 * self.top * outside
        end = image / slack if self.aligned else (image / slack) ** (2 / 3)
        return max(end, self.top) * (1 + 1e-9)

    def residual(self, lam: Tensor, C: Tensor, out: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(‖y − (M − λ)z‖, ‖z‖), both (L, o), at each λ for a z that nearly minimises it; true for any z.

        Each of the o vectors y has the coordinates ``C`` (d, o) on the Ritz vectors, or (L, d, o) for each λ, and
        ``out`` (b, o) on the block that closes the basis; z is zero where ``mask`` (L, d) is.
        """
        shift = self.theta[None] - lam[:, None]  # (L, d)
        damping = max(10 * self.rounding, 1e-12 * self.top)  # keeps ‖z‖ in bounds near an eigenvalue
        weight = 1 / (shift**2 + damping**2)
        if mask is not None:
            weight = weight * mask
        Gw = self.G[None] * weight[:, None, :]
        small = torch.eye(self.G.shape[0], dtype=torch.float64, device=C.device) + Gw @ self.G.T
        right = shift[:, :, None] * C + self.G.T @ out
        # Where rounding makes it singular the bound becomes NaN, and certifies nothing.
        solved, _ = torch.linalg.solve_ex(small, Gw @ right)
        v = weight[:, :, None] * (right - self.G.T @ solved)
        inside = (C - shift[:, :, None] * v).square().sum(1)
        outside = (out - self.G @ v).square().sum(1)
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
