"""A count against chance, in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spectra.render.chance import by_chance, chance_in_words, nearness
from tests.support.figures import layer, report


def facts(how, counts=(), spectrum=None, reason=None):
    return {"how": how, "counts": list(counts), "spectrum": spectrum, "reason": reason}


def made(*of_layers, ratios=None, above=0):
    layers = []
    for place, fact in enumerate(of_layers):
        one = layer(f"layers.{place}.q", np.linspace(0.4, 1, 10))
        ratio = None if ratios is None else ratios[place]
        measures = {**one.measures, "update_over_threshold": ratio, "values_over_threshold": above}
        layers.append(replace(one, expected_by_chance=fact, measures=measures))
    return report(layers)


def test_a_cell():
    drawn = made(facts("drawn", [1, 3], "computed"), facts("below"))
    assert by_chance(drawn.expected_by_chance) == "2.0 ± 1.7"
    assert by_chance(made(facts("below")).expected_by_chance) == "0"
    assert by_chance(made(facts("unknown", reason="?")).expected_by_chance) == "-"
    many = made(*[facts("drawn", [9, 11], "computed")] * 12)
    assert by_chance(many.expected_by_chance) == "120 ± 6"


def test_a_sentence():
    same = "in random updates with the same singular values"
    drawn, below, left = facts("drawn", [1, 3], "computed"), facts("below"), facts("left_out", reason="x")
    assert chance_in_words(made(below, below)) == f"0 {same}: 2 layers changed too little for any"
    assert chance_in_words(made(drawn)) == f"2.0 ± 1.7 {same} (2 drawn for each of 1 layer)"
    assert chance_in_words(made(drawn, below)) == (
        f"2.0 ± 1.7 {same} (2 drawn for each of 1 layer; 1 layer changed too little for any)"
    )
    some = chance_in_words(made(drawn, drawn, left))
    assert "which stand for another 1: the mean is known to ±1.7" in some
    estimated = facts("drawn", [1, 3], "estimated")
    assert chance_in_words(made(estimated)).endswith("; from an estimate of the base's singular values)")
    assert chance_in_words(made(drawn, facts("unknown", reason="no spectrum"))) == (
        "not known: 1 of 2 layers: no spectrum"
    )


def test_how_near_the_first_intruder_is():
    assert nearness(made(facts("below"))) is None, "null is no 0"
    said = nearness(made(facts("below"), facts("below"), ratios=(0.1, 0.25)))
    assert said == ("‖dW‖₂ is at most 0.25 of the size at which a random update has its first intruder (layers.1.q)")
    said = nearness(made(facts("below"), ratios=(2.0,), above=3))
    assert said is not None
    assert said.endswith("; 3 singular values of dW above it")
