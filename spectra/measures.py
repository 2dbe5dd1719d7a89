"""Measures of one layer's update beyond the count of intruders.

Plain functions of singular values (float64, descending), so that each can be checked by hand.
"""

from __future__ import annotations

import numpy as np
import torch

from spectra.records import Vector
from spectra.svd import Comparison, product_singular_values, singular_values, spectral_norm
from spectra.updates import TunedWeight


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


def norm_fro(s: np.ndarray) -> float:
    """The Frobenius norm from the singular values; scaled, so that tiny ones do not underflow."""
    return float(s[0] * np.sqrt(((s / s[0]) ** 2).sum())) if s.size and s[0] > 0 else 0.0


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


def layer_measures(tuned: TunedWeight, comparison: Comparison, vectors: tuple[Vector, ...]) -> dict[str, float | None]:
    """All measures of one analysed layer, by the names the report uses; ratios are of W0's norms.

    What would need a decomposition that the engine did without is None.
    """
    base_size = float(torch.linalg.vector_norm(tuned.W0, dtype=torch.float64))
    base_top = comparison.base_norm_spectral
    if comparison.engine == "krylov" and tuned.low_rank() is None:
        # A dense update's spectrum would cost more than the verdicts did.
        size, top, entropy = tuned.delta_norm(), spectral_norm(tuned.delta()), None
    else:
        update = update_singular_values(tuned)
        size, top, entropy = norm_fro(update), float(update[0]), effective_rank(update)
    return {
        "base_norm_fro": base_size,
        "base_norm_spectral": base_top,
        "update_norm_fro": size,
        "update_norm_spectral": top,
        "update_norm_relative": size / base_size if base_size else None,
        "update_norm_spectral_relative": top / base_top if base_top else None,
        "effective_rank": entropy,
        "stable_rank": stable_rank(size, top),
        "intruder_energy_share": intruder_energy_share(vectors),
    }
