"""The literal twin: the definition in float64, with clusters, written for clarity alone.

It shares no code with the package.  ``max_cosines`` follows the paper's script (two full SVDs, the
largest |cos| of each tuned vector) and, for what that leaves undetermined, the rule of the README:
base vectors whose values agree up to rounding count as one subspace, and tied tuned vectors are
turned to resemble the base as much as they can.
"""

from __future__ import annotations

import numpy as np

EPS32 = 2.0**-23


def groups(s: np.ndarray) -> list[list[int]]:
    """Indices of (nearly) equal values: gap ≤ 8·eps32·σ₁, width ≤ 64·eps32·σ₁."""
    found: list[list[int]] = []
    for i, value in enumerate(s):
        if found and found[-1]:
            last = found[-1]
            if s[i - 1] - value <= 8 * EPS32 * s[0] and s[last[0]] - value <= 64 * EPS32 * s[0]:
                last.append(i)
                continue
        found.append([i])
    return found


def rank(s: np.ndarray, shape: tuple[int, int]) -> int:
    return int(sum(value > max(shape) * EPS32 * s[0] for value in s)) if s.size and s[0] > 0 else 0


def max_cosines(W0: np.ndarray, W1: np.ndarray, top_k: int, side: str = "left") -> list[float | None]:
    """One value per compared vector of W1; None where it lies in W1's null space."""
    if side == "right":
        W0, W1 = W0.T, W1.T
    U0, s0, _ = np.linalg.svd(W0.astype(np.float64), full_matrices=False)
    U1, s1, _ = np.linalg.svd(W1.astype(np.float64), full_matrices=False)
    base_groups = [g for g in groups(s0) if g[0] < rank(s0, W0.shape)]
    values: list[float | None] = []
    for members in groups(s1):
        if len(values) >= top_k:
            break
        Y = U1[:, members]
        if members[0] >= rank(s1, W1.shape):
            values += [None] * min(len(members), top_k - len(values))
            continue
        while Y.shape[1]:
            best, direction = 0.0, np.eye(Y.shape[1])[0]
            for g in base_groups:
                _, cosines, Vh = np.linalg.svd(U0[:, g].T @ Y)
                if cosines[0] > best:
                    best, direction = cosines[0], Vh[0]
            values.append(float(best))
            y = Y @ direction
            rest = Y - np.outer(y, y @ Y)
            Y = np.linalg.svd(rest, full_matrices=False)[0][:, : Y.shape[1] - 1]
    return values


def count(W0: np.ndarray, W1: np.ndarray, top_k: int, epsilon: float, side: str = "left") -> int:
    return sum(value is not None and value < epsilon for value in max_cosines(W0, W1, top_k, side))


def paper_count(W0: np.ndarray, W1: np.ndarray, top_k: int, epsilon: float) -> int:
    """The paper's own script, without any care for clusters."""
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    U1 = np.linalg.svd(W1, full_matrices=False)[0]
    return int((np.abs(U0.T @ U1[:, :top_k]).max(0) < epsilon).sum())


def formula(W1, chosen):
    """W1 + (λ − 1) Σ σ u vᵀ by a full SVD."""
    U, s, Vh = np.linalg.svd(W1, full_matrices=False)
    return W1 + sum((scale - 1) * s[i] * np.outer(U[:, i], Vh[i]) for i, scale in chosen.items())


def values_after(W1, chosen):
    s = np.linalg.svd(W1, compute_uv=False)
    for i, scale in chosen.items():
        s[i] *= scale
    return np.sort(s)[::-1]
