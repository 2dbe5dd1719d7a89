"""How far the Ritz vectors of a symmetric matrix are from its eigenvectors.

For M with orthonormal Y (p, q), M·Y = Y·diag(θ) + R and R ⟂ Y, write M in the basis [Y, its complement] as
[[diag(θ), Gᵀ], [G, L]]; column i of G has the length ρ_i of the residual.  Three steps, each one line to prove:

1. ‖L‖ ≤ ℓ = u + Σ ρ_i²/(θ_i − u), where u < θ_q bounds the eigenvalue after the q leading ones: on Y and the
   leading vector of L, M is an arrow matrix, whose smallest eigenvalue is at most u (Cauchy).  So M has at most q
   eigenvalues above ℓ.
2. The j-th eigenvalue λ_j is at least θ_j (Cauchy), and below t > θ_j wherever Σ_{i≥j} ρ_i²/(t − θ_i) < t − ℓ.
3. The eigenvector [a, b] to λ_j > ℓ has b = (λ_j − L)⁻¹·G·a and (θ_i − λ_j)·a_i = −⟨G·e_i, b⟩.  Hence, with
   d_i ≤ |θ_i − λ_j| and s = Σ_{i≠j} ρ_i²/((θ_j − ℓ)·d_i) < 1,

       ‖b‖ ≤ β = ρ_j/((1 − s)·(θ_j − ℓ)),        |a_i| ≤ ρ_i·β/d_i.

What lies outside the span counts by the first order, with the distance to what is *not* in the span; its mixing inside
by the second.  The usual bound, residual over the distance to the next eigenvalue (Davis & Kahan 1970), charges the
first order with the small gaps between the leading values themselves.
"""

from __future__ import annotations

import numpy as np

GUARDS, STRIDE = 12, 2  # as many Ritz vectors beyond the ones asked for may take part; so many more at a time
INSIDE = np.array([0.4, 0.05, 0.005])  # of the gap above θ_j, tried as the place of t


def direction_bounds(theta: np.ndarray, residuals: np.ndarray, k: int, *, long: bool = False) -> np.ndarray:
    """Upper bounds, at most 1, on the sine of the angle between each of the k leading Ritz vectors and its eigenvector.

    Parameters
    ----------
    theta, residuals : of the leading Ritz pairs, by falling θ, more than k of them.  That the value after the q
        leading ones is at most θ_{q+1} + ρ_{q+1} is taken for granted: none was missed.
    long : M is W·Wᵀ, and the angle between Wᵀ·y and Wᵀ·x is asked for.
    """
    best = np.ones(k)
    for q in range(k, min(k + GUARDS, theta.size - 1) + 1, STRIDE):
        values, rho, beyond = theta[:q], residuals[:q], theta[q] + residuals[q]
        if not values[-1] > beyond:
            continue
        squares = rho**2
        floor = beyond + float((squares / (values - beyond)).sum())
        room = values[:k] - floor
        if not room[-1] > 0:
            continue
        distance = _distances(values, squares, floor, k)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            shared = (squares / distance).sum(1) / room
            outside = rho[:k] / ((1 - shared) * room)
            inside = outside * np.sqrt((squares / distance**2).sum(1))
            sine = np.hypot(outside, inside)
            if long:  # Wᵀ makes what is outside at most √ℓ times as long, what is inside √θ₁ times
                lost = np.sqrt(max(floor, 0.0)) * outside + np.sqrt(values[0]) * np.hypot(inside, sine**2)
                sine = lost / np.sqrt(np.maximum(values[:k], 0.0))
            valid = (distance.min(1) > 0) & (shared < 1) & (sine < 1)
        best = np.where(valid, np.minimum(best, sine), best)
    return best


def _distances(values: np.ndarray, squares: np.ndarray, floor: float, k: int) -> np.ndarray:
    """(k, q) at most |θ_i − λ_j| for each of the first k, ∞ where i = j; step 2 for what lies above θ_j."""
    apart = values[None, :] - values[:k, None]  # θ_i − θ_j, which falls with i
    gap = np.append(values[0] - floor, -np.diff(values[:k]))
    up = INSIDE[:, None] * gap  # (shares, k), what t is above θ_j
    behind = apart <= 0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        pull = (np.where(behind, squares, 0.0) / (up[:, :, None] - apart)).sum(2)
        holds = (up > 0) & (pull < up + values[:k] - floor)
    rise = np.where(holds, up, np.inf).min(0)
    distance: np.ndarray = np.where(behind, -apart, apart - rise[:, None])
    distance[np.arange(k), np.arange(k)] = np.inf
    return distance
