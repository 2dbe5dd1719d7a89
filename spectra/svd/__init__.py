"""Singular values and vectors of W0 and W1, and the engines that compare them.

To add an engine: a file here with a class that follows :class:`~spectra.svd.engine.Engine`, and a
line in ``ENGINES``.  The contract tests then run on it by themselves.
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
