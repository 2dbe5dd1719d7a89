"""Matrices with known answers: prescribed spectra, clusters, planted intruders and non-intruders."""

from __future__ import annotations

import numpy as np

from tests.support import reference


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def with_spectrum(rng: np.random.Generator, m: int, n: int, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(W, U, V) with W = U diag(s) Vᵀ of shape (m, n)."""
    U, V = orthonormal(rng, m, s.size), orthonormal(rng, n, s.size)
    return U * s @ V.T, U, V


def literal_null_counts(rng, s, shape, sigma, question, draws):
    """Intruders of random updates: W0 and R written out, both with singular vectors drawn anew each time, by the
    paper's own script."""
    m, n = shape
    counts = []
    for _ in range(draws):
        W0 = with_spectrum(rng, m, n, s)[0]
        W1 = W0 + with_spectrum(rng, m, n, sigma)[0]
        pair = (W0, W1) if question.side == "left" else (W0.T, W1.T)
        counts.append(reference.paper_count(*pair, question.top_k, question.epsilon))
    return np.array(counts)


def trained_like(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """A spectrum like a trained weight's: some outliers on a falling bulk."""
    p = min(m, n)
    s = np.sort(np.abs(rng.normal(1, 0.3, size=p)) * np.linspace(1, 0.2, p))[::-1].copy()
    outliers = min(6, p)
    s[:outliers] += np.sort(rng.uniform(1, 6, size=outliers))[::-1]
    return with_spectrum(rng, m, n, np.sort(s)[::-1].copy())[0]


SPECTRA = {
    "trained": lambda rng, p: np.sort(rng.uniform(0.2, 1, p) + 4 * (np.arange(p) < 4))[::-1],
    "power law": lambda rng, p: np.arange(1, p + 1) ** -0.7,
    "flat": lambda rng, p: np.ones(p),
    "clusters of 4": lambda rng, p: 1.0 + (p - np.arange(p)) // 4,
    "near ties": lambda rng, p: 1.0 + np.repeat(np.arange(p)[::-1] // 2, 1) + 3e-7 * (np.arange(p)[::-1] % 2),
    "rank deficient": lambda rng, p: np.where(np.arange(p) < max(p // 2, 1), np.linspace(3, 1, p), 0.0),
    "heavy tail": lambda rng, p: 1.0 / np.arange(1, p + 1),
    "one outlier": lambda rng, p: np.concatenate([[1e4], np.linspace(1, 0.5, p - 1)]) if p > 1 else np.ones(1),
}
SHAPES = {"square": (40, 40), "tall": (72, 24), "wide": (24, 72), "row": (1, 30), "column": (30, 1), "tiny": (3, 2)}


def matrix(rng: np.random.Generator, spectrum: str, shape: tuple[int, int]) -> np.ndarray:
    return with_spectrum(rng, *shape, SPECTRA[spectrum](rng, min(shape)))[0]


def planted(
    rng: np.random.Generator, shape: tuple[int, int], cosine: float, sigma: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """(W0, W1, index): W1 has, at ``index`` 0, a left vector whose max |cos| with W0's is ``cosine``.

    The vector is cosine·x_c plus the rest spread evenly over all other base vectors, and it
    replaces nothing: W1's other vectors are W0's, turned to make room.
    """
    m, n = shape
    p = min(m, n)
    W0, U, _ = with_spectrum(rng, m, n, np.linspace(2, 1, p))
    weights = rng.choice([-1.0, 1.0], size=p)
    chosen = int(rng.integers(p))
    weights[chosen] = 0
    weights *= np.sqrt((1 - cosine**2) / (p - 1))
    assert np.abs(weights).max() < cosine
    weights[chosen] = cosine
    y, v = U @ weights, orthonormal(rng, n, 1)[:, 0]
    # Taking y and v out of W0 before adding them back with a large value makes the triplet exact.
    rest = W0 - np.outer(y, y @ W0)
    rest -= np.outer(rest @ v, v)
    return W0, rest + sigma * np.outer(y, v), 0


def f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)
