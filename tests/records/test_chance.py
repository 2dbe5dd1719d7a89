"""The total of random updates, by hand."""

from __future__ import annotations

import pytest

from spectra.records.chance import NOT_DRAWN, expected_by_chance


def fact(how, counts=(), spectrum=None, reason=None):
    return {"how": how, "counts": list(counts), "spectrum": spectrum, "reason": reason}


BELOW = fact("below")
LEFT = fact("left_out", reason="left out")


def test_layers_add_up():
    found = expected_by_chance([fact("drawn", [1, 3], "computed"), fact("drawn", [4, 4], "computed"), BELOW])
    assert found.intruders == 6.0
    assert found.deviation == pytest.approx(2**0.5)
    assert found.error == pytest.approx(1.0)  # √(2/2)
    assert (found.drawn, found.draws, found.below, found.left_out, found.unknown) == (2, 2, 1, 0, 0)
    assert (found.spectra, found.reason) == ("computed", None)


def test_layers_that_were_left_out_count_as_the_others_do():
    found = expected_by_chance([fact("drawn", [1, 3], "computed"), fact("drawn", [4, 4], "computed"), LEFT, LEFT])
    assert found.intruders == 12.0
    assert found.deviation == pytest.approx(2.0)  # twice the variance
    # scale·Σ s²/m + n·scale·(scale − 1)·s₁², with means 2 and 4
    assert found.error == pytest.approx((2 * 1 + 2 * 2 * 1 * 2) ** 0.5)
    assert (found.drawn, found.left_out) == (2, 2)


def test_what_is_not_known_is_no_zero():
    unknown = fact("unknown", reason="no spectrum")
    for layers, reason in (
        ([fact("drawn", [1, 3], "computed"), unknown], "1 of 2 layers: no spectrum"),
        ([None, unknown, BELOW], f"2 of 3 layers: {NOT_DRAWN}; no spectrum"),
        ([LEFT, BELOW], "one random update alone would take longer than the audit allows"),
        ([], "no layer is judged"),
    ):
        found = expected_by_chance(layers)
        assert found.intruders is found.deviation is found.error is None
        assert found.reason == reason


def test_updates_too_small_for_any():
    found = expected_by_chance([BELOW, BELOW])
    assert (found.intruders, found.deviation, found.error, found.draws, found.spectra) == (0, 0, 0, 0, None)


def test_one_estimate_makes_an_estimate():
    found = expected_by_chance([fact("drawn", [1, 3], "computed"), fact("drawn", [4, 4], "estimated")])
    assert found.spectra == "estimated"
    assert found.to_dict()["spectra"] == "estimated"
