"""Full decompositions by LAPACK, with their residuals: the thin SVD, and the float64 Gram matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from spectra.errors import ConvergenceError, NonFiniteError
from spectra.svd.spectrum import CLUSTER_WIDTH, Side, Spectrum
from spectra.svd.threads import threads_for
from spectra.updates.algebra import ALL, TunedWeight, slabs

EPS64 = float(np.finfo(np.float64).eps)
TINY = float(np.finfo(np.float64).tiny)
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
        with threads_for(min(W.shape)):
            s = torch.linalg.svdvals(W)
    except NOT_CONVERGED:
        s = _thin_svd(W)[1]
    values: np.ndarray = s.double().cpu().numpy()
    return values


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, np.ndarray, Tensor]:
    """(U, s, Vh) of B·A (m × r times r × n), from two QR factorisations and an r × r problem."""
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, s, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ U, s.cpu().numpy(), Vh @ right.Q.T


def product_singular_values(B: Tensor, A: Tensor) -> np.ndarray:
    """The singular values of B·A (m × r times r × n), from two QR factorisations and an r × r problem."""
    return singular_values(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T)


def _run_driver(W: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    if name != "gesvd" or W.is_cuda:
        with threads_for(min(W.shape)):
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
    p = min(m, n)
    gram = _gram64(weight, short)
    device = gram.device
    try:
        squares, Q = _descending(*eigh(gram))
    except ConvergenceError as error:
        raise ConvergenceError(f"the Gram matrix: {error}") from None
    values = np.sqrt(np.maximum(squares, 0.0))
    kept = _kept(values, keep)
    Q = Q if kept == p else Q[:, :kept].clone()
    sigma = torch.from_numpy(values[:kept].copy()).to(device)
    usable = _usable(sigma, (m, n))
    inverse = torch.where(usable, 1 / sigma.clamp_min(TINY), 0.0)
    residuals = np.empty(kept)
    for columns in slabs(kept):
        # With v = Wᵀu/σ, Wᵀu − σv is zero and Wv − σu is (Gu − σ²u)/σ, up to the rounding of G.  Where v is not
        # formed the residual is σ.
        image = torch.addcmul(gram @ Q[:, columns], Q[:, columns], sigma[columns] ** 2, value=-1)
        lost = (image.norm(dim=0) + ROUNDING_OF_GRAM * (sigma[0] ** 2)) * inverse[columns]
        residuals[columns] = torch.where(usable[columns], lost, sigma[columns]).cpu().numpy()
    del gram
    spectrum = Spectrum(values, Q, short, residuals, 0.0, (m, n), "gram")
    return replace(spectrum, orthogonality=_orthogonality(Q)) if side == short else other_side(weight, spectrum)


def gram_singular_values(weight: TunedWeight) -> np.ndarray:
    """All singular values, float64, descending, from the float64 Gram matrix: off by at most about 1e-15·σ₁²/σ.

    Raises
    ------
    NonFiniteError, ConvergenceError
    """
    gram = _gram64(weight, "left" if weight.shape[0] <= weight.shape[1] else "right")
    try:
        squares = torch.linalg.eigvalsh(gram)
    except NOT_CONVERGED:
        squares = eigh(gram)[0]
    values: np.ndarray = squares.clamp_min(0).sqrt().flip(0).cpu().numpy()
    return values


def _gram64(weight: TunedWeight, short: Side) -> Tensor:
    """W·Wᵀ (left) or Wᵀ·W (right) in float64."""
    gram = torch.zeros(min(weight.shape), min(weight.shape), dtype=torch.float64, device=weight.W0.device)
    for part in slabs(max(weight.shape)):
        block = weight.block(ALL, part) if short == "left" else weight.block(part, ALL).T
        check_finite(block)
        gram.addmm_(block, block.T)
    return gram


def other_side(weight: TunedWeight, spectrum: Spectrum) -> Spectrum:
    """The vectors of the weight's longer side, float64, from a float64 spectrum of its shorter one: Wᵀ·u/σ.

    They are zero where σ is in the null space.
    """
    side: Side = "right" if spectrum.side == "left" else "left"
    kept, sigma = spectrum.vectors.shape[1], torch.from_numpy(spectrum.s).to(spectrum.vectors.device)
    usable = _usable(sigma[:kept], spectrum.shape)
    inverse = torch.where(usable, 1 / sigma[:kept].clamp_min(TINY), 0.0)
    vectors = torch.empty(max(spectrum.shape), kept, dtype=torch.float64, device=spectrum.vectors.device)
    for part in slabs(max(spectrum.shape)):
        block = weight.block(ALL, part).T if side == "right" else weight.block(part, ALL)
        vectors[part] = (block @ spectrum.vectors) * inverse
    # Of vectors to small σ the Gram matrix's rounding leaves little; nobody relies on them.
    known = min(kept, spectrum.rank)
    return replace(spectrum, vectors=vectors, side=side, orthogonality=_orthogonality(vectors[:, :known]))


def _usable(sigma: Tensor, shape: tuple[int, int]) -> Tensor:
    """Of which singular values float64 can divide by: those above the null space."""
    return sigma > max(shape) * EPS64 * (sigma[0] if sigma.numel() else 0.0)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and vectors of a symmetric float64 matrix.

    Divide and conquer, and QR iteration where that does not converge, as it may not where many
    eigenvalues are equal; raises ConvergenceError.
    """
    try:
        with threads_for(matrix.shape[0]):
            values, vectors = torch.linalg.eigh(matrix)
    except NOT_CONVERGED as first:
        try:
            eigenpairs = scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")
        except (*NOT_CONVERGED, ValueError) as second:
            raise ConvergenceError(f"its eigenvalues did not converge (evd: {first}; ev: {second})") from None
        values, vectors = (torch.from_numpy(part).to(matrix.device) for part in eigenpairs)
    return values, vectors


def leading_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`eigh`, the largest first."""
    values, vectors = eigh(matrix)
    return values.flip(0), vectors.flip(1)


def product64(W: Tensor, X: Tensor) -> Tensor:
    """W @ X in float64, W upcast part by part."""
    X = X.double()
    if W.dtype == torch.float64:
        return W @ X
    result = torch.zeros(W.shape[0], X.shape[1], dtype=torch.float64, device=W.device)
    if W.stride(0) >= W.stride(1):
        for rows in slabs(W.shape[0]):
            result[rows] = W[rows].double() @ X
    else:
        for columns in slabs(W.shape[1]):
            result.addmm_(W[:, columns].double(), X[columns])
    return result


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
