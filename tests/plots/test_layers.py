"""Figures of single layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spectra import plots
from spectra.errors import UsageError
from tests.support.figures import arrays, heights, layer, marks, of, points, report, vector

# --- similarity matrices


@pytest.mark.parametrize("shape", [(10, 10), (40, 10), (160, 160), (30, 120)])
def test_similarity_shows_every_entry(shape):
    one = arrays(*shape, intruders=(0, 3, 9))
    figure = plots.similarity_matrix([one])
    axes = figure.axes[0]
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array(), one.cosines)
    assert list(image.get_extent()) == [-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5]
    assert image.get_clim() == (0, 1)
    assert image.get_interpolation() == "nearest"
    assert sorted(marks(axes)) == [(0, 1), (3, 1), (9, 1)]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the largest singular value is at the top
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["intruder dimension" + " (judged: the leading 10)" * (shape[1] > 10)]


def test_similarity_keeps_a_thin_diagonal():
    size = 3000
    one = replace(arrays(10, 10), cosines=np.eye(size) * 0.9)
    figure = plots.similarity_matrix([one])
    axes = figure.axes[0]
    picture = np.asarray(axes.images[0].get_array())
    step = -(-size // len(picture))
    assert 1 < step < 12
    np.testing.assert_array_equal(picture, np.eye(len(picture)) * 0.9)
    plots.render(figure, "png")
    pixels = axes.get_window_extent().width * 200 / figure.dpi
    assert len(picture) <= pixels  # so that drawing leaves none out
    assert marks(axes) == [(1, 1), (4, 1)]


def test_similarity_panels_have_one_scale_and_their_own_marks():
    layers = [arrays(tuned=str(place), seed=place, intruders=(place,)) for place in range(5)]
    figure = plots.similarity_matrix(layers)
    assert len(figure.axes) == 5 + 1
    for place, axes in enumerate(figure.axes[:5]):
        np.testing.assert_array_equal(axes.images[0].get_array(), layers[place].cosines)
        assert marks(axes) == [(place, 1)]
        assert axes.get_title() == str(place)
    assert figure.axes[5].get_ylabel() == "|cos|"
    assert figure.get_suptitle() == "model.layers.0.q"


def test_similarity_of_different_sides():
    with pytest.raises(UsageError, match="left and right"):
        plots.similarity_matrix([arrays(), replace(arrays(), side="right")])
    figure = plots.similarity_matrix([replace(arrays(), side="right")])
    assert any(text.get_text().startswith("right singular vector") for text in figure.texts)


# --- cosine profiles


def test_profile_of_layers():
    layers = [arrays(tuned="a", intruders=(2, 5)), arrays(tuned="b", intruders=())]
    (axes,) = plots.cosine_profile(layers).axes
    for one in layers:
        line = of(axes, one.tuned)
        assert points(line) == [(v.index, v.max_cosine) for v in one.vectors]
        assert line.get_markerfacecolor() == "white"
    filled = [points(line) for line in axes.lines if line.get_linestyle() == "None"]
    assert filled == [[(2, 0.2), (5, 0.2)], []]
    assert 0.5 in heights(axes)


def test_profile_of_fine_tunes():
    made = report(
        [layer("layers.0.q", [0.9, 0.3, 0.8]), layer("layers.1.q", [0.7, 0.6, 0.1]), layer("layers.2.q", [0.2] * 3)]
    )
    (axes,) = plots.cosine_profile(made).axes
    assert sorted(marks(axes)) == [(0, 0.2), (1, 0.2), (1, 0.3), (2, 0.1), (2, 0.2)]
    medians = [(0, 0.7), (1, 0.3), (2, 0.2)]
    assert medians in [points(line) for line in axes.lines]
    assert {0.5, 0.15} <= set(heights(axes))  # epsilon, and a random direction


def test_cosines_that_were_only_bounded():
    vectors = (replace(vector(0, 0.4), max_cosine=None, max_cosine_bounds=(0.1, 0.45)),)
    for source in ([replace(arrays(), vectors=vectors)], [report([layer("layers.0.q", [0.4], vectors=vectors)])]):
        with pytest.raises(UsageError, match=r"vector 0 is only known to lie in \[0.10, 0.45\]; use the exact"):
            plots.cosine_profile(source)
    null = replace(vectors[0], flags=("null_space",), intruder=False)
    (axes,) = plots.cosine_profile([replace(arrays(), vectors=(null, vector(1, 0.8)))]).axes
    assert points(axes.lines[0]) == [(1, 0.8)]


# --- singular values


def test_spectra():
    layers = [arrays(tuned="lora"), arrays(tuned="full", dense=True)]
    figure = plots.spectra(layers)
    for one, axes in zip(layers, figure.axes, strict=True):
        base, tuned, update = axes.lines[:3]
        for line, values in ((base, one.base_values), (tuned, one.tuned_values), (update, one.update_values)):
            np.testing.assert_array_equal(line.get_ydata(), values)
            np.testing.assert_array_equal(line.get_xdata(), np.arange(values.size))
        assert marks(axes) == [(index, one.tuned_values[index]) for index in (1, 4)]
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        assert low < one.update_values.min() < one.tuned_values.max() < high
    assert [heights(axes) for axes in figure.axes] == [[], [0.2]]
    assert "noise floor of ΔW" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_spectra_leave_out_rounding_but_not_a_small_update():
    values = np.array([4.0, 2.0, 1e-15])
    (axes,) = plots.spectra(
        [replace(arrays(k=2), base_values=values, tuned_values=values, update_values=values / 1e5)]
    ).axes
    base, _, update = axes.lines[:3]
    assert points(base) == [(0, 4), (1, 2)]
    assert points(update) == [(0, 4e-5), (1, 2e-5)]
    assert axes.get_ylim()[0] < 2e-5
    (axes,) = plots.spectra([replace(arrays(), update_values=np.zeros(3))]).axes
    assert points(axes.lines[2]) == []
    zero = np.zeros(30)
    with pytest.raises(UsageError, match=r"one: model\.layers\.0\.q: all singular values are zero"):
        plots.spectra([replace(arrays(), base_values=zero, tuned_values=zero, update_values=zero)])
