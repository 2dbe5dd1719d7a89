"""The base weight, and what becomes known of it while fine-tunes are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spectra.svd.decompose import decompose, decompose_gram, other_side, product64
from spectra.svd.spectrum import Side, Spectrum
from spectra.updates.algebra import SLAB, DenseWeight
from spectra.updates.products import frobenius_norm, times

ROOMY = 1024  # below, a spectrum in float64 takes no memory to speak of
PROBES = 16
# What GᵀWWᵀG may differ by from a stored spectrum's, relative to its norm: a sieve for other weights, no part of any
# bound.  float32 rounds to about 1.5e-7; a dense change of 1e-4·‖W‖ makes 1e-5 or more.
STALE = 4e-6


class Base:
    """W0, with everything that engines learn of it; each thing is computed once, when first asked for.

    Parameters
    ----------
    W0 : (m, n), float32 or float64.
    side : which singular vectors are in question.
    fine_tunes : how many will be compared with it, as far as known.
    stored : returns the spectrum that an earlier run kept (see :attr:`spectrum`), or None.
    """

    def __init__(
        self,
        W0: Tensor,
        side: Side = "left",
        *,
        fine_tunes: int = 1,
        stored: Callable[[], Spectrum | None] | None = None,
    ):
        self.W0, self.side, self.fine_tunes = W0, side, fine_tunes
        self.stale = False
        self._load, self._floor = stored, 0.0

    @cached_property
    def short(self) -> Side:
        """The side on which W0·W0ᵀ (left) or W0ᵀ·W0 (right) is smaller; of a square, the one in question.

        A stored spectrum of a square decides, since it has one side only.
        """
        m, n = self.W0.shape
        if m == n:
            return self._kept.side if self._kept is not None else self.side
        return "left" if m < n else "right"

    @property
    def W(self) -> Tensor:
        """W0 turned so that it has no more rows than columns: (p, q), a view."""
        return self.W0 if self.short == "left" else self.W0.T

    @cached_property
    def norm_fro(self) -> float:
        """‖W0‖."""
        return frobenius_norm(self.W0)

    @property
    def is_aligned(self) -> bool:
        """Whether the vectors in question are those of the short side."""
        return self.side == self.short

    @cached_property
    def exact(self) -> Spectrum:
        """Of the side in question, by a full SVD in the working dtype."""
        return decompose(self.W0, self.side)

    @property
    def is_exact(self) -> bool:
        """Whether :attr:`exact` costs no decomposition any more."""
        return "exact" in self.__dict__

    @cached_property
    def settled(self) -> Spectrum:
        """Of the side in question, from the float64 Gram matrix."""
        weight = DenseWeight(self.W0, self.W0)
        if self._has_spectrum64:
            return self.spectrum if self.is_aligned else other_side(weight, self.spectrum)
        # Settling is rare and takes the most memory, so the other spectrum goes; a further
        # fine-tune that does not need settling computes it again, and gets the same answer.
        self.__dict__.pop("exact", None)
        return decompose_gram(weight, self.side)

    @property
    def is_settled(self) -> bool:
        """Whether :attr:`settled` costs no decomposition any more."""
        return "settled" in self.__dict__ or self._has_spectrum64

    @property
    def _has_spectrum64(self) -> bool:
        return "spectrum" in self.__dict__ and self.spectrum.dtype == torch.float64 and not self.has_stored

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the short side, from the float64 Gram matrix; large ones keep their vectors in the working dtype."""
        if self._kept is not None:
            return self._kept
        return short_spectrum(self.W0, self.short, torch.float64 if min(self.W0.shape) < ROOMY else self.W0.dtype)

    @cached_property
    def _kept(self) -> Spectrum | None:
        spectrum = self._load() if self._load is not None else None
        if spectrum is None:
            return None
        self.stale = not _belongs(spectrum, self.W0)
        return None if self.stale else replace(spectrum, vectors=spectrum.vectors.to(self.W0.device))

    @property
    def has_stored(self) -> bool:
        """Whether an earlier run kept a spectrum, and it belongs to this very weight."""
        return self._kept is not None

    @property
    def has_spectrum(self) -> bool:
        """Whether :attr:`spectrum` costs nothing any more."""
        return "spectrum" in self.__dict__ or self.has_stored

    @property
    def is_decomposed(self) -> bool:
        """Whether W0's vectors are known, in whatever form."""
        return self.has_spectrum or not {"exact", "settled"}.isdisjoint(self.__dict__)

    def leading_vectors(self, k: int) -> Tensor:
        """The k leading singular vectors of W0 on the side in question, without its null space: (d, ≤ k) float64.

        They come from whichever spectrum is known already, else from :attr:`spectrum`.
        """
        for name in ("settled", "exact"):
            if name in self.__dict__ and not self.has_spectrum:
                known: Spectrum = self.__dict__[name]
                return known.vectors[:, : min(k, known.rank)].double()
        X = self.spectrum.vectors[:, : min(k, self.spectrum.rank)].double()
        if self.is_aligned:
            return X
        s = torch.from_numpy(self.spectrum.s[: X.shape[1]].copy()).to(X.device)
        return product64(self.W.T, X) / s

    def has_no_eigenvalue_below(self, floor: float) -> bool:
        """Whether W·Wᵀ − floor·I is positive definite, by a Cholesky factorisation.

        Rounding of the Gram matrix, a few eps·‖W‖², is far below any floor worth asking for.
        """
        if floor <= self._floor:
            return True
        # Scaled, since squares of tiny or huge entries leave the range of float32.
        low, high = torch.aminmax(self.W)
        scale = max(abs(float(low)), abs(float(high)))
        if not scale > 0:
            return False
        gram = _gram(self.W, scale)
        gram.diagonal().sub_(floor / scale**2)
        proven = int(torch.linalg.cholesky_ex(gram).info) == 0
        if proven:
            self._floor = floor
        return proven


