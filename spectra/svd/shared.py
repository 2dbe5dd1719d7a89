"""One Krylov space for both weights, where the update is of low rank.

W1 = W + B·A (turned so that W is p × q, p ≤ q) makes

    W1·W1ᵀ = W·Wᵀ + F·Bᵀ + B·Fᵀ + B·A·Aᵀ·Bᵀ,    F = W·Aᵀ

so that a block Lanczos process on W·Wᵀ that starts from B, F and random columns holds the tuned weight, too: in its
basis W1·W1ᵀ is the same block tridiagonal matrix but for the first block, with the same residuals.  The leading vectors
of W1, and what certifies each of them against W0 (:mod:`spectra.svd.certificate`), come from the same products.

Where spectra are flat, as those of trained weights are, that takes half as many products as two processes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectra.svd.base import Base
from spectra.svd.certificate import DIRECTION_ERROR, Certificate, Rounding
from spectra.svd.decompose import leading_eigenpairs, product_singular_values
from spectra.svd.engine import Question
from spectra.svd.lanczos import (
    BlockLanczos,
    Looks,
    Ritz,
    Turned,
    padded,
    random_columns,
    residual_norms,
    ritz_leading,
    worst_direction,
)
from spectra.updates.products import times

PAYS = 2048  # from this size on; below, wider blocks cost more than the steps that they save
FAINT = 0.8  # of the edge of W0's noise; stronger updates may make intruders, which two narrow processes prove sooner
WIDEST = 48  # columns of a block
RANDOM = 8  # of them at least
FIRST_STEPS = 8  # fewer have decided nothing, and a look costs as much as two steps
LARGEST_SHARE = 3.5  # the basis stays below that part of the matrix
WELL = 0.9  # of what a direction's error may be, before a certificate is tried
EXPECTED = 1e-6  # of σ₁², the most that float32 has added to a residual, until it is measured


def pays(base: Base, turned: Turned) -> bool:
    """Whether the range of the update fits in a block that is still fast, and it is too faint for many intruders."""
    factors = turned.low_rank()
    if base.W.shape[0] < PAYS or factors is None or 2 * factors[0].shape[1] + RANDOM > WIDEST:
        return False
    p, q = base.W.shape
    edge = base.norm_fro * (p**-0.5 + q**-0.5)  # rms·(√p + √q)
    return bool(product_singular_values(*factors)[0] <= FAINT * edge)


class SharedSpace:
    """The process on W·Wᵀ, and what the update adds in its basis."""

    def __init__(self, base: Base, turned: Turned):
        factors = turned.low_rank()
        assert factors is not None
        self.B, A = factors
        W, p, r = base.W, base.W.shape[0], self.B.shape[1]
        self.F = _product(W, A.T)
        width = padded(2 * r + RANDOM, p)
        self.random = random_columns(p, width - 2 * r, p + 1).to(W.device) / np.sqrt(p)
        start = torch.cat([self.B, self.F, self.random], 1)
        self.lanczos = BlockLanczos(lambda Z: times(W, times(W.T, Z)), start, W.dtype)
        first = self.lanczos.P.double()
        E, F = first.T @ self.B, first.T @ self.F
        self.added = E @ F.T + F @ E.T + E @ (A @ A.T) @ E.T

    def tuned_pairs(self) -> tuple[Tensor, Tensor]:
        """The eigenpairs of W1·W1ᵀ projected on the basis, descending."""
        T = self.lanczos.projected()
        b = self.lanczos.width
        T[:b, :b] += self.added
        return leading_eigenpairs(T)

    def represented(self, ritz: Ritz, vectors: Tensor, aligned: bool) -> Tensor:
        """What stands for the tuned vectors: these, or W times those of the longer side (W·W1ᵀ·y/σ)."""
        if aligned:
            return ritz.Y
        c = vectors[:, : ritz.k]
        inside = torch.cat([self.lanczos.projected() @ c, self.lanczos.below[-1] @ c[-self.lanczos.width :]])
        image = self.lanczos.P.double() @ inside + self.F @ (self.B.T @ ritz.Y.double())
        return (image / ritz.sigma[: ritz.k]).to(ritz.Y.dtype)


def certified_together(base: Base, turned: Turned, question: Question) -> Certificate | None:
    """A certificate that decides every vector, from one space for both weights, or None."""
    space, k = SharedSpace(base, turned), question.top_k
    lanczos, rounding, uncertain = space.lanczos, Rounding(), EXPECTED
    looks = Looks(FIRST_STEPS, base.W.shape[0], lanczos.width, LARGEST_SHARE)
    while (steps := looks.next) is not None:
        if not lanczos.extend(steps):
            return None
        values, vectors = space.tuned_pairs()
        lost = residual_norms(lanczos, vectors, k) + uncertain * values[0]
        bound = worst_direction(values, lost, k, base.is_aligned)
        if bound > WELL * DIRECTION_ERROR:
            looks.wait_for(bound, WELL * DIRECTION_ERROR, float(lost[:k].max()))
            continue
        ritz = Ritz(values, lost, (lanczos.basis.double() @ vectors[:, :k]).to(lanczos.P.dtype))
        if ritz.is_degenerate(turned.weight.shape):
            return None
        X = space.represented(ritz, vectors, base.is_aligned)
        certificate = Certificate(base, lanczos, X, space.random, ritz, question, rounding, complete=True)
        if certificate.decide():
            measured = float((ritz_leading(lanczos, values, vectors, turned, k).residuals - ritz.residuals).max())
            if measured <= 0:
                return certificate
            uncertain += 2 * measured / float(values[0])
        elif certificate.is_borderline:
            return None
        rounding.measure(certificate)
        looks.wait(certificate.needed())
    return None


def _product(W: Tensor, X: Tensor) -> Tensor:
    """W·X in W's dtype, as wide as products are fast."""
    more = padded(X.shape[1], max(W.shape)) - X.shape[1]
    wide = torch.nn.functional.pad(X.to(W.dtype), (0, more))
    product: Tensor = times(W, wide)[:, : X.shape[1]].double()
    return product
