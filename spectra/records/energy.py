"""What follows from singular values and shapes alone: sizes, the ranks that hold a share of the energy, parameters."""

from __future__ import annotations

import numpy as np


def norm_fro(s: np.ndarray) -> float:
    """The Frobenius norm from the singular values; scaled, so that tiny ones do not underflow."""
    return float(s[0] * np.sqrt(((s / s[0]) ** 2).sum())) if s.size and s[0] > 0 else 0.0


def rank_of_energy(s: np.ndarray, share: float) -> int:
    """The smallest r whose r largest values hold ``share`` of Σσ²; 0 for a zero matrix."""
    if not s.size or not s[0] > 0:
        return 0
    energy = np.cumsum((s / s[0]) ** 2)
    # Rounding of the sum may not ask for one more.
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-14)) + 1)


def truncation_error(s: np.ndarray, rank: int) -> float:
    """‖W − W_r‖_F / ‖W‖_F of the best approximation of rank r (Eckart & Young 1936)."""
    whole = norm_fro(s)
    return norm_fro(s[rank:]) / whole if whole > 0 else 0.0


def lora_parameters(shape: tuple[int, int], rank: int) -> int:
    """r·(m + n)."""
    return rank * (shape[0] + shape[1])


def break_even_rank(shape: tuple[int, int]) -> int:
    """The largest rank at which a low-rank update stores fewer values than the weight: r·(m + n) < m·n."""
    m, n = shape
    return (m * n - 1) // (m + n)
