"""What the page's script works on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectra
from spectra.page.data import STEPS, depths, distinct, facets, steps_of
from tests.support.pages import data_of
from tests.support.paths import FIXTURES
from tests.support.reports import layer


@pytest.fixture(scope="module")
def audited():
    return spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base")


def test_what_is_embedded_says_what_the_report_says(audited):
    (found,) = data_of(spectra.to_html(audited))["reports"]
    assert [one["name"] for one in found["layers"]] == [one.name for one in audited.layers]
    for mine, theirs in zip(found["layers"], audited.layers, strict=True):
        assert tuple(mine.get("intruder", ())) == theirs.intruder_indices
        for steps, vector in zip(mine["cosine"], theirs.vectors, strict=True):
            assert 0 <= vector.max_cosine - steps / STEPS < 1.1 / STEPS


@given(st.floats(0, 1), st.integers(1, STEPS))
def test_whole_steps_count_as_floats_do(cosine, epsilon):
    """c < ε just where its steps are below ε's, for every ε of four decimals."""
    assert (steps_of(cosine) < epsilon) == (cosine < epsilon / STEPS)


@pytest.mark.parametrize("epsilon", [0.29, 0.57, 0.58, 0.5, 1.0, 0.0001])
def test_a_cosine_that_is_epsilon_is_not_below_it(epsilon):
    assert steps_of(epsilon) == round(epsilon * STEPS)
    assert steps_of(np.nextafter(epsilon, 0)) == round(epsilon * STEPS) - 1


def test_panels_and_blocks():
    layers = [
        *(layer(f"layers.{i}.self_attn.{name}", module_type=f"self_attn.{name}") for i in range(3) for name in "qk"),
        layer("layers.0.mlp.experts.7.up", module_type="mlp.experts.up"),
        layer("lm_head"),
        layer("unchanged", vectors=()),
    ]  # fmt: skip
    found = facets(layers)
    assert [panel["title"] for panel in found] == ["self_attn.q", "self_attn.k", None]
    assert found[0] == {"title": "self_attn.q", "layers": [0, 2, 4], "labels": ["0", "1", "2"]}
    assert found[2]["layers"] == [6, 7]
    assert depths(layers) == [
        {"label": "0", "layers": [0, 1, 6]}, {"label": "1", "layers": [2, 3]}, {"label": "2", "layers": [4, 5]},
    ]  # fmt: skip
    assert distinct(["a.0.b", "a.0.b"]) == ["a.0.b", "a.0.b"]
    assert distinct(["encoder.block.3.q", "decoder.block.3.q"]) == ["encoder", "decoder"]
