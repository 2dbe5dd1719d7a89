"""The Krylov engine: verdicts without any decomposition of the base.

Two block Lanczos processes: one on W1·W1ᵀ to its leading vectors, and from these one on W0·W0ᵀ, whose
Krylov space holds what certifies each of them (:mod:`spectra.svd.certificate`).  The weights are met as
operators, so the factors of an update are never multiplied out.  (For low-rank updates one process from
the range of the factors can serve both weights; its wider blocks were measured two to three times slower.)

An update that is small beside the gaps of W1's spectrum needs only the first: see :func:`proven_small`.

What stays open (ties, null spaces, cosines near epsilon, spectra that no polynomial resolves) goes to the
cached-base engine, and from there to the exact one, so that the verdicts are the exact engine's.  That no
leading vector was missed holds with probability one over the random start.
"""

from __future__ import annotations

import numpy as np
import torch

from spectra.svd.base import Base
from spectra.svd.cached import CachedEngine
from spectra.svd.certificate import DIRECTION_ERROR, Certificate, Rounding
from spectra.svd.decompose import product_singular_values
from spectra.svd.density import estimated_values
from spectra.svd.engine import Answer, Match, Question
from spectra.svd.lanczos import (
    GUARDS,
    BlockLanczos,
    Leading,
    Looks,
    Ritz,
    Turned,
    leading_pairs,
    padded,
    random_columns,
)
from spectra.svd.matching import BORDERLINE
from spectra.svd.shared import certified_together, pays
from spectra.updates.algebra import TunedWeight
from spectra.updates.products import times

FIRST_STEPS = 8  # fewer have decided nothing; trained-like weights of 1024 to 4096 took 8 to 12
ACCURACY = DIRECTION_ERROR / 8  # what a direction's error leaves of epsilon is not got back
LIKE_THE_FIRST = 0.75  # of the steps that the leading vectors took, before the first look
LARGEST_SHARE = 4  # the basis stays below a quarter of the matrix; what is open then has stayed open


class KrylovEngine:
    """Block Lanczos with certificates; what they leave open goes to the decomposed base."""

    name = "krylov"

    def compare(self, base: Base, tuned: TunedWeight, question: Question) -> Answer:
        return certified(base, tuned, question) or CachedEngine().compare(base, tuned, question)


def certified(base: Base, tuned: TunedWeight, question: Question) -> Answer | None:
    """The answer where certificates decide every vector, else None."""
    turned = Turned(tuned, base.short == "left")
    if pays(base, turned):
        together = certified_together(base, turned, question)
        return None if together is None else _certified(together)
    W, p = base.W, base.W.shape[0]
    width = padded(question.top_k + GUARDS, p)
    leading = leading_pairs(base, tuned, question.top_k, ACCURACY)
    if leading is None:
        return None
    small = proven_small(base, leading, tuned, question)
    if small is not None:
        return small
    X = leading.Y if base.is_aligned else (W @ leading.half) / leading.sigma[: leading.k].to(W.dtype)
    random = random_columns(p, width - leading.k, p + 1).to(W.device) / np.sqrt(p)
    lanczos = BlockLanczos(lambda Z: times(W, times(W.T, Z)), torch.cat([X.double(), random], 1), W.dtype)
    # W0's spectrum is about as hard to resolve as W1's was, and each look costs as much as a step.
    looks = Looks(max(FIRST_STEPS, int(LIKE_THE_FIRST * leading.steps)), p, width, LARGEST_SHARE)
    rounding = Rounding()
    while (steps := looks.next) is not None:
        if not lanczos.extend(steps):
            return None
        certificate = Certificate(base, lanczos, X, random, leading, question, rounding)
        if certificate.decide():
            return _certified(certificate)
        if certificate.is_borderline:
            return None
        rounding.measure(certificate)
        looks.wait(certificate.needed())
    return None


