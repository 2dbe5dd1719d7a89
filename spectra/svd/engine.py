"""What every engine is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from spectra.svd.base import Base
from spectra.svd.spectrum import Side
from spectra.updates.algebra import TunedWeight

DecidedBy = Literal["svd", "certificate", "bound"]


@dataclass(frozen=True)
class Question:
    """Which of the top ``top_k`` vectors of W1 have a cosine below ``epsilon`` with all of W0's?"""

    top_k: int = 10
    epsilon: float = 0.5
    side: Side = "left"


@dataclass(frozen=True)
class Match:
    """One singular vector of W1 against all of W0's.

    Attributes
    ----------
    index : its 0-based rank in W1.
    sigma : its singular value, in the units of W.
    max_cosine : max |cos| over W0's singular vectors (a cluster counts as its subspace), or None.
    bounds : an enclosure of the exact value.
    base_index, base_sigma : the vector of W0 it resembles most, or None.
    base_capture : ‖X_Eᵀ y‖, the share of the vector inside the top base vectors that hold 90 % of
        W0's energy, or None.
    decided_by : how the bounds were obtained.
    flags : "cluster", "base_cluster", "tie_across_k", "null_space".
    """

    index: int
    sigma: float
    max_cosine: float | None
    bounds: tuple[float, float]
    base_index: int | None
    base_sigma: float | None
    base_capture: float | None
    decided_by: DecidedBy
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An engine's answer for one layer.

    Attributes
    ----------
    matches : the compared vectors of W1, by falling singular value.
    engine : the one that answered.
    base_norm_spectral : σ₁ of W0.
    residual : of the decompositions, the larger of both sides', relative to σ₁ (to σ₁² where the
        engine works with W·Wᵀ).
    orthogonality : max |XᵀX − I| of the vectors, where the engine keeps any.
    settled_in_float64 : whether working precision left a verdict open.
    methods : what was run, for the record.
    base_values : (p,) all singular values of W0, descending, or None where they were not computed.
    tuned_values : (p,) those of W1, to float64's accuracy, or None where they were not computed.
    estimated_values : (p,) an estimate of ``base_values`` where these were not computed (:mod:`spectra.svd.density`).
    cosines : (p, q) ⟨x_i, y_j⟩ of all of W0's vectors with W1's leading ones, q at least the number of matches;
        signs are arbitrary, and ties are as they came.  None where they were not computed.
    """

    matches: tuple[Match, ...]
    engine: str
    base_norm_spectral: float
    residual: float
    orthogonality: float | None
    settled_in_float64: bool
    methods: tuple[str, ...]
    base_values: np.ndarray | None = None
    tuned_values: np.ndarray | None = None
    estimated_values: np.ndarray | None = None
    cosines: np.ndarray | None = None


class Engine(Protocol):
    """Answers a :class:`Question` on any number of fine-tunes of one base weight.

    What an engine learns of W0 it leaves in ``base``, so that work on it is done once.
    """

    name: str

    def compare(self, base: Base, tuned: TunedWeight, question: Question) -> Answer: ...
