"""Counts at the weights given to an adapter."""

from __future__ import annotations

import pytest

from spectra.analysis.study import weight_curve


@pytest.mark.parametrize(
    ("first", "expected"), [(0.3, 0.3), (1.0, 1.0), (3.99, 3.99), (1e-3, 1e-3), (4.5, None), (0.0, 2.0**-20)]
)
def test_the_first_crossing_is_found_wherever_it_is(first, expected):
    curve = weight_curve(lambda weight: int(weight >= first), int(first <= 1))
    if expected is None:
        assert curve["threshold"] is None
    else:
        assert expected / 1.01 <= curve["threshold"] <= expected * 1.0101
