"""The cached-base engine: one decomposition of W0, and every fine-tune of it is a small problem.

With X the singular vectors of W0's short side (W = W0 or W0ᵀ, p × q, p ≤ q), a low-rank update turns
W1·W1ᵀ, in the basis X, into

    diag(s²) + F·Eᵀ + E·Fᵀ + E·(A·Aᵀ)·Eᵀ        E = Xᵀ·B,  F = Xᵀ·W·Aᵀ

diagonal plus rank 2r (Bunch & Nielsen 1978; Brand 2006).  Its eigenvectors P are the cosines ⟨x_i, y_j⟩
themselves; for the long side they are (s_i²·P_ij + (F·Eᵀ·P)_ij)/(s_i·σ_j).  Components of A and B outside
W0's row and column spaces need no extra rows.  The count of the leading eigenvalues is proven by inertia.

Any other update needs only the leading vectors of W1, by block Lanczos or from its Gram matrix, and one
product with X.

For low-rank updates of large weights a float32 pass is tried first; what its bounds leave open is computed
again from float64 products, and what even that leaves open goes to the exact engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spectra.svd.base import Base
from spectra.svd.decompose import decompose_gram, product64
from spectra.svd.engine import Answer, Question
from spectra.svd.exact import ExactEngine
from spectra.svd.lanczos import Turned, leading_pairs, padded
from spectra.svd.matching import BORDERLINE, match_vectors, straddles
from spectra.svd.secular import DiagonalPlusLowRank
from spectra.svd.spectrum import EPS32, Spectrum
from spectra.updates.algebra import TunedWeight
from spectra.updates.products import times

SMALL = 1024  # below, float64 products cost next to nothing
LARGEST_SHARE = 4  # of p that 2r may be; beyond, the small problem is no longer small
EXTRA = 2  # eigenvalues beyond the top k, which say where the next ones are
COARSE, FINE = 1e-9, 1e-14  # residuals of the small problem, relative to its largest eigenvalue
ACCURACY = 1e-3  # of directions from Lanczos, as a bound; their true error has been 10 to 30 times smaller
FAINT = 1e-4  # σ_k²/σ₁² from which float32 products are too coarse for the last vectors


class CachedEngine:
    """Diagonal plus low rank in the basis of W0's singular vectors."""

    name = "cached"

    def compare(self, base: Base, tuned: TunedWeight, question: Question) -> Answer:
        p, k = base.W.shape[0], question.top_k
        if k + EXTRA > p or not base.spectrum.s[0] > 0:
            return ExactEngine().compare(base, tuned, question)
        factors = Turned(tuned, base.short == "left").low_rank()
        if factors is None or 2 * LARGEST_SHARE * factors[0].shape[1] > p:
            answer = _compare(base, tuned, question, _by_vectors(base, tuned, k))
            return answer or ExactEngine().compare(base, tuned, question)
        coarse = base.is_aligned and p >= SMALL and base.W0.dtype != torch.float64
        for precise in (False, True) if coarse else (True,):
            answer = _compare(base, tuned, question, _by_algebra(base, factors, k, precise))
            if answer is not None:
                return answer
        return ExactEngine().compare(base, tuned, question)


@dataclass(frozen=True, eq=False)
class _Leading:
    """The leading singular vectors of W1, by their cosines (p, k) with W0's of the side in question.

    s (more than k), residuals (k,) and rounding are as in :class:`Spectrum`; ``margin`` around epsilon
    is what they may not decide.
    """

    s: np.ndarray
    residuals: np.ndarray
    cosines: np.ndarray
    rounding: float
    method: str
    margin: float


def _compare(base: Base, tuned: TunedWeight, question: Question, leading: _Leading | None) -> Answer | None:
    """The answer, or None where these vectors leave a verdict open."""
    if leading is None:
        return None
    k, before = question.top_k, base.spectrum
    if not base.is_aligned:
        # x̂ of the short side off by e turns into Wᵀe/σ on the long side.
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.minimum(before.rounding * before.s[0] / before.s, 1.0)
        before = replace(before, rounding=np.where(before.s > 0, off, 1.0))
    top = Spectrum(
        s=leading.s,
        vectors=torch.empty(base.W.shape[0], k),
        side=question.side,
        residuals=leading.residuals,
        orthogonality=0.0,
        shape=tuned.shape,
        method=leading.method,
        rounding=leading.rounding,
    )
    matches = match_vectors(before, top, k, leading.cosines)
    if len(matches) != k or any(straddles(match, question.epsilon, leading.margin) or match.flags for match in matches):
        return None
    return Answer(
        matches=tuple(matches),
        engine="cached",
        base_norm_spectral=float(before.s[0]),
        residual=max(before.residual, float(leading.residuals.max()) / leading.s[0]),
        orthogonality=before.orthogonality,
        settled_in_float64=any(straddles(match, question.epsilon) for match in matches),
        methods=(before.method, leading.method),
        base_values=before.s,
        tuned_values=leading.s if leading.method == "gram" else None,
        cosines=leading.cosines,
    )


