"""A question about one weight becomes an answer: the singular vectors of W1 compared with those of W0.

How a verdict is reached
------------------------
Both weights are decomposed by a thin SVD in the working precision.  For each singular triplet the residual ρ is
computed; a computed vector is at most √2·ρ/gap away from the exact one (Davis & Kahan 1970; Wedin 1972).  This bounds
the cosines: from below through the vector that matches best, from above over every window of neighbouring base vectors,
since vectors that float32 mixes share their mass.  If ε lies within the bounds or within 0.001 of them, or if a cluster
takes part, the layer is settled from float64 Gram matrices formed from exact entries.  They are cheaper than a float64
SVD and, down to σ ≈ 10⁻⁵ σ₁, far more accurate than a float32 one: their error is about 10⁻¹⁵ σ₁²/(σ·gap).

That is the *exact* engine, the reference.  Two others answer the same question with less work:

- *cached* decomposes the base once, by the float64 Gram matrix of its shorter side, for any number of fine-tunes (or
  takes what ``spectra cache`` kept).  A low-rank update is then a diagonal plus low-rank eigenproblem (``secular.py``)
  whose eigenvectors are the cosines; inertia proves that none of the top k was missed.  Any other update needs the
  leading vectors of W1 alone.
- *krylov* decomposes nothing.  Block Lanczos (``lanczos.py``) gives the leading vectors of W1, and from these a Krylov
  space of W0 whose residuals decide each vector (``certificate.py``); of a low-rank update that is faint beside W0's
  noise, one space serves both weights (``shared.py``).  How far a Ritz vector may be from its singular vector is
  bounded in ``perturbation.py``, by the distance to what its whole group leaves out.  A converged Ritz vector close to
  y shows that y is no intruder, once the residuals of random columns show that no second singular vector hides beside
  it.  A residual that bounds |⟨y, x⟩| for every unit eigenvector x, marched over the whole spectrum, shows that y is
  one.  On the longer side of a weight the lower end of the spectrum is proven by a Cholesky factorisation.  Where the
  size of the update alone rules intruders out, the layer is "proved small", and its bounds are the proof.

What krylov cannot decide it hands over to cached, and cached to exact, so the answer is always the exact engine's.
``auto`` takes cached where a spectrum is kept or many fine-tunes share a base, krylov for weights from 1024 on, cached
for smaller ones with a low-rank update, else exact; the limits are measured.  That no leading vector of W1 was missed
holds for Lanczos with probability one over its seeded random start.

Neighbouring singular values form a cluster while their gap is at most 8·eps32·σ₁ and the cluster stays within
64·eps32·σ₁, in every precision and engine alike.  σ ≤ max(m, n)·eps32·σ₁ is null space.  Tied tuned vectors are rotated
to resemble the base as much as they can, so that no rotation makes an intruder; a tie across k is counted whole.
``tests/support/reference.py`` says the same in 40 lines and is what every engine is held to.

To add an engine: a file here with a class that follows :class:`~spectra.svd.engine.Engine`, and a line in ``ENGINES``.
The contract tests then run on it by themselves.
"""

from __future__ import annotations

from spectra.errors import UsageError
from spectra.svd.base import Base, short_spectrum
from spectra.svd.cached import CachedEngine
from spectra.svd.decompose import (
    check_finite,
    decompose,
    decompose_gram,
    gram_singular_values,
    product_singular_values,
    product_svd,
    singular_values,
)
from spectra.svd.engine import Answer, Engine, Match, Question
from spectra.svd.exact import ExactEngine
from spectra.svd.krylov import KrylovEngine
from spectra.svd.lanczos import spectral_norm
from spectra.svd.matching import BORDERLINE, cosines_between, match_vectors
from spectra.svd.spectrum import Side, Spectrum, clusters, numerical_rank
from spectra.updates.algebra import TunedWeight

# Measured with benchmarks/engines.py.
CACHED_PAYS = 256  # from here on, for one low-rank update, rather than two decompositions
KRYLOV_PAYS = 1024  # from here on, for one update
CACHE_PAYS = 3e-3  # updates of one base, times this times the size, from which its decomposition pays


class AutoEngine:
    """Whatever is fastest for this weight and the number of its fine-tunes; the verdicts are the same."""

    name = "auto"

    def compare(self, base: Base, tuned: TunedWeight, question: Question) -> Answer:
        return self.choose(base, tuned).compare(base, tuned, question)

    @staticmethod
    def choose(base: Base, tuned: TunedWeight) -> Engine:
        p = min(tuned.shape)
        low_rank = tuned.low_rank() is not None
        if base.has_spectrum or base.fine_tunes > max(2.0, CACHE_PAYS * p):
            return CachedEngine()
        if p >= KRYLOV_PAYS:
            return KrylovEngine()
        return CachedEngine() if low_rank and p >= CACHED_PAYS else ExactEngine()


ENGINES: dict[str, type[Engine]] = {
    "auto": AutoEngine,
    "exact": ExactEngine,
    "krylov": KrylovEngine,
    "cached": CachedEngine,
}


def choose_engine(name: str) -> Engine:
    """The engine of that name; raises UsageError."""
    if name not in ENGINES:
        raise UsageError(f"engine = {name!r}; expected {', '.join(ENGINES)}")
    return ENGINES[name]()


__all__ = [
    "BORDERLINE",
    "ENGINES",
    "Answer",
    "Base",
    "Engine",
    "Match",
    "Question",
    "Side",
    "Spectrum",
    "check_finite",
    "choose_engine",
    "clusters",
    "cosines_between",
    "decompose",
    "decompose_gram",
    "gram_singular_values",
    "match_vectors",
    "numerical_rank",
    "product_singular_values",
    "product_svd",
    "short_spectrum",
    "singular_values",
    "spectral_norm",
]
