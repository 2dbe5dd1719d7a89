"""How many intruder dimensions random updates with the same singular values would have: a report's count by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot
from statistics import fmean, variance
from typing import Any

NOT_DRAWN = "no random updates were drawn"


@dataclass(frozen=True)
class ExpectedByChance:
    """The intruders of random updates with the singular values of dW in each judged layer.

    Attributes
    ----------
    intruders : their mean total; None where it is not known, which ``reason`` explains.
    deviation : the standard deviation of a random total.
    error : the standard error of ``intruders``, of which few draws, and layers that were left out, leave some.
    drawn : layers of which random updates were drawn; ``draws`` of them each.
    below : layers in which none are expected, since dW is too small: they count as 0.
    left_out : layers that count as the drawn ones do on average, since drawing them would take too long.
    unknown : layers of which nothing is known.
    spectra : "computed", or "estimated" where the base's singular values are an estimate in some layer.
    """

    intruders: float | None
    deviation: float | None
    error: float | None
    drawn: int
    draws: int
    below: int
    left_out: int
    unknown: int
    spectra: str | None
    reason: str | None

    @property
    def spread(self) -> float | None:
        """How far a random total lies from ``intruders``: the standard deviation of both together."""
        if self.deviation is None or self.error is None:
            return None
        return hypot(self.deviation, self.error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def expected_by_chance(facts: Sequence[Mapping[str, Any] | None]) -> ExpectedByChance:
    """That of the layers that a report judges, each with its ``expected_by_chance``."""
    how = Counter("unknown" if fact is None else fact["how"] for fact in facts)
    counts = [fact["counts"] for fact in facts if fact is not None and fact["how"] == "drawn"]
    estimated = any(fact is not None and fact["spectrum"] == "estimated" for fact in facts)
    reason = None
    if not facts:
        reason = "no layer is judged"
    elif how["unknown"]:
        reasons = dict.fromkeys(fact["reason"] if fact is not None else NOT_DRAWN for fact in facts if _unknown(fact))
        reason = f"{how['unknown']} of {len(facts)} layers: {'; '.join(map(str, reasons))}"
    elif how["left_out"] and not counts:
        reason = "one random update alone would take longer than the audit allows"
    number, means = len(counts), list(map(fmean, counts))
    scale = 1 + how["left_out"] / number if number else 1.0
    within = scale * sum(map(_variance, counts))  # variance of a random total
    # Of the mean: by the draws of each layer, and by the choice of layers (Cochran 1977, chapter 10).
    squared = scale * sum(_variance(drawn) / len(drawn) for drawn in counts)
    squared += number * scale * (scale - 1) * _variance(means)
    return ExpectedByChance(
        intruders=None if reason else scale * sum(means),
        deviation=None if reason else within**0.5,
        error=None if reason else squared**0.5,
        drawn=number,
        draws=len(counts[0]) if counts else 0,
        below=how["below"],
        left_out=how["left_out"],
        unknown=how["unknown"],
        spectra="estimated" if estimated else "computed" if counts else None,
        reason=reason,
    )


def _unknown(fact: Mapping[str, Any] | None) -> bool:
    return fact is None or bool(fact["how"] == "unknown")


def _variance(counts: Sequence[float]) -> float:
    return float(variance(counts)) if len(counts) > 1 else 0.0
