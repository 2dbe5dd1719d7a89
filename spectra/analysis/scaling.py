"""Singular vectors of a tuned weight scaled, and the result factored back into the form it was trained in.

With (u_i, σ_i, v_i) singular triplets of W1 = W0 + dW,

    W' = W1 + (λ − 1) Σ σ_i u_i v_iᵀ

has the singular values of W1 but for σ_i, which becomes λσ_i, and the same singular vectors (Shuttleworth et al.,
arXiv 2410.21228v3, section 5).  A low-rank update of rank r so becomes one of rank r + q with q vectors scaled, and its
factors follow from the old ones and the triplets alone: two QR factorisations and a small SVD.  DoRA stays DoRA: with
D = m/‖W0 + B·A‖ row by row,  D(W0 + B·A) + E = D(W0 + B·A + D⁻¹E), so that E joins the factors and m is computed anew
for the same D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectra.errors import NonFiniteError, UsageError
from spectra.svd import product_svd
from spectra.svd.triplets import Triplets
from spectra.updates.algebra import ALL, FactoredWeight, LowRank, RowScaled, TunedWeight, slabs


@dataclass(frozen=True, eq=False)
class Change:
    """W' − W1 = B·A, with B (m, q) and A (q, n) in float64."""

    B: Tensor
    A: Tensor

    @property
    def norm(self) -> float:
        """‖W' − W1‖_F."""
        left, right = torch.linalg.qr(self.B, mode="r").R, torch.linalg.qr(self.A.T, mode="r").R
        return float(torch.linalg.vector_norm(left @ right.T))


def scaled(triplets: Triplets, scales: np.ndarray) -> Change:
    """The change that multiplies each of these singular values by its scale, ``scales`` (q,)."""
    weights = torch.from_numpy((np.asarray(scales, dtype=float) - 1) * triplets.s).to(triplets.U.device)
    return Change(triplets.U * weights, triplets.V.T)


def uncertainty(triplets: Triplets, scales: np.ndarray) -> float:
    """How far :func:`scaled` may lie from the change along the exact vectors, in the Frobenius norm: a bound."""
    sizes = (np.asarray(scales, dtype=float) - 1) * triplets.s
    return float(np.linalg.norm(2 * sizes * triplets.errors))


def edited_update(
    tuned: FactoredWeight, change: Change, scaling: float, *, rank: int | None = None, dtype: torch.dtype
) -> LowRank | RowScaled:
    """The update whose tuned weight is W1 + change.

    Parameters
    ----------
    tuned : W1 of rank r beside the base, of LoRA or DoRA.
    scaling : what stands before B·A in the result; not zero.
    rank : at most so many columns, by the best approximation of that rank; without it r + q, which is exact.
    dtype : of the result's factors and magnitudes.

    Raises
    ------
    NonFiniteError : dtype cannot hold them.
    """
    if not scaling or not math.isfinite(scaling):
        raise UsageError(f"scaling = {scaling}: no factors times that make the change")
    # D·B·A + E is the target; D is divided out again.
    U, s, Vh = product_svd(torch.cat([tuned.B, change.B], 1), torch.cat([tuned.A, change.A]))
    kept = min(s.size, rank or s.size)
    root = torch.from_numpy(np.sqrt(s[:kept] / abs(scaling))).to(U.device)
    B = math.copysign(1.0, scaling) * (U[:, :kept] * root)
    A = root[:, None] * Vh[:kept]
    if tuned.left is None:
        return LowRank(_stored(dtype, B), _stored(dtype, A), scaling)
    usable = tuned.left != 0  # rows that are zero stay zero
    inner = B / torch.where(usable, tuned.left, 1.0)[:, None]
    B, A = _stored(dtype, torch.where(usable[:, None], inner, 0.0)), _stored(dtype, A)
    plain = LowRank(B, A, scaling).tuned(tuned.W0)
    norms = torch.cat([plain.block(rows, ALL).norm(dim=1) for rows in slabs(tuned.shape[0])])
    return RowScaled(B, A, scaling, _stored(dtype, tuned.left * norms))


def edited_dense(tuned: TunedWeight, change: Change | None, dtype: torch.dtype) -> Tensor:
    """W1 + change, (m, n) in ``dtype``, each entry rounded once; without a change W1 itself."""
    whole = torch.empty(tuned.shape, dtype=dtype, device=tuned.W0.device)
    for rows in slabs(tuned.shape[0]):
        part = tuned.block(rows, ALL)
        whole[rows] = part if change is None else part.addmm_(change.B[rows], change.A)
    return _finite(whole)


def _stored(dtype: torch.dtype, part: Tensor) -> Tensor:
    return _finite(part.to(dtype))


def _finite(stored: Tensor) -> Tensor:
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(f"{str(stored.dtype).removeprefix('torch.')} cannot hold the changed values")
    return stored


@dataclass(frozen=True)
class Outcome:
    """An edited weight as written, W̃, beside the one that was meant, W' = W1 + change.

    Attributes
    ----------
    before, meant, after : ‖W1‖_F, ‖W'‖_F and ‖W̃‖_F.
    update_before, update_meant, update_after : ‖W1 − W0‖_F, ‖W' − W0‖_F and ‖W̃ − W0‖_F.
    change : ‖W̃ − W1‖_F.
    error : ‖W̃ − W'‖_F.
    scales : u_iᵀ·W̃·v_i/σ_i of the triplets, the scale that each of them got.
    """

    before: float
    meant: float
    after: float
    update_before: float
    update_meant: float
    update_after: float
    change: float
    error: float
    scales: tuple[float, ...]


NORMS = ("before", "meant", "after", "update_before", "update_meant", "update_after", "change", "error")


def outcome_of(before: TunedWeight, change: Change, after: TunedWeight, triplets: Triplets) -> Outcome:
    """What became of W1, from exact entries in float64."""
    squares = np.zeros(len(NORMS))
    inner = torch.zeros(triplets.s.size, dtype=torch.float64, device=before.W0.device)
    for rows in slabs(before.shape[0]):
        old, new, base = before.block(rows, ALL), after.block(rows, ALL), before.W0[rows].double()
        meant = torch.addmm(old, change.B[rows], change.A)
        inner += (triplets.U[rows] * (new @ triplets.V)).sum(0)
        parts = (old, meant, new, old - base, meant - base, new - base, new - old, new - meant)
        squares += [float(part.square().sum()) for part in parts]
    sigma = np.where(triplets.s > 0, triplets.s, np.inf)
    norms = dict(zip(NORMS, np.sqrt(squares).tolist(), strict=True))
    return Outcome(**norms, scales=tuple((inner.cpu().numpy() / sigma).tolist()))