def short_spectrum(W0: Tensor, side: Side | None = None, dtype: torch.dtype | None = None) -> Spectrum:
    """The spectrum that fine-tunes of W0 are compared with again and again.

    Returns
    -------
    Spectrum : all p = min(m, n) values in float64, and the p vectors of the short side (p, p) in
        ``dtype`` (by default W0's), from the float64 Gram matrix; ``rounding`` is what storing them loses.

    Raises
    ------
    NonFiniteError, ConvergenceError
    """
    side = side or ("left" if W0.shape[0] <= W0.shape[1] else "right")
    spectrum = decompose_gram(DenseWeight(W0, W0), side)
    dtype = dtype or W0.dtype
    if dtype == torch.float64:
        return spectrum
    rounding = float(np.finfo(np.float32).eps) / 2
    return replace(spectrum, vectors=spectrum.vectors.to(dtype), rounding=rounding)


def _belongs(spectrum: Spectrum, W0: Tensor) -> bool:
    """Whether Gᵀ·X·diag(s²)·Xᵀ·G is Gᵀ·W·Wᵀ·G for random columns G."""
    W = W0 if spectrum.side == "left" else W0.T
    p = W.shape[0]
    if spectrum.vectors.shape != (p, p) or spectrum.s.size != p:
        return False
    X = spectrum.vectors.to(W.device, W.dtype)
    generator = torch.Generator().manual_seed(p)
    G = torch.randn(p, PROBES, generator=generator).to(X)
    scale = float(spectrum.s[0])  # whose square may leave the range of float32
    if not scale > 0:
        return not bool(W.any())
    half = (times(W.T, G) / scale).double()
    mixed = torch.from_numpy(spectrum.s / scale).to(X.device)[:, None] * (X.T @ G).double()
    found, expected = half.T @ half, mixed.T @ mixed
    return float((found - expected).norm()) <= STALE * float(expected.norm())


def _gram(W: Tensor, scale: float) -> Tensor:
    """W·Wᵀ/scale², its lower triangle alone, in W's dtype."""
    p = W.shape[0]
    gram = torch.zeros(p, p, dtype=W.dtype, device=W.device)
    width = max(SLAB, -(-p // 8))
    for at in range(0, p, width):
        gram[at:, at : at + width] = W[at:] @ (W[at : at + width] / scale / scale).T
    return gram
