"""Singular values and vectors of W0 and W1, and the engines that compare them.

To add an engine: a file here with a class that follows :class:`~spectra.svd.engine.Engine`, and a
line in ``ENGINES``.  The contract tests then run on it by themselves.
"""

from __future__ import annotations

from spectra.errors import UsageError
from spectra.svd.engine import Comparison, Engine, Match, Question
from spectra.svd.exact import ExactEngine, check_finite, decompose, decompose_gram, singular_values
from spectra.svd.matching import BORDERLINE, match_vectors
from spectra.svd.spectrum import Side, Spectrum, clusters, numerical_rank

ENGINES: dict[str, type[Engine]] = {"exact": ExactEngine}


def choose_engine(name: str) -> Engine:
    """The engine of that name; "auto" is the exact one, until there is a choice."""
    if name not in ("auto", *ENGINES):
        raise UsageError(f"engine = {name!r}; expected auto or {' or '.join(ENGINES)}")
    return ENGINES["exact" if name == "auto" else name]()


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
