"""Figures of counts against a threshold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spectra import plots
from spectra.errors import UsageError
from tests.support.figures import LLAMA, SEVERAL, compared, layer, model, of, points, report, vector


def test_epsilon_sweep():
    figure = plots.epsilon_sweep(SEVERAL)
    (axes,) = figure.axes
    for made in SEVERAL:
        line = of(axes, made.tuned["path"].split("/")[1])
        cosines = np.array([v.max_cosine for one in made.layers for v in one.vectors])
        assert len(line.get_xdata()) == 19
        for epsilon, count in points(line):
            assert count == (cosines < epsilon).sum()
    (share,) = axes.child_axes
    figure.draw_without_rendering()
    assert share.get_ylim()[1] == pytest.approx(100 * axes.get_ylim()[1] / 280)
    assert {(0.5, 0.5), (0.15, 0.15)} <= {tuple(np.round(np.asarray(line.get_xdata()), 9)) for line in axes.lines}


def test_epsilon_sweep_of_different_layers_and_an_epsilon_of_its_own():
    reports = [model(2, LLAMA[:1], "a"), model(3, LLAMA[:1], "b")]
    reports = [replace(one, settings={**one.settings, "epsilon": 0.42}) for one in reports]
    counts, shares = plots.epsilon_sweep(reports).axes
    for label, vectors in (("a", 20), ("b", 30)):
        above, below = points(of(counts, label)), points(of(shares, label))
        assert 0.42 in dict(above)
        assert below == [(x, pytest.approx(100 * count / vectors)) for x, count in above]
    bounded = replace(vector(0, 0.4), max_cosine=None, max_cosine_bounds=(0.1, 0.45))
    with pytest.raises(UsageError, match="only known to lie"):
        plots.epsilon_sweep(report([layer("layers.0.q", [0.4], vectors=(bounded,))]))


def test_top_k_sweep():
    counts, shares = plots.top_k_sweep(SEVERAL).axes
    for made in SEVERAL:
        label = made.tuned["path"].split("/")[1]
        wanted = [(k, sum(v.intruder for one in made.layers for v in one.vectors if v.index < k)) for k in range(1, 11)]
        assert points(of(counts, label)) == wanted
        assert points(of(shares, label)) == [(k, pytest.approx(100 * n / (k * 28))) for k, n in wanted]


def test_weight_curve():
    comparison = compared(SEVERAL)
    bare = replace(comparison.reports[-1], layers=SEVERAL[-1].layers)
    comparison = replace(comparison, reports=(*comparison.reports[:-1], bare))
    figure = plots.weight_curve(comparison)
    (axes,) = figure.axes
    for label, made in zip(comparison.labels[:-1], comparison.reports[:-1], strict=True):
        wanted = [(s, sum(min(10, round(one.intruders * s)) for one in made.layers)) for s in (0.25, 0.5, 1, 2)]
        assert points(of(axes, label)) == wanted
    assert [points(line) for line in axes.lines if line.get_label() == "s*"] == [[(0.3, 0)]] * 5
    assert axes.get_xscale() == "log"
    assert [1, 1] in [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"{comparison.labels[-1]} (no weights tried)" in legend
    with pytest.raises(UsageError, match="no counts at other adapter weights"):
        plots.weight_curve(SEVERAL)


def test_different_definitions_do_not_mix():
    for key, value in (("epsilon", 0.4), ("top_k", 5), ("side", "right")):
        other = replace(SEVERAL[0], settings={**SEVERAL[0].settings, key: value})
        with pytest.raises(UsageError, match=f"made with {key} = .*{value}"):
            plots.size_and_intruders([SEVERAL[0], other])
