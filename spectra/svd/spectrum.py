"""The record every engine hands on: singular values, vectors, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

EPS32 = float(np.finfo(np.float32).eps)

# Where neighbouring singular values count as one: a rounding-sized tolerance, the same for every
# engine and precision, so that all of them see the same clusters.  Anything looser chains the bulk
# of a 4096-wide matrix into a single one.
CLUSTER_GAP = 8 * EPS32
CLUSTER_WIDTH = 64 * EPS32

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values and the singular vectors of one side, of W (m × n).

    Attributes
    ----------
    s : float64 on the CPU, descending: all min(m, n) values, or the largest of them.
    vectors : (d, q), d = m for left vectors and n for right ones; they belong to ``s[:q]``.
    side : which side ``vectors`` are.
    residuals : (q,) float64, √(‖W v − σ u‖² + ‖Wᵀ u − σ v‖²) of each triplet, in the units of σ.
    orthogonality : max |vectorsᵀ vectors − I|.
    shape : (m, n).
    method : what computed it, for the record ("gesdd", "gesvd", "gram").
    rounding : one number or (q,), how far each vector as kept may lie from the one computed.

    A perturbation bound for vector i is residuals[i] / gap_i (Wedin 1972, Davis & Kahan 1970), plus
    ``rounding``.
    """

    s: np.ndarray
    vectors: Tensor
    side: Side
    residuals: np.ndarray
    orthogonality: float
    shape: tuple[int, int]
    method: str
    rounding: np.ndarray | float = 0.0

    @property
    def residual(self) -> float:
        """The largest residual, relative to σ₁ (0 for a zero matrix)."""
        return float(self.residuals.max() / self.s[0]) if self.s.size and self.s[0] > 0 else 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors.dtype

    @property
    def rank(self) -> int:
        """How many singular values are above rounding: σ > max(m, n)·eps32·σ₁."""
        return numerical_rank(self.s, self.shape)


def numerical_rank(s: np.ndarray, shape: tuple[int, int]) -> int:
    """The number of values in ``s`` (descending) that are not null space of an m × n matrix."""
    if not s.size or s[0] <= 0:
        return 0
    return int(np.count_nonzero(s > max(shape) * EPS32 * s[0]))


def clusters(s: np.ndarray) -> np.ndarray:
    """The first index of each group of (nearly) equal values, plus ``len(s)`` at the end.

    Neighbours join while their gap is at most ``CLUSTER_GAP``·σ₁ and the group, from its largest
    value, stays within ``CLUSTER_WIDTH``·σ₁.  ``s`` is descending.
    """
    if not s.size:
        return np.zeros(1, dtype=np.intp)
    gap, width = CLUSTER_GAP * s[0], CLUSTER_WIDTH * s[0]
    starts = [0, *(np.flatnonzero(s[:-1] - s[1:] > gap) + 1).tolist()]
    for start, stop in zip(list(starts), [*starts[1:], s.size], strict=True):
        for i in range(start + 1, stop):
            if s[start] - s[i] > width:
                starts.append(i)
                start = i
    return np.array(sorted([*starts, s.size]), dtype=np.intp)
