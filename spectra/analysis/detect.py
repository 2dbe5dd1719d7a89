"""Which singular vectors of W1 are intruder dimensions.

Definition (Shuttleworth et al., arXiv 2410.21228v3): among the top k singular vectors of W0 + dW,
those whose |cos| with every singular vector of W0 is strictly below epsilon.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy.special

from spectra.records.layer import Vector
from spectra.svd import BORDERLINE, Answer, Match, Question

# Gaussian matrices reached σ₁ = 1.028 times the Marchenko–Pastur edge (measured, min(m, n) ≥ 32).
NOISE_EDGE = 1.05
NOISE_MIN_SIZE = 32


def detect(answer: Answer, question: Question) -> tuple[Vector, ...]:
    """The verdict on every compared vector, in order of falling singular value.

    A cosine within 1e-3 of epsilon is flagged "borderline"; a vector in W1's null space is none.
    """
    return tuple(_verdict(match, question.epsilon) for match in answer.matches)


def _verdict(match: Match, epsilon: float) -> Vector:
    flags = match.flags
    if match.max_cosine is not None:
        intruder = match.max_cosine < epsilon
        if abs(match.max_cosine - epsilon) <= BORDERLINE:
            flags = (*flags, "borderline")
    else:  # decided without its exact value, or no singular vector at all
        intruder = match.bounds[1] < epsilon and "null_space" not in flags
    return Vector(
        index=match.index,
        sigma=match.sigma,
        max_cosine=match.max_cosine,
        max_cosine_bounds=match.bounds,
        base_index=match.base_index,
        base_sigma=match.base_sigma,
        base_capture=match.base_capture,
        decided_by=match.decided_by,
        intruder=intruder,
        flags=flags,
    )


@lru_cache(maxsize=1)
def _gauss() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre on [0, 12], beyond which a Gaussian is with less than 1e-30."""
    nodes, weights = np.polynomial.legendre.leggauss(256)  # 1e-12 relative, from 1 to 10⁶ directions (measured)
    return 6 * (nodes + 1), 6 * weights


@lru_cache(maxsize=4096)
def random_floor(dimension: int, count: int) -> float:
    """Mean of max_i |cos(y, x_i)| for a random unit y in R^dimension and ``count`` orthonormal x_i.

    What a direction with no relation to the base would show: far below epsilon in all but small
    matrices, so a low cosine alone says "spread over many base vectors", not "outside their span".

    A Gaussian g's direction and length are independent, so the mean is exactly
    E max_i |g_i| / E ‖g‖, with E max = ∫ 1 − erf(t/√2)^count dt.
    """
    if count == 0:
        return 0.0

    nodes, weights = _gauss()
    exceeds = 1.0 - scipy.special.erf(nodes / np.sqrt(2)) ** count
    largest = float((weights * exceeds).sum())
    log_ratio = scipy.special.gammaln((dimension + 1) / 2) - scipy.special.gammaln(dimension / 2)
    return float(largest / (np.sqrt(2) * np.exp(log_ratio)))


def is_noise_like(shape: tuple[int, int], norm_fro: float, sigma_max: float) -> bool:
    """Whether a weight's spectrum is that of plain Gaussian noise, as an untrained layer's is.

    Any update moves such a layer's singular vectors, so its intruders say little.  The test is
    σ₁ ≤ 1.05·rms·(√m + √n), the Marchenko–Pastur edge, for min(m, n) ≥ 32.
    """
    m, n = shape
    if min(m, n) < NOISE_MIN_SIZE or norm_fro == 0:
        return False
    rms = norm_fro / np.sqrt(m * n)
    return bool(sigma_max <= NOISE_EDGE * rms * (np.sqrt(m) + np.sqrt(n)))
