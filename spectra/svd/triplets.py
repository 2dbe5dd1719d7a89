"""Singular triplets of W1, both sides of them, for whoever changes a weight along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectra.svd.base import ROOMY, Base
from spectra.svd.decompose import decompose_gram, product64
from spectra.svd.lanczos import Turned, leading_pairs
from spectra.svd.matching import mixture
from spectra.svd.spectrum import clusters
from spectra.updates.algebra import TunedWeight

ACCURACY = 1e-6  # asked of the directions from Lanczos; its float32 products reach about eps32·σ₁/gap
DIRECTION = 3e-5  # bound on them above which what Lanczos found is not good enough
EXTRA = 6  # how many vectors further a wider gap is looked for


@dataclass(frozen=True, eq=False)
class Triplets:
    """Leading singular triplets W1·v = σ·u, by falling σ, in float64.

    Attributes
    ----------
    U, V : (m, k) and (n, k), of unit length.
    s : (k,) their singular values, in the units of W.
    residuals : (k,) √(‖W1·v − σ·u‖² + ‖W1ᵀ·u − σ·v‖²).
    errors : (k,) bounds on the distance of u and of v from the exact ones (Davis & Kahan 1970; Wedin 1972), at most 1;
        of a cluster's vectors only their span is determined, and this is about the span.
    values : singular values of W1, float64, descending: all min(m, n) of them, or at least the first k.
    shape : (m, n).
    """

    U: Tensor
    s: np.ndarray
    V: Tensor
    residuals: np.ndarray
    errors: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def take(self, indices: list[int]) -> Triplets:
        """Those of these ranks."""
        part = (self.U[:, indices], self.s[indices], self.V[:, indices], self.residuals[indices], self.errors[indices])
        return Triplets(*part, self.values, self.shape)

    @property
    def residual(self) -> float:
        """The largest residual, relative to σ₁."""
        return float(self.residuals.max(initial=0.0) / self.values[0]) if self.values[0] > 0 else 0.0


def leading_triplets(base: Base, tuned: TunedWeight, k: int) -> Triplets:
    """The k leading singular triplets of W1, or more where ties reach across k.

    Below ``ROOMY`` from the float64 Gram matrix, else by block Lanczos where that converges; then turned within
    their span by float64 products (Rayleigh and Ritz).  Tied vectors are mixed as the engines mix them
    (:mod:`spectra.svd.matching`), so that the i-th is the one that the i-th verdict is about.

    Raises
    ------
    NonFiniteError, ConvergenceError
    """
    turned = Turned(tuned, base.short == "left")
    p = base.W.shape[0]
    k = wanted = min(k, p)
    while p >= ROOMY and wanted < p // 4:
        pairs = leading_pairs(base, tuned, wanted, ACCURACY)
        if pairs is None:
            break
        beyond = float(pairs.sigma[wanted]) + pairs.next_residual / float(pairs.sigma[wanted - 1])
        triplets = _within(turned, pairs.Y.double(), beyond, None)
        if triplets.errors[:k].max() <= DIRECTION:
            return triplets.take(list(range(k)))
        if wanted > k:
            break
        # Of values close to each other either all or none are to be taken: up to the widest gap nearby.
        near = pairs.sigma[k - 1 : k + EXTRA + 1]
        wanted = k + int((near[:-1] - near[1:]).argmax())
        if wanted == k:
            break
    gram = decompose_gram(tuned, base.short, keep=k)
    kept = max(1, min(gram.vectors.shape[1], gram.rank))  # beyond the null space the vectors are zero
    beyond = float(gram.s[kept]) if kept < p else 0.0
    return _as_matched(base, _within(turned, gram.vectors[:, :kept], beyond, gram.s))


def _within(turned: Turned, Y: Tensor, beyond: float, values: np.ndarray | None) -> Triplets:
    """The triplets of W1 in the span of Y (p, k), on its shorter side; ``beyond`` is the largest value outside."""
    Q = torch.linalg.qr(Y).Q
    right, s, mixed = torch.linalg.svd(turned.rmatmul64(Q), full_matrices=False)
    left = Q @ mixed.T
    lost = (_matmul64(turned, right) - left * s).norm(dim=0).cpu().numpy()
    U, V = (left, right) if turned.left else (right, left)
    sigma: np.ndarray = s.cpu().numpy()
    errors = _direction_errors(sigma, lost, beyond)
    return Triplets(U, sigma, V, lost, errors, sigma if values is None else values, turned.weight.shape)


def _direction_errors(s: np.ndarray, lost: np.ndarray, beyond: float) -> np.ndarray:
    """Bounds for vectors that are exact within their span: first order towards the outside, second order inside."""
    outside = np.minimum(s - beyond, s) - 2 * float(lost.max(initial=0.0))
    apart = np.abs(s[:, None] - s)
    starts = clusters(s)
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        apart[first:last, first:last] = np.inf
    inside = apart.min(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first_order = np.sqrt(2) * lost / outside
        error = first_order + first_order.max() * lost / inside
    bound: np.ndarray = np.where((outside > 0) & (error < 1), error, np.where(lost > 0, 1.0, 0.0))
    return bound


def _matmul64(turned: Turned, X: Tensor) -> Tensor:
    return Turned(turned.weight, not turned.left).rmatmul64(X)


def _as_matched(base: Base, triplets: Triplets) -> Triplets:
    """The same, the vectors of each cluster mixed as the exact engine mixes them against W0's."""
    starts = clusters(triplets.values)
    U, V, s, residuals = triplets.U, triplets.V, triplets.s, triplets.residuals
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        here = slice(first, min(last, s.size))
        if here.stop - first < 2:
            continue
        Y = (U if base.side == "left" else V)[:, here]
        weights = mixture(base.settled, product64(base.settled.vectors.T, Y).cpu().numpy())
        if U is triplets.U:
            U, V, s, residuals = U.clone(), V.clone(), s.copy(), residuals.copy()
        turn = torch.from_numpy(weights).to(U.device)
        U[:, here], V[:, here] = U[:, here] @ turn, V[:, here] @ turn
        s[here] = np.einsum("ij,i,ij->j", weights, triplets.s[here], weights)
        residuals[here] = np.hypot(np.linalg.norm(triplets.residuals[here]), np.ptp(triplets.s[here]))
    return (
        triplets if U is triplets.U else Triplets(U, s, V, residuals, triplets.errors, triplets.values, triplets.shape)
    )
