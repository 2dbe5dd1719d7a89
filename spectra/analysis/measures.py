"""Measures of one layer's update beyond the count of intruders.

Plain functions of singular values (float64, descending), so that each can be checked by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from spectra.records.energy import norm_fro, rank_of_energy
from spectra.records.layer import Vector
from spectra.svd import Answer, product_singular_values, singular_values, spectral_norm
from spectra.updates.algebra import TunedWeight


def effective_rank(s: np.ndarray) -> float:
    """exp of the Shannon entropy of p_i = σ_i / Σσ (Roy & Vetterli 2007); 0 for a zero matrix."""
    total = float(s.sum())
    if total <= 0:
        return 0.0
    p = s[s > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(norm_fro: float, norm_spectral: float) -> float:
    """‖W‖_F² / ‖W‖₂²; 0 for a zero matrix."""
    return (norm_fro / norm_spectral) ** 2 if norm_spectral > 0 else 0.0


@lru_cache(maxsize=256)
def _median_of_noise(beta: float) -> float:
    """The median μ_β of the Marchenko–Pastur law of an m × n matrix of unit variance over √n, m/n = β ≤ 1."""
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    # With t = centre − half·cos φ the density loses its square-root ends; the midpoint rule then is exact to 1e-9.
    edges = np.linspace(0, np.pi, 20_001)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = np.cumsum(np.sin(middle) ** 2 / ((low + high) / 2 - (high - low) / 2 * np.cos(middle)))
    half = np.interp(mass[-1] / 2, np.concatenate([[0.0], mass]), edges)
    return float((low + high) / 2 - (high - low) / 2 * np.cos(half))


def noise_edge(s: np.ndarray, shape: tuple[int, int]) -> float | None:
    """The largest singular value that white noise as large as the bulk of this spectrum would have.

    The Marchenko–Pastur edge σ̂(√m + √n), with σ̂ from the median singular value (Gavish & Donoho 2014,
    arXiv 1305.5870, section III.E).  None where the median is zero, as for a low-rank matrix: it has no bulk.
    """
    m, n = shape
    if s.size < min(m, n) or s.size == 0:
        return None
    median = float(np.median(s))
    if not median > max(m, n) * float(np.finfo(np.float32).eps) * s[0]:
        return None
    deviation = median / np.sqrt(max(m, n) * _median_of_noise(min(m, n) / max(m, n)))
    return float(deviation * (np.sqrt(m) + np.sqrt(n)))


def spectrum_shift(base: np.ndarray, tuned: np.ndarray) -> float:
    """‖σ(W1) − σ(W0)‖ / ‖σ(W0)‖ (arXiv 2511.08567); both descending and of the same length."""
    size = norm_fro(base)
    return float(np.linalg.norm(tuned - base)) / size if size > 0 else 0.0


def subspace_overlap(X: Tensor, Y: Tensor) -> float:
    """‖XᵀY‖_F² / min(i, j) of orthonormal X (d, i) and Y (d, j) (Hu et al. 2021, section 7.2); 1 where one span holds
    the other, max(i, j)/d on average for random ones."""
    smaller = min(X.shape[1], Y.shape[1])
    return min(float(torch.linalg.matrix_norm(X.T @ Y)) ** 2 / smaller, 1.0) if smaller else 0.0


def update_singular_values(tuned: TunedWeight) -> np.ndarray:
    """Singular values of dW = W1 − W0, float64, descending.

    From the factors where there are any (two QR and an r × r SVD in float64), else from dW itself
    in the working dtype.
    """
    factors = tuned.low_rank()
    if factors is None:
        return singular_values(tuned.delta())
    return product_singular_values(*factors)


def intruder_energy_share(vectors: tuple[Vector, ...]) -> float:
    """Σ σ² over intruders / Σ σ² over all compared vectors: unlike a count, it does not saturate."""
    top = max((vector.sigma for vector in vectors), default=0.0)
    if top <= 0:
        return 0.0
    energy = {True: 0.0, False: 0.0}
    for vector in vectors:
        energy[vector.intruder] += (vector.sigma / top) ** 2
    return energy[True] / (energy[True] + energy[False])


@dataclass(frozen=True, eq=False)
class UpdateSize:
    """How large dW is: ‖dW‖_F, ‖dW‖₂, and its (r,) singular values, None where they would cost too much."""

    fro: float
    spectral: float
    values: np.ndarray | None

    @classmethod
    def of(cls, tuned: TunedWeight, engine: str, known: np.ndarray | None = None) -> UpdateSize:
        """That of W1 − W0; ``known`` are the singular values where they are at hand."""
        if known is None and (engine != "krylov" or tuned.low_rank() is not None):
            known = update_singular_values(tuned)
        if known is None:  # a dense update's spectrum would cost more than the verdicts did
            return cls(tuned.delta_norm(), spectral_norm(tuned.delta()), None)
        return cls(norm_fro(known), float(known[0]), known)


def layer_measures(
    shape: tuple[int, int],
    answer: Answer,
    vectors: tuple[Vector, ...],
    base_size: float,
    update: UpdateSize,
    threshold: float | None,
) -> dict[str, float | None]:
    """The measures of an audited layer, by the names the report uses; ratios are of W0's norms.

    ``base_size`` is ‖W0‖, ``threshold`` the predicted one.  What would need a decomposition that the engine did without
    is None.
    """
    m, n = shape
    base_top = answer.base_norm_spectral
    size, top, values = update.fro, update.spectral, update.values
    ratio = None if threshold is None else top / threshold
    above = None if threshold is None or values is None else int(np.count_nonzero(values > threshold))
    return {
        "base_norm_fro": base_size,
        "base_norm_spectral": base_top,
        # How far σ₁ stands out of plain noise of W0's size; up to 1.05 the base counts as noise-like.
        "base_over_noise": base_top / (base_size / (m * n) ** 0.5 * (m**0.5 + n**0.5)) if base_size else None,
        "update_norm_fro": size,
        "update_norm_spectral": top,
        "update_norm_relative": size / base_size if base_size else None,
        "update_norm_spectral_relative": top / base_top if base_top else None,
        "effective_rank": None if values is None else effective_rank(values),
        "stable_rank": stable_rank(size, top),
        "rank_90": None if values is None else rank_of_energy(values, 0.9),
        "rank_99": None if values is None else rank_of_energy(values, 0.99),
        "intruder_energy_share": intruder_energy_share(vectors),
        # The size at which a random update has its first intruder; by an estimate of the spectrum with krylov.
        "predicted_threshold": threshold,
        "update_over_threshold": ratio,
        "values_over_threshold": 0 if ratio is not None and ratio <= 1 else above,
    }
