"""The exact engine: full decompositions by LAPACK, with residuals, settled in float64 where needed.

The base and the tuned weight are decomposed by a thin SVD in the working dtype.  Where that leaves
a verdict open (a cosine near epsilon, a gap that float32 cannot resolve, a cluster), the layer is
settled from its float64 Gram matrices, whose singular vectors are accurate to about
1e-15·σ₁²/(σ·gap): far beyond the float32 SVD for every singular value above its null space.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from spectra.errors import ConvergenceError, NonFiniteError
from spectra.svd.engine import Comparison, Question
from spectra.svd.matching import match_vectors, verdict_is_open
from spectra.svd.spectrum import CLUSTER_WIDTH, Side, Spectrum
from spectra.updates import ALL, DenseWeight, TunedWeight, slabs

NOT_CONVERGED = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # type: ignore[attr-defined]  # not in torch's stubs


class ExactBase:
    """W0, decomposed when first asked for, in the working dtype and (rarely) again in float64."""

    def __init__(self, W0: Tensor, side: Side):
        self._W0, self._side = W0, side

    @cached_property
    def spectrum(self) -> Spectrum:
        return decompose(self._W0, self._side)

    @cached_property
    def settled(self) -> Spectrum:
        # Settling is rare and takes the most memory, so the other spectrum goes; a further
        # fine-tune that does not need settling computes it again, and gets the same answer.
        self.__dict__.pop("spectrum", None)
        return decompose_gram(DenseWeight(self._W0, self._W0), self._side)


class ExactEngine:
    """Full decompositions of W0 and W1; the reference for every other engine."""

    name = "exact"

    def prepare(self, W0: Tensor, side: Side) -> ExactBase:
        return ExactBase(W0, side)

    def compare(self, base: ExactBase, tuned: TunedWeight, question: Question) -> Comparison:
        spectrum = decompose(tuned.dense(), question.side, keep=question.top_k)
        matches = match_vectors(base.spectrum, spectrum, question.top_k)
        before = base.spectrum
        settle = before.dtype != torch.float64 and any(verdict_is_open(match, question.epsilon) for match in matches)
        if settle:
            # The tuned side first: only its top vectors stay while the base's take the memory.
            del before
            spectrum = decompose_gram(tuned, question.side, keep=question.top_k)
            before = base.settled
            matches = match_vectors(before, spectrum, question.top_k)
        return Comparison(
            matches=tuple(matches),
            engine=self.name,
            base_norm_spectral=float(before.s[0]),
            residual=max(before.residual, spectrum.residual),
            orthogonality=max(before.orthogonality, spectrum.orthogonality),
            settled_in_float64=settle,
            methods=tuple(dict.fromkeys((before.method, spectrum.method))),
        )


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
    short: Side = "left" if m <= n else "right"
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
        squares, Q = _eigh(gram)
    except NOT_CONVERGED as error:
        raise ConvergenceError(f"the eigenvalues of the Gram matrix did not converge ({error})") from None
    values = np.sqrt(np.maximum(squares, 0.0))
    kept = _kept(values, keep)
    Q = Q if kept == p else Q[:, :kept].clone()
    sigma = torch.from_numpy(values[:kept].copy()).to(device)
    usable = sigma > max(m, n) * np.finfo(np.float64).eps * (sigma[0] if kept else 0.0)
    inverse = torch.where(usable, 1 / sigma.clamp_min(np.finfo(np.float64).tiny), 0.0)
    vectors = Q if side == short else torch.empty(length, kept, dtype=torch.float64, device=device)
    residuals = np.empty(kept)
    for columns in slabs(kept):
        image = torch.zeros(p, columns.stop - columns.start, dtype=torch.float64, device=device)
        for part in slabs(length):
            block = slab(part)
            mapped = (block.T @ Q[:, columns]) * inverse[columns]
            image.addmm_(block, mapped)
            if side != short:
                vectors[part, columns] = mapped
        # Wᵀu − σv is zero by construction; what remains is Wv − σu, or σ itself where v was not formed.
        image.addcmul_(Q[:, columns], sigma[columns], value=-1)
        residuals[columns] = image.norm(dim=0).cpu().numpy()
    lost = _orthogonality(vectors if bool(usable.all()) else vectors[:, usable]) if kept else 0.0
    return Spectrum(values, vectors, side, residuals, lost, (m, n), "gram")


def _eigh(gram: Tensor) -> tuple[np.ndarray, Tensor]:
    """Eigenvalues (descending) and vectors; overwrites ``gram`` where it can."""
    if gram.is_cuda:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0).cpu().numpy(), vectors.flip(1)
    # The transpose of a symmetric C-ordered array is itself in Fortran order: decomposed in place.
    found, array = scipy.linalg.eigh(gram.numpy().T, driver="evd", overwrite_a=True, check_finite=False)
    vectors = torch.from_numpy(array)
    for part in slabs(vectors.shape[1] // 2):  # reverses the columns in place
        last = vectors[:, vectors.shape[1] - part.stop : vectors.shape[1] - part.start]
        first = vectors[:, part].flip(1)
        vectors[:, part] = last.flip(1)
        last.copy_(first)
    return found[::-1], vectors


def check_finite(W: Tensor) -> None:
    """Raises NonFiniteError where W holds NaN or infinity."""
    if not bool(torch.isfinite(W).all()):
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
