"""Full decompositions by LAPACK, with their residuals: the thin SVD, and the float64 Gram matrix."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from spectra.errors import ConvergenceError, NonFiniteError
from spectra.svd.spectrum import CLUSTER_WIDTH, Side, Spectrum
from spectra.updates import ALL, TunedWeight, slabs

EPS64 = float(np.finfo(np.float64).eps)
ROUNDING_OF_GRAM = 4 * EPS64  # of ‖W‖²
NOT_CONVERGED = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # type: ignore[attr-defined]  # not in torch's stubs


def decompose(W: Tensor, side: Side = "left", *, keep: int | None = None) -> Spectrum:
    """Thin SVD of W (m, n) in its own dtype (float32 or float64).

    Parameters
    ----------
    W : the matrix; not modified.
    side : which singular vectors to keep.
    keep : how many of them (default all); a cluster that crosses ``keep`` is kept whole.

    Returns
    -------
    Spectrum : all min(m, n) values, the vectors kept, and each one's residual.  Expect residuals
        of a few times eps·σ₁ and orthogonality of a few times eps·√n.

    Raises
    ------
    NonFiniteError : NaN or infinity in W.
    ConvergenceError : neither divide and conquer (gesdd) nor QR iteration (gesvd) converged.
    """
    check_finite(W)
    U, s, Vh, method = _thin_svd(W)
    values = s.double().cpu().numpy()
    kept = _kept(values, keep)
    U, V = U[:, :kept], Vh[:kept].T
    residuals = np.empty(kept)
    for part in slabs(kept):
        sigma = s[part]
        right = torch.addcmul(W @ V[:, part], U[:, part], sigma, value=-1).double().square().sum(0)
        left = torch.addcmul(W.T @ U[:, part], V[:, part], sigma, value=-1).double().square().sum(0)
        residuals[part] = (right + left).sqrt().cpu().numpy()
    vectors = (U if side == "left" else V).clone()  # so that the other side's memory goes
    return Spectrum(values, vectors, side, residuals, _orthogonality(vectors), _shape(W), method)


def _thin_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    problems = []
    for name in ("gesvdj", "gesvd") if W.is_cuda else ("gesdd", "gesvd"):
        try:
            U, s, Vh = _run_driver(W, name)
        except NOT_CONVERGED as error:
            problems.append(f"{name}: {error}")
            continue
        if bool(torch.isfinite(s).all()):
            return U, s, Vh, name
        problems.append(f"{name}: non-finite singular values")
    raise ConvergenceError("the SVD did not converge (" + "; ".join(problems) + ")")


def singular_values(W: Tensor) -> np.ndarray:
    """All singular values of W, float64, descending; raises as :func:`decompose` does."""
    check_finite(W)
    try:
        s = torch.linalg.svdvals(W)
    except NOT_CONVERGED:
        s = _thin_svd(W)[1]
    values: np.ndarray = s.double().cpu().numpy()
    return values


def product_singular_values(B: Tensor, A: Tensor) -> np.ndarray:
    """The singular values of B·A (m × r times r × n), from two QR factorisations and an r × r problem."""
    return singular_values(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T)


def _run_driver(W: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    if name != "gesvd" or W.is_cuda:
        result = torch.linalg.svd(W, full_matrices=False, driver=name if W.is_cuda else None)
        return result.U, result.S, result.Vh
    U, s, Vh = scipy.linalg.svd(W.numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    return torch.from_numpy(U), torch.from_numpy(s), torch.from_numpy(Vh)


def decompose_gram(weight: TunedWeight, side: Side = "left", *, keep: int | None = None) -> Spectrum:
    """The spectrum from the float64 Gram matrix of the shorter side, from float64 entries.

    Memory above the weight: about 6 p² doubles, p = min(m, n).  Parameters and result are those of
    :func:`decompose`; vectors are float64, and zero where σ is in the null space.

    Raises
    ------
    NonFiniteError, ConvergenceError
    """
    m, n = weight.shape
    # Of a square the side in question: the other one's vectors are not formed where σ is zero.
    short: Side = side if m == n else ("left" if m < n else "right")
    p, length = min(m, n), max(m, n)

    def slab(part: slice) -> Tensor:  # (p, width), float64
        return weight.block(ALL, part) if short == "left" else weight.block(part, ALL).T

    device = weight.W0.device
    gram = torch.zeros(p, p, dtype=torch.float64, device=device)
    for part in slabs(length):
        block = slab(part)
        check_finite(block)
        gram.addmm_(block, block.T)
    try:
        squares, Q = _descending(*eigh(gram))
    except ConvergenceError as error:
        raise ConvergenceError(f"the Gram matrix: {error}") from None
    values = np.sqrt(np.maximum(squares, 0.0))
    kept = _kept(values, keep)
    Q = Q if kept == p else Q[:, :kept].clone()
    sigma = torch.from_numpy(values[:kept].copy()).to(device)
    usable = sigma > max(m, n) * EPS64 * (sigma[0] if kept else 0.0)
    inverse = torch.where(usable, 1 / sigma.clamp_min(np.finfo(np.float64).tiny), 0.0)
    residuals = np.empty(kept)
    for columns in slabs(kept):
        # With v = Wᵀu/σ, Wᵀu − σv is zero and Wv − σu is (Gu − σ²u)/σ, up to the rounding of G.  Where v is not
        # formed the residual is σ.
        image = torch.addcmul(gram @ Q[:, columns], Q[:, columns], sigma[columns] ** 2, value=-1)
        lost = (image.norm(dim=0) + ROUNDING_OF_GRAM * (sigma[0] ** 2)) * inverse[columns]
        residuals[columns] = torch.where(usable[columns], lost, sigma[columns]).cpu().numpy()
    del gram
    vectors = Q
    if side != short:
        vectors = torch.empty(length, kept, dtype=torch.float64, device=device)
        for part in slabs(length):
            vectors[part] = (slab(part).T @ Q) * inverse
    orthogonality = _orthogonality(vectors if bool(usable.all()) else vectors[:, usable]) if kept else 0.0
    return Spectrum(values, vectors, side, residuals, orthogonality, (m, n), "gram")


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and vectors of a symmetric float64 matrix.

    Divide and conquer, and QR iteration where that does not converge, as it may not where many
    eigenvalues are equal; raises ConvergenceError.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except NOT_CONVERGED as first:
        try:
            found = scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")
        except (*NOT_CONVERGED, ValueError) as second:
            raise ConvergenceError(f"its eigenvalues did not converge (evd: {first}; ev: {second})") from None
        values, vectors = (torch.from_numpy(part).to(matrix.device) for part in found)
    return values, vectors


def _descending(values: Tensor, vectors: Tensor) -> tuple[np.ndarray, Tensor]:
    for part in slabs(vectors.shape[1] // 2):  # reverses the columns in place
        last = vectors[:, vectors.shape[1] - part.stop : vectors.shape[1] - part.start]
        first = vectors[:, part].flip(1)
        vectors[:, part] = last.flip(1)
        last.copy_(first)
    return values.flip(0).cpu().numpy(), vectors


def check_finite(W: Tensor) -> None:
    """Raises NonFiniteError where W holds NaN or infinity."""
    if not W.numel():
        return
    low, high = torch.aminmax(W)  # NaN spreads
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(W)).sum())
        raise NonFiniteError(f"{bad:,} of {W.numel():,} values are NaN or infinite")


def _kept(values: np.ndarray, keep: int | None) -> int:
    """``keep``, extended past everything that could share a cluster with the last one kept."""
    if keep is None or keep >= values.size:
        return int(values.size)
    return int(np.count_nonzero(values >= values[keep - 1] - 2 * CLUSTER_WIDTH * values[0]))


def _orthogonality(vectors: Tensor) -> float:
    """max |XᵀX − I|, block by block."""
    worst = 0.0
    for part in slabs(vectors.shape[1]):
        product = vectors.T @ vectors[:, part]
        product[part].diagonal().sub_(1)
        worst = max(worst, float(product.abs().max()))
    return worst


def _shape(W: Tensor) -> tuple[int, int]:
    return W.shape[0], W.shape[1]
