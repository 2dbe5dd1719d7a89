"""A layer against chance: how large an update must be for its first intruder, and what random ones are drawn from.

Random updates with the singular values of dW say how many intruder dimensions its size and rank alone would bring.
Where they would bring none, none are drawn: θ̄ is the size of a random update's first expected intruder
(:mod:`spectra.analysis.threshold`), and in all but small weights an update has no chance of one where it is below a
third of that and mixes few base vectors with each other (``vectors_mixed``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectra.analysis.null import by_low_rank, null_counts
from spectra.analysis.threshold import predicted_threshold
from spectra.svd import Answer, Question

# Random updates below both had no intruder, of any rank, in weights from 128 on (python -m benchmarks nulls); in
# smaller ones, chance does what means do not predict.
FAINT = 1 / 3  # of the predicted threshold
MIXED = 0.75  # base vectors that the update mixes into a leading one
LEAST_SIZE = 128
REMEMBERED = 4096  # predicted thresholds


@dataclass(frozen=True, eq=False)
class RandomUpdates:
    """What random updates of one layer are drawn from.

    Attributes
    ----------
    base_values : (p,) the singular values of W0, descending.
    update_values : (r,) those of dW.
    shape : (m, n) of the weight.
    seed : of the directions.
    estimated : whether the base's values are an estimate (:mod:`spectra.svd.density`).
    """

    base_values: np.ndarray
    update_values: np.ndarray
    shape: tuple[int, int]
    seed: int
    estimated: bool

    def counts(self, question: Question, draws: int) -> np.ndarray:
        """(draws,) the intruders of each; raises ConvergenceError."""
        return null_counts(self.base_values, self.shape, self.update_values, question, draws=draws, seed=self.seed)

    @property
    def seconds(self) -> float:
        """About what one draw takes on one core: within a factor of three of what was measured on one machine."""
        p, q, r = min(self.shape), max(self.shape), self.update_values.size
        return 2e-3 + 1e-6 * p * (r + 10) if by_low_rank(p, r) else 5e-4 + 6e-10 * p * p * (q + p)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready objects, for the journal of a run."""
        return {
            "base_values": self.base_values.tolist(),
            "update_values": self.update_values.tolist(),
            "shape": list(self.shape),
            "seed": self.seed,
            "estimated": self.estimated,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RandomUpdates:
        m, n = value["shape"]
        base, update = (np.array(value[name], dtype=np.float64) for name in ("base_values", "update_values"))
        return cls(base, update, (int(m), int(n)), int(value["seed"]), bool(value["estimated"]))


@dataclass(frozen=True, eq=False)
class Chance:
    """What is known of a layer's intruders by chance before any random update is drawn.

    Attributes
    ----------
    threshold : θ̄, in the units of W; None where no size brings an intruder, or no spectrum is known.
    below : whether random updates of this size have none.
    open : what to draw them from, where they may have some and that is known.
    reason : why nothing is known.
    """

    threshold: float | None = None
    below: bool = False
    open: RandomUpdates | None = None
    reason: str | None = None


_known: dict[tuple[bytes, tuple[int, int], Question], float | None] = {}


def threshold_of(values: np.ndarray, shape: tuple[int, int], question: Question) -> float | None:
    """The predicted threshold; remembered, since one base has many fine-tunes, and a training many audits."""
    key = (hashlib.blake2b(values.tobytes(), digest_size=16).digest(), shape, question)
    if key not in _known:
        if len(_known) >= REMEMBERED:
            _known.clear()
        _known[key] = predicted_threshold(
            values, shape, epsilon=question.epsilon, top_k=question.top_k, side=question.side
        )
    return _known[key]


def chance_of(
    answer: Answer,
    shape: tuple[int, int],
    size: float,
    top: float,
    update_values: np.ndarray | None,
    question: Question,
    seed: int,
) -> Chance:
    """A layer against chance; ``size`` is ‖dW‖_F, ``top`` ‖dW‖₂, ``update_values`` all of dW's where they are known."""
    estimated = answer.base_values is None
    values = answer.estimated_values if estimated else answer.base_values
    if values is None:
        return Chance(reason="the engine computed no spectrum of the base, nor an estimate of it")
    threshold = threshold_of(values, shape, question)
    if is_faint(values, shape, size, top, threshold, question):
        return Chance(threshold, below=True)
    if update_values is None:
        return Chance(threshold, reason="the engine computed no spectrum of the update")
    return Chance(threshold, open=RandomUpdates(values, update_values, shape, seed, estimated))


def is_faint(
    values: np.ndarray, shape: tuple[int, int], size: float, top: float, threshold: float | None, question: Question
) -> bool:
    """Whether random updates with these norms have no intruder: ‖dW‖_F is ``size``, ‖dW‖₂ ``top``."""
    if not size > 0:
        return True
    if threshold is None or min(shape) < LEAST_SIZE or top >= FAINT * threshold:
        return False
    return vectors_mixed(values, shape, size, question) < MIXED


def vectors_mixed(values: np.ndarray, shape: tuple[int, int], size: float, question: Question) -> float:
    """How many base vectors a random update of Frobenius norm ``size`` mixes into a leading one, at most.

    To first order the i-th singular vector of W0 + R takes up the j-th of W0 with a coefficient whose mean square is

        c_ij = ‖R‖²/(m·n) · (σ_i² + σ_j²)/(σ_i² − σ_j²)²

    and every direction outside their span with ‖R‖²/(m·n)/σ_i² (Stewart & Sun 1990, chapter V).  Vectors that are all
    but tied mix as equals, so each counts at most once; the sum over j is the largest of the ``top_k`` leading i.
    An intruder is spread over at least 1/ε² of them.

    Parameters
    ----------
    values : (p,) the singular values of W0, descending.
    shape : (m, n).
    size : ‖R‖_F, in the same units.
    """
    m, n = shape if question.side == "left" else shape[::-1]
    largest = float(values[0])
    if not largest > 0:
        return float("inf")
    squares = (values / largest) ** 2
    strength = (size / largest) ** 2 / (m * n)
    k = min(question.top_k, squares.size)
    gaps = (squares[:k, None] - squares) ** 2
    gaps[np.arange(k), np.arange(k)] = np.inf
    with np.errstate(divide="ignore"):
        mixed = np.minimum(strength * (squares[:k, None] + squares) / gaps, 1.0).sum(axis=1)
        outside = strength * max(m - squares.size, 0) / squares[:k]
    return float((mixed + outside).max())
