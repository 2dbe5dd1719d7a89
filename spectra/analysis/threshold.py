"""How large an update must be for its first intruder, predicted from the base's singular values alone.

A spiked-matrix view (Benaych-Georges & Nadakuditi, arXiv 1103.2221; of intruders, arXiv 2607.23711).  An
update θ·u·vᵀ with random unit u, v gives W0 (m × n, values σ_i, p = min(m, n)) a singular value at z where

    1/θ² = D(z) = φ_L·φ_R      φ_L = (S + (m − p)/z)/m,   φ_R = (S + (n − p)/z)/n,   S = Σ z/(z² − σ_i²)

in the mean over u and v.  From z²·y = θ·z·b·u + W0·(W0ᵀy + θ·a·v), where a = ⟨u, y⟩, b is its counterpart on
the right and b²/a² = φ_R/φ_L = ρ, the left singular vector y has squared components in proportion to

    p_i² = (ρ·z²/m + σ_i²/n)/(z² − σ_i²)²      along W0's vectors
    p_⊥² = ρ·(m − p)/(m·z²)                    outside their span

and is an intruder where max p_i²/(Σ p_i² + p_⊥²) < ε².  The least such θ, over z ≥ σ_k, is the prediction.

S and 1/z fall as z grows.  From one σ_i up to the next, φ_L and φ_R are therefore positive and falling, then
of two signs (D < 0, no solution), then negative and falling: θ rises from the lower σ_i on, and falls
towards the upper one.  So its minimum is where the condition begins to hold, seen from one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from spectra.svd import Side, clusters, numerical_rank
from spectra.svd.spectrum import EPS32

STEP = 0.2  # of the grid in t, where z lies gap/(1 + e⁻ᵗ) above a σ_i: 5 % of the gap at its middle
NEAR, NEAREST = 1e-3, 1e-9  # offsets from a σ_i, relative to the smaller of its gaps; there it is all of y
FARTHEST = 1e3  # beyond σ₁, relative to it: there the overlaps are those of z → ∞ up to 1e-6
ALMOST = 1.5  # between grid points max p_i² was up to 1.2 times lower than at them
ZOOMS, ZOOM_POINTS = 3, 65  # each divides the width by 32
SECTIONS, SECTION_POINTS = 3, 63  # each divides the width by 64
ALONE = 64  # leading values that stand for themselves; z is at least σ_k, and of those far below only sums count
TOGETHER = 48  # groups of the others: θ̄ moves by 0.15 % at most (measured, p up to 4096)
TABLE = 2**18  # entries of a z × i table in memory at once


def predicted_threshold(
    s: np.ndarray, shape: tuple[int, int], *, epsilon: float, top_k: int, side: Side = "left"
) -> float | None:
    """The size θ̄ at which the largest singular value of a random update brings its first expected intruder.

    Parameters
    ----------
    s : (p,) all singular values of W0, descending.
    shape : (m, n) of W0, p = min(m, n).
    epsilon : the cosine below which a vector is an intruder, in (0, 1].
    top_k : how many leading vectors are compared.
    side : whose singular vectors.

    Returns
    -------
    In the units of ``s``; None where no size brings one (a zero base, or ε below the overlaps that even an
    unbounded update would have).  Values that are equal up to rounding count as one subspace and W0's null
    space is no base vector, as everywhere.

    A prediction from means over random directions, one of them at work; the count of intruders of the update
    at hand is the answer.  With k = 10, rank 1 and 4, p from 128 to 160 it was 0.6 to 1.75 times the exact
    size (median 1.0) on Gaussian, spiked and irregularly falling spectra.  Smoothly falling ones have gaps in
    which chance finds room where the mean does not: 1.0 to 1.95 times.  At p = 64 it was up to 3 times too large,
    from p = 500 on that difference goes.

    Time and memory: the order of 10⁵·k divisions, a few tables of 2 MiB, whatever the size.
    """
    m, n = shape if side == "left" else shape[::-1]
    rank, top_k = numerical_rank(s, shape), min(top_k, s.size)
    if not rank or top_k < 1:
        return None
    scaled = s / s[0]
    starts = clusters(scaled)
    scored = int(np.searchsorted(starts, rank))
    values, sizes = np.add.reduceat(scaled, starts[:-1]) / np.diff(starts), np.diff(starts)
    if starts[scored] < s.size:  # null space
        values, sizes = np.append(values[:scored], 0.0), np.append(sizes[:scored], s.size - starts[scored])
    values, sizes, scored = _fewer(values, sizes, scored, max(ALONE, 4 * top_k))
    model = _SpikedModel(values, sizes, scored, m, n, epsilon**2)
    last = min(int(np.searchsorted(starts, top_k)), values.size) - 1  # the group of σ_k
    best = model.least(list(model.stretches(last, max(shape) * EPS32)))
    return float(best * s[0]) if np.isfinite(best) else None


@dataclass(frozen=True)
class _Stretch:
    """Values of z from one σ_i up to the next, or from σ₁ on: z = lower + gap/(1 + e⁻ᵗ), or lower + gap·eᵗ."""

    lower: float
    gap: float
    bounded: bool
    t: np.ndarray

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(origin, offset), both like t: z = origin + offset, where origin is the nearer σ_i."""
        if not self.bounded:
            return np.full(t.shape, self.lower), self.gap * np.exp(t)
        offset = self.gap / (1 + np.exp(np.abs(t)))
        return np.where(t < 0, self.lower, self.lower + self.gap), np.where(t < 0, offset, -offset)