def proven_small(base: Base, leading: Leading, tuned: TunedWeight, question: Question) -> Answer | None:
    """The answer where no leading vector can be an intruder, because dW is small, else None.

    With ρ² = (‖dW·v‖² + ‖dWᵀ·u‖²)/2 on the triplet (u, v, σ) of W1, and at most g singular values of W0
    within η of σ, 0 < η < σ: max |cos| ≥ (2·√(1 − ρ²/η²) − 1)/√g.  By Weyl, W0 has no more values
    within η than W1 within η + ‖dW‖.
    """
    k, s, W = leading.k, leading.sigma, base.W
    sigma = s[:k]
    factors = Turned(tuned, base.short == "left").low_rank()
    norm = float(product_singular_values(*factors)[0]) if factors is not None else tuned.delta_norm()
    if not norm < float((sigma - s[k]).max()):
        return None  # no window can be free
    Y, right = leading.Y, leading.half.double() / sigma
    half0 = times(W.T, Y)
    if factors is not None:
        B, A = factors
        changes = A.T @ (B.T @ Y.double()), B @ (A @ right)
    else:
        changes = leading.half.double() - half0.double(), leading.image / sigma - (W @ right.to(W.dtype)).double()
    lost = leading.residuals / sigma
    rho = ((changes[0].square().sum(0) + changes[1].square().sum(0)) / 2).sqrt() + lost
    known = s[: k + 1].cpu().numpy()
    known[k] = np.sqrt(max(float(leading.theta[k]), 0.0) + leading.next_residual)  # as far up as it may lie
    bounds = _small_bounds(known, k, rho.cpu().numpy(), norm + float(lost.max()))
    bounds = bounds - leading.direction_errors(base.is_aligned).cpu().numpy()
    if bounds.min() < question.epsilon + BORDERLINE:
        return None
    matches = tuple(
        Match(j, float(sigma[j]), None, (float(bounds[j]), 1.0), None, None, None, "bound") for j in range(k)
    )
    # One more product takes W1's leading space to W0's, for the norm of W0.
    Z = torch.linalg.qr(W @ half0).Q
    top = float(torch.linalg.matrix_norm(W.T @ Z, 2)) ** 2
    # So small an update leaves the distribution of the singular values as it was.
    return _answer(matches, leading, top, estimated_values(leading.theta, leading.weights, W.shape[0], base.norm_fro))


def _small_bounds(s: np.ndarray, k: int, rho: np.ndarray, norm: float) -> np.ndarray:
    """The best lower bound on max |cos| over windows that hold 1 to 4 values, for each of the top k."""
    bounds = np.zeros(k)
    for j in range(k):
        others = np.sort(np.abs(np.delete(s[: k + 1], j) - s[j]))
        # Of what lies below σ_{k+1} nothing is known but that it lies below.
        reach = np.append(others[others < s[j] - s[k]], s[j] - s[k])
        for g, distance in enumerate(reach[:4], 1):
            eta = min(distance - norm, s[j] * (1 - 1e-6))
            if eta > rho[j]:
                bounds[j] = max(bounds[j], (2 * np.sqrt(1 - (rho[j] / eta) ** 2) - 1) / np.sqrt(g))
    return bounds


def _certified(certificate: Certificate) -> Answer:
    base, weights = certificate.base, certificate.random.square().sum(1)
    values = estimated_values(certificate.theta.flip(0), weights.flip(0), base.W.shape[0], base.norm_fro)
    return _answer(certificate.matches(), certificate.leading, certificate.top, values)


def _answer(matches: tuple[Match, ...], leading: Ritz, top: float, values: np.ndarray | None) -> Answer:
    largest = float(leading.theta[0])
    return Answer(
        matches=matches,
        engine="krylov",
        base_norm_spectral=float(np.sqrt(max(top, 0.0))),
        residual=float(leading.residuals.max()) / largest,
        orthogonality=None,
        settled_in_float64=False,
        methods=("block lanczos",),
        estimated_values=values,
    )
