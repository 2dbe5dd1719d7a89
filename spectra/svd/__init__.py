"""Singular values and vectors of W0 and W1, and the engines that compare them.

To add an engine: a file here with a class that follows :class:`~spectra.svd.engine.Engine`, and a
line in ``ENGINES``.  The contract tests then run on it by themselves.
"""

from __future__ import annotations

from torch import Tensor

from spectra.errors import UsageError
from spectra.svd.engine import Comparison, Engine, Match, Question
from spectra.svd.exact import ExactEngine, check_finite, decompose, decompose_gram, singular_values
from spectra.svd.krylov import KrylovBase, KrylovEngine
from spectra.svd.matching import BORDERLINE, match_vectors
from spectra.svd.spectrum import Side, Spectrum, clusters, numerical_rank
from spectra.updates import TunedWeight

# From here on the Krylov engine pays: about 5 times faster than the exact one here, 30 at 4096 (benchmarks/engines.py).
KRYLOV_PAYS = 1024


class AutoEngine:
    """Krylov for large weights, where it can decide, else exact; the verdicts are the same."""

    name = "auto"

    def prepare(self, W0: Tensor, side: Side) -> KrylovBase:
        return KrylovEngine().prepare(W0, side)

    def compare(self, base: KrylovBase, tuned: TunedWeight, question: Question) -> Comparison:
        if min(tuned.shape) < KRYLOV_PAYS:
            return ExactEngine().compare(base.exact, tuned, question)
        return KrylovEngine().compare(base, tuned, question)


ENGINES: dict[str, type[Engine]] = {"auto": AutoEngine, "exact": ExactEngine, "krylov": KrylovEngine}


def choose_engine(name: str) -> Engine:
    """The engine of that name; raises UsageError."""
    if name not in ENGINES:
        raise UsageError(f"engine = {name!r}; expected {', '.join(ENGINES)}")
    return ENGINES[name]()


__all__ = [
    "BORDERLINE",
    "ENGINES",
    "Comparison",
    "Engine",
    "Match",
    "Question",
    "Side",
    "Spectrum",
    "check_finite",
    "choose_engine",
    "clusters",
    "decompose",
    "decompose_gram",
    "match_vectors",
    "numerical_rank",
    "singular_values",
]