_OnGrid: TypeAlias = tuple[_Stretch, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _SpikedModel:
    """θ(z) and the overlaps at z.

    ``values`` (g,) are W0's distinct singular values, descending, σ₁ = 1, ``sizes`` (g,) how often each occurs;
    the first ``scored`` are base vectors, the others null space.
    """

    values: np.ndarray
    sizes: np.ndarray
    scored: int
    m: int
    n: int
    limit: float

    def stretches(self, last: int, floor: float) -> Iterator[_Stretch]:
        """All z from ``values[last]`` on, and > ``floor``, where W1's null space begins; the highest z last."""
        values = self.values
        gaps = np.append(values[:-1] - values[1:], values[-1])  # below each
        for i in range(last, 0, -1):
            lower, gap = float(values[i]), float(gaps[i - 1])
            above = float(gaps[i - 2]) if i > 1 else gap
            end = -np.log(NEAR * min(1, above / gap))
            farther = end + np.log(NEAR / NEAREST)
            if lower > 0:
                start = np.log(NEAR * min(1, gaps[i] / gap))
                t = np.concatenate([[start + np.log(NEAREST / NEAR)], _grid(start, end), [farther]])
            else:
                t = np.append(_grid(np.log(1 / max(gap / floor - 1, 1.0)), end), farther)
            yield _Stretch(lower, gap, True, t)
        t = _grid(np.log(NEAR), np.log(FARTHEST / gaps[0]))
        yield _Stretch(1.0, float(gaps[0]), False, np.append(t[0] + np.log(NEAREST / NEAR), t))

    def least(self, stretches: Sequence[_Stretch]) -> float:
        """The least θ where the condition holds, or infinity."""
        found = self._on_grids(stretches)
        best = self._first(found, np.inf)
        for stretch, theta, _, excess in found:
            inner = excess[1:-1]
            dips = (inner <= excess[:-2]) & (inner <= excess[2:]) & (inner >= 1) & (inner < ALMOST)
            dips &= np.minimum(theta[:-2], theta[2:]) < best
            between = [self._zoom(stretch, stretch.t[at - 1], stretch.t[at + 1]) for at in np.flatnonzero(dips) + 1]
            if between:
                finer = replace(stretch, t=np.sort(np.append(stretch.t, between)))
                best = self._first(self._on_grids([finer]), best)
        return best

    def _on_grids(self, stretches: Sequence[_Stretch]) -> list[_OnGrid]:
        """θ, branch and excess at each stretch's t, all in one go."""
        ends = np.cumsum([stretch.t.size for stretch in stretches])[:-1]
        z = [stretch.at(stretch.t) for stretch in stretches]
        origin, offset = (np.concatenate(column) for column in zip(*z, strict=True))
        columns = (np.split(column, ends) for column in self._evaluated(origin, offset))
        return list(zip(stretches, *columns, strict=True))

    def _first(self, found: Sequence[_OnGrid], best: float) -> float:
        """``best``, or a lesser θ at which the condition begins to hold, on some stretch."""
        starts = []
        # Along each branch from its σ_i outwards: where the condition first holds, and the point before.
        for stretch, theta, branch, excess in found:
            for which, order in ((1, np.arange(theta.size)), (-1, np.arange(theta.size)[::-1])):
                places = np.flatnonzero(((branch == which) & (excess < 1))[order])
                if places.size:
                    inside, before = order[places[0]], order[max(places[0] - 1, 0)]
                    starts.append((float(theta[before]), stretch, stretch.t[before], stretch.t[inside]))
        for least, stretch, outside, inside in sorted(starts, key=lambda start: start[0]):
            if least >= best:  # no θ between the two is less than that
                break
            best = min(best, self._section(stretch, outside, inside))
        return best

    def _zoom(self, stretch: _Stretch, low: float, high: float) -> float:
        """Where the condition is closest to being met, by a grid ever finer."""
        for _ in range(ZOOMS):
            t = np.linspace(low, high, ZOOM_POINTS)
            at = int(self.evaluate(stretch, t)[2].argmin())
            low, high = t[max(at - 1, 0)], t[min(at + 1, t.size - 1)]
        return float((low + high) / 2)

    def _section(self, stretch: _Stretch, outside: float, inside: float) -> float:
        """θ where the condition begins to hold."""
        for _ in range(SECTIONS):
            t = np.linspace(outside, inside, SECTION_POINTS + 2)
            holds = self.evaluate(stretch, t[1:-1])[2] < 1
            at = int(holds.argmax()) if holds.any() else SECTION_POINTS
            outside, inside = t[at], t[at + 1]
        return float(self.evaluate(stretch, np.array([inside]))[0][0])

    def evaluate(self, stretch: _Stretch, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """θ, the sign of φ_L and φ_R, and max p_i²/(Σ p_i² + p_⊥²)/ε², which is to be below 1; at each t.

        Where φ_L and φ_R differ in sign these are 0, 0 and infinity.
        """
        return self._evaluated(*stretch.at(t))

    def _evaluated(self, origin: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step = max(1, TABLE // self.values.size)
        parts = [self._evaluate(origin[i : i + step], offset[i : i + step]) for i in range(0, origin.size, step)]
        theta, branch, excess = (np.concatenate(column) for column in zip(*parts, strict=True))
        return theta, branch, excess

    def _evaluate(self, origin: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = origin + offset
        poles = 1 / (((origin[:, None] - self.values) + offset[:, None]) * (z[:, None] + self.values))
        squares = poles**2
        first, second = poles @ self.sizes, squares @ self.sizes  # Σ 1/(z²−σ²), Σ 1/(z²−σ²)²
        p = int(self.sizes.sum())
        left, right = ((first * z + (size - p) / z) / size for size in (self.m, self.n))
        branch = np.where((left > 0) & (right > 0), 1, np.where((left < 0) & (right < 0), -1, 0))
        solved = branch != 0
        left, right = np.where(solved, left, 1.0), np.where(solved, right, 1.0)
        theta = np.where(solved, 1 / np.sqrt(left * right), 0.0)
        weight = right / left / self.m  # ρ/m
        # σ²/(z² − σ²)² is z²/(z² − σ²)² − 1/(z² − σ²).
        total = weight * (z**2 * second + (self.m - p) / z**2) + (z**2 * second - first) / self.n
        overlap = (weight * z**2)[:, None] + self.values[: self.scored] ** 2 / self.n
        overlap *= squares[:, : self.scored] * self.sizes[: self.scored]
        return theta, branch, np.where(solved, overlap.max(axis=1) / (self.limit * total), np.inf)


def _fewer(values: np.ndarray, sizes: np.ndarray, scored: int, alone: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(values, sizes, scored) in which all values but the leading ones are a few groups, each with the mean of its
    squares; null space, the last of them, stays apart."""
    last = values.size - (scored < values.size)
    if last <= alone + TOGETHER:
        return values, sizes, scored
    starts = np.linspace(alone, last, TOGETHER, endpoint=False).astype(int)
    counts = np.add.reduceat(sizes[:last], starts)
    squares = np.add.reduceat((sizes * values**2)[:last], starts) / counts
    return (
        np.concatenate([values[:alone], np.sqrt(squares), values[last:]]),
        np.concatenate([sizes[:alone], counts, sizes[last:]]),
        alone,
    )


def _grid(first: float, last: float) -> np.ndarray:
    return np.linspace(first, last, int(np.ceil((last - first) / STEP)) + 1)
