"""The best low-rank approximation of an update, as the factors of an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spectra.errors import ConvergenceError, UsageError
from spectra.records.energy import norm_fro, truncation_error
from spectra.svd import Side, check_finite, decompose, decompose_gram, product_svd
from spectra.updates.algebra import ALL, DenseWeight, TunedWeight, slabs

SVD_UP_TO = 1024  # min(m, n) up to which a float64 SVD is as cheap as its accuracy is welcome
# What the factors as written may lose beyond the truncation, relative to ‖dW‖: float32 rounds to 6e-8, and
# the Gram matrix keeps directions down to about 1e-8 of the largest.
ACCURACY = 1e-5


@dataclass(frozen=True, eq=False)
class Factors:
    """The best low-rank approximation of dW = W1 − W0 (m × n), as an adapter holds it.

    Attributes
    ----------
    B, A : (m, r) and (r, n), float32, of equal column and row norms; dW_r is B·A times the scaling asked for.
        Columns beyond dW's own rank are zero.
    relative_error : ‖dW − scaling·B·A‖_F / ‖dW‖_F with the factors as they are, rounding included; 0 where
        dW is zero.
    singular_values : of dW, float64, descending: all min(m, n) of them, of a low-rank dW those of its factors.
    """

    B: Tensor
    A: Tensor
    relative_error: float
    singular_values: np.ndarray

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def rescaled(self, scaling: float) -> Factors:
        """The same update with another number before B·A."""
        if not 0 < scaling < math.inf:
            raise UsageError(f"scaling = {scaling}; expected a positive number")
        return replace(self, B=self.B / math.sqrt(scaling), A=self.A / math.sqrt(scaling))


def low_rank_factors(tuned: TunedWeight, rank: int | Callable[[np.ndarray], int], scaling: float = 1.0) -> Factors:
    """The best approximation of W1 − W0 by a matrix of that rank (Eckart & Young 1936), in float64.

    ``rank`` may be a function of dW's singular values (float64, descending).

    A low-rank update is two QR factorisations and an SVD as small as its rank; any other dW an SVD up to
    ``SVD_UP_TO``, and beyond the Gram matrix of its shorter side, in memory about 6 p² doubles.

    Raises
    ------
    UsageError : rank below 1, or a scaling that is not positive.
    NonFiniteError : NaN or infinity in dW.
    ConvergenceError : the decomposition failed, or what it gave is off by more than ``ACCURACY``.
    """
    if not 0 < scaling < math.inf:
        raise UsageError(f"scaling = {scaling}; expected a positive number")
    factors = tuned.low_rank()
    if factors is not None:
        for part in factors:
            check_finite(part)
        U, s, Vh = product_svd(*factors)
    else:
        U, s, Vh = _svd_of_dense(_difference(tuned), None if callable(rank) else rank)
    rank = rank(s) if callable(rank) else rank
    if rank < 1:
        raise UsageError(f"rank = {rank}; expected at least 1")
    kept = min(rank, U.shape[1], s.size)
    root = torch.from_numpy(np.sqrt(s[:kept] / scaling)).to(U.device)
    B, A = _padded(U[:, :kept] * root, rank), _padded((root[:, None] * Vh[:kept]).T, rank).T.contiguous()
    size, error = norm_fro(s), 0.0
    if size > 0:
        error = _distance(tuned, factors, scaling * B.double(), A.double()) / size
        if not error <= math.hypot(truncation_error(s, rank), ACCURACY):
            raise ConvergenceError(
                f"rank {rank} should lose {truncation_error(s, rank):.2e} of dW, but loses {error:.2e}"
            )
    return Factors(B, A, error, s)


def _difference(tuned: TunedWeight) -> Tensor:
    """W1 − W0 in float64, from exact entries."""
    return torch.cat([tuned.block(rows, ALL) - tuned.W0[rows].double() for rows in slabs(tuned.shape[0])])


def _svd_of_dense(dW: Tensor, rank: int | None) -> tuple[Tensor, np.ndarray, Tensor]:
    """The leading singular vectors of dW (float64), ``rank`` of them (None: all) or more, and all its values."""
    check_finite(dW)
    side: Side = "left" if dW.shape[0] <= dW.shape[1] else "right"
    small = min(dW.shape) <= SVD_UP_TO
    spectrum = decompose(dW, side) if small else decompose_gram(DenseWeight(dW, dW), side, keep=rank)
    s, X = spectrum.s, spectrum.vectors
    inverse = torch.from_numpy(1 / np.where(s > np.finfo(float).tiny, s, np.inf)[: X.shape[1]]).to(X.device)
    # The other side's vectors only ever occur times σ, so small ones lose nothing.
    if side == "left":
        return X, s, inverse[:, None] * (X.T @ dW)
    return (dW @ X) * inverse, s, X.T


def _padded(X: Tensor, columns: int) -> Tensor:
    """X in float32, with columns of zeros up to that many."""
    whole = torch.zeros(X.shape[0], columns, dtype=torch.float32, device=X.device)
    whole[:, : X.shape[1]] = X
    return whole


def _distance(tuned: TunedWeight, factors: tuple[Tensor, Tensor] | None, B: Tensor, A: Tensor) -> float:
    """‖dW − B·A‖_F."""
    if factors is not None:  # a difference of two products is one
        left, right = torch.cat([factors[0], -B], 1), torch.cat([factors[1], A])
        product = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
        return float(torch.linalg.vector_norm(product))
    parts = [
        torch.linalg.vector_norm(tuned.block(rows, ALL) - tuned.W0[rows].double() - B[rows] @ A)
        for rows in slabs(tuned.shape[0])
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts)))