def _by_algebra(base: Base, factors: tuple[Tensor, Tensor], k: int, precise: bool) -> _Leading | None:
    W, spectrum = base.W, base.spectrum
    B, A = factors
    X = spectrum.vectors
    s = torch.from_numpy(spectrum.s).to(W.device)
    product = product64 if precise else _product
    AW = product(W, A.T)
    r = B.shape[1]
    EF = product(X.T, torch.cat([B, AW], 1))
    E, F = EF[:, :r], EF[:, r:]
    eye = torch.eye(r, dtype=torch.float64, device=W.device)
    # Columns of comparable size: the balance of B against A is arbitrary.
    scale = (B.norm() / AW.norm().clamp_min(1e-300)).clamp(1e-150, 1e150).sqrt()
    middle = torch.cat([torch.cat([(A @ A.T) * scale**2, eye], 1), torch.cat([eye, torch.zeros_like(eye)], 1)])
    H = DiagonalPlusLowRank(s**2, torch.cat([E / scale, F * scale], 1), middle)
    more = min(padded(k + EXTRA, W.shape[0]), W.shape[0]) - k - EXTRA  # wider products take no longer
    eigenpairs = H.leading(k + EXTRA, FINE if precise else COARSE, more)
    if eigenpairs is None:
        return None
    theta, P, _ = eigenpairs
    sigma = theta.clamp_min(0).sqrt()
    if not precise and float(theta[k - 1]) < FAINT * float(theta[0]):
        return None
    if not _is_complete(H, theta, k):
        return None
    Y = product(X, P)
    half = product(W.T, Y) + A.T @ (B.T @ Y)
    image = product(W, half) + B @ (A @ half)
    residuals = (image - Y * theta).norm(dim=0) / sigma
    cosines = P[:, :k]
    if not base.is_aligned:
        mixed = s[:, None] ** 2 * cosines + F @ (E.T @ cosines)
        cosines = torch.where(s[:, None] > 0, mixed / (s[:, None].clamp_min(1e-300) * sigma[:k]), 0.0)
    return _Leading(
        s=sigma[: k + EXTRA].cpu().numpy(),
        residuals=residuals[:k].cpu().numpy(),
        cosines=cosines.cpu().numpy(),
        rounding=spectrum.orthogonality + (0.0 if precise else 4 * EPS32),
        method="diagonal plus low rank",
        margin=0.0 if precise else BORDERLINE,
    )


def _is_complete(H: DiagonalPlusLowRank, theta: Tensor, k: int) -> bool:
    """Whether exactly k eigenvalues lie above some τ between θ_k and θ_{k+1}: none was missed."""
    low, high = float(theta[k]), float(theta[k - 1])
    inside = H.d[(H.d > low) & (H.d < high)].sort().values
    edges = torch.cat([inside.new_tensor([low]), inside, inside.new_tensor([high])])
    widest = int((edges[1:] - edges[:-1]).argmax())
    tau = float(edges[widest] + edges[widest + 1]) / 2
    return low < tau < high and H.count_above(tau) == k


def _by_vectors(base: Base, tuned: TunedWeight, k: int) -> _Leading:
    """By W1's leading vectors themselves: from block Lanczos, or its Gram matrix where that does not get there."""
    spectrum, W = base.spectrum, base.W
    top = leading_pairs(base, tuned, k, ACCURACY) if W.shape[0] >= SMALL else None
    if top is not None:
        values = torch.cat([top.theta[:k], top.theta[k : k + 1] + top.next_residual]).clamp_min(0).sqrt()
        sigma, residuals = values.cpu().numpy(), (top.residuals / values[:k]).cpu().numpy()
        Y = top.Y if base.is_aligned else Turned(tuned, base.short == "left").rmatmul64(top.Y) / values[:k]
        method, margin = "block lanczos", BORDERLINE
    else:
        gram = decompose_gram(tuned, base.side, keep=k)
        sigma, residuals, Y, method = gram.s, gram.residuals[:k], gram.vectors[:, :k], gram.method
        margin = 0.0
    if base.is_aligned:
        cosines = product64(spectrum.vectors.T, Y)
    else:
        s = torch.from_numpy(spectrum.s).to(W.device)[:, None]
        inner = product64(spectrum.vectors.T, product64(W, Y))
        cosines = torch.where(s > 0, inner / s.clamp_min(1e-300), 0.0)
    rounding = spectrum.orthogonality + (0.0 if top is None else 4 * EPS32)
    return _Leading(sigma, residuals, cosines.cpu().numpy(), rounding, method, margin)


def _product(W: Tensor, X: Tensor) -> Tensor:
    return times(W, X.to(W.dtype)).double()
