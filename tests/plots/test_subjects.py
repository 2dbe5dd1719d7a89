"""What figures are about: short names, and where in a model a layer is."""

from __future__ import annotations

import pytest

from spectra.plots.style import text_width
from spectra.plots.subjects import depth, fitting
from tests.support.figures import layer


def test_short_names_stay_different():
    def fits(text):
        return len(text) <= 12

    assert fitting(["lora-r1", "lora-r4"], fits) == ["lora-r1", "lora-r4"]
    assert fitting(["model.layers.0.q_proj", "model.layers.1.v_proj"], fits) == ["…0.q…", "…1.v…"]
    cases = [
        [f"{'x' * 30}{i}{'y' * 30}" for i in range(12)],
        [f"{i}{'x' * 60}" for i in range(12)],
        [f"{'x' * 60}{i}" for i in range(12)],
        ["short", "a" * 40, "a" * 41],
        ["a-" * 20, "a-" * 21],
    ]
    for names in cases:
        short = fitting(names, fits)
        assert len(set(short)) == len(names)
        assert all(map(fits, short)), short
    assert fitting(["a-very-long-name-alone"], fits) == ["a-very…alone"]
    assert text_width("iiii") < text_width("WWWW") < 0.6


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("model.layers.3.mlp.experts.7.down_proj", 3),
        ("transformer.h.11.mlp.c_fc", 11),
        ("text_encoders.1.layers.4.q_proj", 4),
        ("down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0", 2),
        ("net.5.weight", 5),
        ("pooler.dense", None),
    ],
)
def test_the_number_of_a_layer(name, at):
    assert depth(layer(name, [0.9])) == at
