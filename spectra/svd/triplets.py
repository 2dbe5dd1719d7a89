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
from spectra.updates import TunedWeight

ACCURACY = 1e-6  # asked of the directions from Lanczos; its float32 products reach about eps32·σ₁/gap


@dataclass(frozen=True, eq=False)
class Triplets:
    """Leading singular triplets W1·v = σ·u, by falling σ, in float64.

    Attributes
    ----------
    U, V : (m, k) and (n, k), of unit length.
    s : (k,) their singular values, in the units of W.
    residuals : (k,) ‖W1·v − σ·u‖; W1ᵀ·u − σ·v is zero up to float64's rounding.
    values : singular values of W1, float64, descending: all min(m, n) of them, or at least the first k.
    shape : (m, n).
    """

    U: Tensor
    s: np.ndarray
    V: Tensor
    residuals: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def take(self, indices: list[int]) -> Triplets:
        """Those of these ranks."""
        return Triplets(
            self.U[:, indices], self.s[indices], self.V[:, indices], self.residuals[indices], self.values, self.shape
        )

    @property
    def residual(self) -> float:
        """The largest residual, relative to σ₁."""
        return float(self.residuals.max(initial=0.0) / self.values[0]) if self.values[0] > 0 else 0.0

    def rank_of(self, sigma: float) -> int | None:
        """How many singular values lie above sigma; None where not enough of them are known."""
        above = int(np.count_nonzero(self.values > sigma))
        return above if above < self.values.size or self.values.size == min(self.shape) else None


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
    k = min(k, p)
    found = leading_pairs(base, tuned, k, ACCURACY) if p >= ROOMY and k < p // 4 else None
    values = None
    if found is not None:
        Y = found.Y.double()
    else:
        gram = decompose_gram(tuned, base.short, keep=k)
        Y, values = gram.vectors, gram.s
        # Beyond the null space the vectors are zero, which is no direction.
        Y = Y[:, : max(1, min(Y.shape[1], gram.rank))]
    Q = torch.linalg.qr(Y).Q
    half = turned.rmatmul64(Q)
    right, s, mixed = torch.linalg.svd(half, full_matrices=False)
    left = Q @ mixed.T
    lost = (_matmul64(turned, right) - left * s).norm(dim=0)
    U, V = (left, right) if base.short == "left" else (right, left)
    sigma = s.cpu().numpy()
    triplets = Triplets(U, sigma, V, lost.cpu().numpy(), sigma if values is None else values, tuned.shape)
    return _as_matched(base, triplets)


def _matmul64(turned: Turned, X: Tensor) -> Tensor:
    return Turned(turned.weight, not turned.left).rmatmul64(X)


def _as_matched(base: Base, found: Triplets) -> Triplets:
    """The same, the vectors of each cluster mixed as the exact engine mixes them against W0's."""
    starts = clusters(found.values)
    U, V, s, residuals = found.U, found.V, found.s, found.residuals
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        here = slice(first, min(last, s.size))
        if here.stop - first < 2:
            continue
        Y = (U if base.side == "left" else V)[:, here]
        weights = mixture(base.settled, product64(base.settled.vectors.T, Y).cpu().numpy())
        if U is found.U:
            U, V, s, residuals = U.clone(), V.clone(), s.copy(), residuals.copy()
        turn = torch.from_numpy(weights).to(U.device)
        U[:, here], V[:, here] = U[:, here] @ turn, V[:, here] @ turn
        s[here] = np.einsum("ij,i,ij->j", weights, found.s[here], weights)
        residuals[here] = np.hypot(np.linalg.norm(found.residuals[here]), np.ptp(found.s[here]))
    return found if U is found.U else Triplets(U, s, V, residuals, found.values, found.shape)
