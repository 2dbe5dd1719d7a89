"""The record that the numeric side makes and the report keeps; it needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vector:
    """One singular vector of W1 with its verdict.

    Attributes
    ----------
    index : its 0-based rank in W1; 0 is the largest singular value.
    sigma : its singular value, in the units of W.
    max_cosine : max |cos| over W0's singular vectors, or None where it was not needed.
    max_cosine_bounds : an enclosure of the exact value.
    base_index, base_sigma : the vector of W0 it resembles most, or None.
    base_capture : the norm of its projection on the top base vectors that hold 90 % of W0's energy.
    decided_by : "svd", "certificate" or "bound".
    intruder : the verdict.
    flags : "cluster", "base_cluster", "tie_across_k", "null_space", "borderline".
    """

    index: int
    sigma: float
    max_cosine: float | None
    max_cosine_bounds: tuple[float, float]
    base_index: int | None
    base_sigma: float | None
    base_capture: float | None
    decided_by: str
    intruder: bool
    flags: tuple[str, ...]
