"""Figures of where in a model the intruders are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from spectra import plots
from spectra.errors import UsageError
from spectra.plots.counts import OTHER
from tests.support.figures import LLAMA, layer, marks, model, report, vector


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.images and axes.get_title()}


@pytest.mark.parametrize("depth", [12, 32])
def test_map_of_layers(depth):
    """12 layers of one type, and 224 of seven."""
    types = LLAMA if depth == 32 else LLAMA[:1]
    made = model(depth, types)
    figure = plots.layer_index_counts(made)
    found = panels(figure)
    assert set(found) == set(types)
    for kind, axes in found.items():
        layers = [one for one in made.layers if one.module_type == kind]
        assert len(layers) == depth
        table = np.array([[v.max_cosine for v in one.vectors] for one in layers])
        np.testing.assert_array_equal(axes.images[0].get_array(), table)
        rows, columns = np.nonzero(table < 0.5)
        assert len(rows)
        assert sorted(marks(axes, "white")) == sorted(zip(columns, rows, strict=True))
    assert list(found[types[0]].get_yticks())[:2] == ([0, 2] if depth == 12 else [0, 3])


def test_map_of_layers_sorts_by_depth_and_says_what_is_not_known():
    vague = replace(vector(1, 0.9), max_cosine=None, intruder=True)
    made = report([
        layer("layers.10.q", [0.9, 0.8]),
        layer("layers.9.q", [0.7], vectors=(vector(0, 0.7), vague)),
        layer("pooler.dense", [0.3], intruders=1),
        layer("layers.2.q", [], status="failed"),
    ])  # fmt: skip
    figure = plots.layer_index_counts(made)
    axes = panels(figure)["q"]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), -1)[:, :3], [[0.7, -1, -1], [0.9, 0.8, -1]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["9", "10"]
    assert marks(axes, "white") == [(1, 0)]
    assert [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)] == [(0.5, -0.5)]
    assert [text.get_text() for text in panels(figure)["pooler.dense"].get_yticklabels()] == ["–"]
    assert "cosine not computed" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_map_of_layers_keeps_fine_tunes_apart():
    reports = [model(3, LLAMA[:2], path, seed=place) for place, path in enumerate(("a", "b"))]
    reports[1] = replace(reports[1], layers=reports[1].layers[:1])
    figure = plots.layer_index_counts(reports)
    maps = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    wanted = [
        [[v.max_cosine for v in one.vectors] for one in made.layers if one.module_type == kind]
        for made in reports
        for kind in sorted(LLAMA[:2])
    ]
    assert [len(rows) for rows in wanted] == [3, 3, 0, 1]
    assert len(maps) == 3
    for picture, rows in zip(maps, [rows for rows in wanted if rows], strict=True):
        np.testing.assert_array_equal(picture, rows)


def test_nothing_was_compared():
    made = report([layer("layers.0.q", [], status="failed")])
    with pytest.raises(UsageError, match="no layer has singular vectors"):
        plots.layer_index_counts(made)
    with pytest.raises(UsageError, match="no layer was analysed"):
        plots.counts_by_layer(made)
    with pytest.raises(UsageError, match="runs/one: no layer has vectors"):
        plots.cosine_profile(made)


@pytest.mark.parametrize("kinds", [3, 12])
def test_bars_by_depth(kinds):
    types = [f"type{place}" for place in range(kinds)]
    made = model(6, types, extra=("pooler.dense",))
    figure = plots.counts_by_layer(made)
    (axes,) = figure.axes
    counted: Counter[tuple[object, str]] = Counter()
    for one in made.layers:
        number = None if one.name == "pooler.dense" else int(one.name.split(".")[2])
        counted[number, one.module_type] += one.intruders
    drawn_heights: Counter[tuple[object, str]] = Counter()
    names = [str(bars.get_label()) for bars in axes.containers]
    assert (OTHER in names) == (kinds > 8)
    assert len(names) == min(kinds + 1, 8)
    for bars in axes.containers:
        for bar, number in zip(bars, [None, *range(6)], strict=True):
            drawn_heights[number, str(bars.get_label())] += bar.get_height()
    for number in (None, *range(6)):
        for kind in names:
            mine = {kind} if kind != OTHER else {*types, "pooler.dense"} - set(names)
            assert drawn_heights[number, kind] == sum(counted[number, name] for name in mine)
    assert sum(drawn_heights.values()) == made.total("all")
    tops = [bar.get_y() + bar.get_height() for bars in axes.containers for bar in bars]
    assert max(tops) < axes.get_ylim()[1]
    assert axes.get_xticklabels()[0].get_text() == "–"


def test_bars_share_one_scale():
    few, many = report([layer("layers.0.q", [0.1])], "few"), report([layer("layers.0.q", [0.1] * 10)], "many")
    figure = plots.counts_by_layer([many, few])
    np.testing.assert_allclose([axes.get_ylim() for axes in figure.axes], [(0, 10.7)] * 2)
    assert [axes.get_title() for axes in figure.axes] == ["many: 10", "few: 1"]
