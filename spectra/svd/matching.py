"""Cosines between the singular vectors of W1 and W0, with clusters taken as subspaces.

Definition: Shuttleworth et al., arXiv 2410.21228v3, section 3; |cos|, over all singular vectors of
W0.  What it leaves open is settled as follows.  Vectors of W0 whose singular values are equal up
to rounding are not determined, only their span is, so the cosine with the span counts.  The null
space of W0 is no singular vector.  Where values of W1 tie, its vectors are not determined either:
they are rotated to resemble W0 as much as they can, the best one first, so that no rotation inside
a cluster can make an intruder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from spectra.svd.engine import Match
from spectra.svd.spectrum import EPS32, Spectrum, clusters, numerical_rank

BORDERLINE = 1e-3  # a cosine this close to epsilon is settled in float64 and marked
CAPTURE_ENERGY = 0.9
WINDOWS = (0, 1, 2, 4, 8)  # neighbours on each side whose mixing the upper bound allows for


def match_vectors(base: Spectrum, tuned: Spectrum, top_k: int, cosines: np.ndarray) -> list[Match]:
    """The top ``top_k`` vectors of W1 against W0, largest singular value first.

    ``cosines`` (p, q) has the scalar products of W0's vectors with W1's leading ones; of both spectra only the
    values and their accuracy are used.  A tie across ``top_k`` is returned whole.
    Bounds follow from the residuals (|sin| ≤ residual/gap, Davis & Kahan 1970): they enclose the
    exact cosine up to the rounding of float64.
    """
    starts = clusters(tuned.s)
    rank = tuned.rank
    stop = min(top_k, tuned.s.size)
    end = int(np.searchsorted(starts, stop))
    if starts[end] > stop and starts[end - 1] < rank:  # a tie across k, and not of null space
        stop = int(starts[end])
    stop = min(stop, cosines.shape[1])
    groups = _BaseGroups(base, cosines, stop)
    matches: list[Match] = []
    for first, last in itertools.pairwise(starts):
        if first >= stop:
            break
        flags = ["cluster"] if last - first > 1 else []
        if first < top_k < last:
            flags.append("tie_across_k")
        error = _angle_bound(tuned, int(first), int(last))
        if first >= rank:
            for index in range(first, min(last, stop)):
                matches.append(_null_space(index, float(tuned.s[index]), flags))
            continue
        for index, (_, mixed) in zip(range(first, last), groups.rotated(first, last), strict=False):
            matches.append(groups.match(index, float(tuned.s[index]), mixed, error, flags))
    return matches


def mixture(base: Spectrum, cosines: np.ndarray) -> np.ndarray:
    """How the vectors of one cluster of W1 are mixed before they are matched: an orthogonal matrix (c, c).

    ``cosines`` (p, c) has their scalar products with W0's vectors; column i makes the cluster's i-th vector.
    """
    groups = _BaseGroups(base, cosines, cosines.shape[1])
    return np.stack([weights for weights, _ in groups.rotated(0, cosines.shape[1])], axis=1)


def verdict_is_open(match: Match, epsilon: float) -> bool:
    """Whether working precision leaves it open on which side of epsilon the exact cosine lies."""
    if match.max_cosine is None:
        return False
    return straddles(match, epsilon) or "cluster" in match.flags or "base_cluster" in match.flags


def straddles(match: Match, epsilon: float, margin: float = BORDERLINE) -> bool:
    """Whether epsilon lies within the bounds, or within ``margin`` of them."""
    lower, upper = match.bounds
    return not (epsilon <= lower - margin or epsilon > upper + margin)  # NaN is open


def _null_space(index: int, sigma: float, flags: list[str]) -> Match:
    return Match(index, sigma, None, (0.0, 1.0), None, None, None, "svd", (*flags, "null_space"))


def _angle_bound(spectrum: Spectrum, first: int, last: int) -> float:
    """Bound on the distance from span(vectors[first:last]) to the exact one, at most 1."""
    s, residuals = spectrum.s, spectrum.residuals
    residual = float(np.linalg.norm(residuals[first:last]))
    above = s[first - 1] - s[first] if first else np.inf
    below = s[last - 1] - s[last] if last < s.size else s[last - 1]
    gap = min(above, below) - 2 * residual
    rounding = float(np.linalg.norm(np.broadcast_to(spectrum.rounding, residuals.shape)[first:last]))
    return float(min(1.0, np.sqrt(2) * residual / gap + rounding)) if gap > 0 else 1.0


def cosines_between(base: Spectrum, Y: torch.Tensor) -> np.ndarray:
    """⟨x_i, y_j⟩ of the vectors of W0 with those in Y (d, q), in float64 on the CPU."""
    cosines: np.ndarray = (base.vectors.T @ Y.to(base.dtype)).double().cpu().numpy()
    return cosines


class _BaseGroups:
    """Cosines of the leading ``count`` tuned vectors with each cluster of W0's, and their error bounds."""

    def __init__(self, base: Spectrum, cosines: np.ndarray, count: int):
        self.base = base
        exact = base.dtype == torch.float64 or base.method == "gram"
        # In float32 it is uncertain within a factor of two where the null space begins.
        doubt = 1.0 if exact else 2.0
        s, tolerance = base.s, max(base.shape) * EPS32 * (base.s[0] if base.s.size else 0.0)
        self.rank = numerical_rank(s, base.shape)
        surely = int(np.count_nonzero(s > doubt * tolerance)) if self.rank else 0
        possibly = int(np.count_nonzero(s > tolerance / doubt)) if self.rank else 0
        edges = clusters(s)
        # Starts of groups, and the end; a group that begins above the null space counts whole.
        self.edges = edges[: np.searchsorted(edges, possibly) + 1]
        self.count = int(np.searchsorted(self.edges, self.rank))
        self.sure_count = int(np.searchsorted(self.edges, surely))
        self.C = cosines[: self.edges[-1], :count]
        energy = np.cumsum(s**2)
        self.captured = int(np.searchsorted(energy, CAPTURE_ENERGY * energy[-1]) + 1) if self.rank else 0
        self._bound_windows()

    def _bound_windows(self) -> None:
        """For each window of groups: where it starts and ends, and how far its span may be off."""
        starts = self.edges[:-1]
        self.windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        if not starts.size:
            return
        s, squares = self.base.s, np.concatenate([[0.0], np.cumsum(self.base.residuals**2)])
        kept = np.broadcast_to(self.base.rounding, self.base.residuals.shape)
        rounded = np.concatenate([[0.0], np.cumsum(kept**2)])
        groups = np.arange(starts.size)
        padded = np.concatenate([[np.inf], s, [0.0]])  # the null space is a neighbour too
        for reach in WINDOWS:
            low, high = np.maximum(groups - reach, 0), np.minimum(groups + reach + 1, starts.size)
            first, last = self.edges[low], self.edges[high]
            residual = np.sqrt(np.maximum(squares[last] - squares[first], 0))
            gap = np.minimum(padded[first] - s[first], s[last - 1] - padded[last + 1]) - 2 * residual
            with np.errstate(divide="ignore", over="ignore"):
                error = np.where(gap > 0, np.sqrt(2) * residual / np.maximum(gap, 1e-300), 1.0)
            error += np.sqrt(np.maximum(rounded[last] - rounded[first], 0))
            self.windows.append((low, high, np.minimum(error, 1.0)))

    def _masses(self, squares: np.ndarray) -> np.ndarray:
        """Σ cos² over each group; ``squares`` (vectors of W0,) or (vectors of W0, q)."""
        if not squares.shape[0]:
            return squares
        return np.add.reduceat(squares, self.edges[:-1], axis=0)

    def rotated(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(its coordinates in the cluster, its cosines) of each vector of a cluster of W1, most similar to W0 first.

        A single vector is itself.  Of several, the unit vector of their span with the largest
        cosine to a cluster of W0 comes first; then the same in what is orthogonal to it.
        """
        block = self.C[:, first:last]
        turn = np.eye(block.shape[1])
        while block.shape[1] > 1:
            masses = self._masses(block**2)[: self.count].sum(1)
            order = np.argsort(-masses)
            best, count, rotation = 0.0, 1, np.eye(block.shape[1])
            # A group's largest cosine² is at most its mass, so most groups need no SVD.
            for position, group in enumerate(order):
                if masses[group] <= best**2:
                    break
                part = block[self.edges[group] : self.edges[group + 1]]
                _, cosines, Vh = np.linalg.svd(part, full_matrices=part.shape[0] < part.shape[1])
                if cosines[0] > best:
                    best, rotation = float(cosines[0]), Vh.T
                    others = masses[order[0 if position else 1 :][:1]].sum()
                    # What no other group can match may follow at once.
                    count = max(1, int(np.count_nonzero(cosines**2 >= others)))
            block, turn = block @ rotation, turn @ rotation
            yield from zip(turn[:, :count].T, block[:, :count].T, strict=True)
            block, turn = block[:, count:], turn[:, count:]
        if block.shape[1]:
            yield turn[:, 0], block[:, 0]

    def match(self, index: int, sigma: float, cosines: np.ndarray, error: float, flags: list[str]) -> Match:
        squares = cosines**2
        masses = self._masses(squares)
        if not self.count:  # nothing in W0 to resemble
            return Match(index, sigma, 0.0, (0.0, 0.0), None, None, 0.0, "svd", tuple(flags))
        values = np.sqrt(masses)
        group = int(values[: self.count].argmax())
        begin, end = int(self.edges[group]), int(self.edges[group + 1])
        base_index = begin + int(squares[begin:end].argmax())
        if end - begin > 1:
            flags = [*flags, "base_cluster"]
        own_error = self.windows[0][2]
        lower = float((values - own_error)[: self.sure_count].max(initial=0.0)) - error
        running = np.concatenate([[0.0], np.cumsum(masses)])
        upper = (
            np.min(
                [np.sqrt(np.maximum(running[high] - running[low], 0)) + off for low, high, off in self.windows],
                axis=0,
            ).max()
            + error
        )
        value = min(float(values[group]), 1.0)
        bounds = (min(max(lower, 0.0), value), max(min(float(upper), 1.0), value))  # in [0, 1]
        capture = min(float(np.sqrt(squares[: self.captured].sum())), 1.0)
        base_sigma = float(self.base.s[base_index])
        return Match(index, sigma, value, bounds, base_index, base_sigma, capture, "svd", tuple(flags))
