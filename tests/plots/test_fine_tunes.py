"""Figures that hold fine-tunes against each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from spectra import plots
from spectra.errors import UsageError
from spectra.records.comparison import Comparison
from tests.support.figures import LLAMA, LONG, SEVERAL, STEPS, compared, heights, layer, model, of, points, report


def test_ranks_always_beside_the_size():
    comparison = compared(SEVERAL)
    counts, sizes = plots.counts_by_rank(comparison).axes
    a, b, c, d, *full = comparison.rows()
    for axes, key in ((counts, "intruders"), (sizes, "update_norm_relative")):
        assert points(of(axes, "LoRA")) == [(4, a[key]), (16, b[key])]
        assert points(of(axes, "rsLoRA")) == [(16, c[key])]
        assert points(of(axes, "DoRA")) == [(16, d[key])]
        assert set(heights(axes)) == {row[key] for row in full}
        (band,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx(
            sorted(row[key] for row in full), rel=1e-9
        )
        assert axes.get_xscale() == "log"
    looks = [(of(counts, name).get_marker(), of(counts, name).get_color()) for name in ("LoRA", "rsLoRA", "DoRA")]
    assert len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == 3
    (random,) = [line for line in counts.lines if line.get_label() == "random updates"]
    assert points(random) == [(rank, 2 * 28) for rank in (4, 16, 16, 16)]


def test_ranks_that_are_mixed_or_missing():
    mixed = report([layer("layers.0.q", [0.9], rank=4), layer("layers.0.v", [0.9], rank=12)], rank=None)
    counts, sizes = plots.counts_by_rank(mixed).axes
    assert points(of(counts, "LoRA")) == [(8, 0)]
    assert sizes.get_xlabel().endswith("(mean over layers)")
    with pytest.raises(UsageError, match="no fine-tune has a rank"):
        plots.counts_by_rank(SEVERAL[4:])
    unknown = report([layer("layers.0.q", [0.9], measures={})])
    for draw in (plots.counts_by_rank, plots.size_and_intruders):
        with pytest.raises(UsageError, match="one: the size of the update is not known"):
            draw(unknown)


def test_equal_ranks_are_not_joined():
    same = [model(1, LLAMA, path, seed=place) for place, path in enumerate("ab")]
    counts, _ = plots.counts_by_rank(same).axes
    assert of(counts, "LoRA").get_linestyle() == "None"


def test_trajectory_in_the_order_of_steps():
    order = [3, 0, 2, 1]
    reports = [
        replace(SEVERAL[place], tuned={**SEVERAL[place].tuned, "path": f"run/checkpoint-{100 * place}"})
        for place in order
    ]
    counts, sizes, ranks = plots.trajectory(reports).axes
    mine = SEVERAL[:4]
    assert points(of(counts, "run")) == [(100 * place, one.total("all")) for place, one in enumerate(mine)]
    largest = [max(x.measures["update_norm_relative"] for x in one.layers) for one in mine]
    assert points(of(sizes, "run")) == [(100 * place, value) for place, value in enumerate(largest)]
    mean = [np.mean([x.measures["effective_rank"] for x in one.layers]) for one in mine]
    assert points(of(ranks, "run")) == [(100 * place, pytest.approx(value)) for place, value in enumerate(mean)]


def test_trajectory_needs_steps():
    with pytest.raises(
        UsageError,
        match="one: a trajectory needs the checkpoints of a training run; this name has no step such as checkpoint-200",
    ):
        plots.trajectory([*STEPS, model(1, LLAMA)])
    with pytest.raises(UsageError, match="at least two checkpoints of one run"):
        plots.trajectory(STEPS[:1])


def test_trajectories_of_two_runs():
    other = [replace(one, tuned={**one.tuned, "path": one.tuned["path"].replace("run/", "second/")}) for one in STEPS]
    counts, _, _ = plots.trajectory([*STEPS, *other[:3]]).axes
    assert len(points(of(counts, "run"))) == 6
    assert points(of(counts, "second")) == points(of(counts, "run"))[:3]


def test_overlap_matrix():
    comparison = compared(SEVERAL[:4])
    figure = plots.overlap_matrix(replace(comparison, overlaps=comparison.overlaps[:-1]))
    axes = figure.axes[0]
    values: np.ndarray = np.ma.asarray(axes.images[0].get_array()).filled(np.nan)
    written = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    for a, b in itertools.combinations(range(4), 2):
        if (a, b) == (2, 3):
            assert np.isnan(values[b, a])
            assert written[a, b] == written[b, a] == "–"
            continue
        assert values[b, a] == (a + b) / 30
        assert values[a, b] == 0.02
        assert written[a, b] == f"{(a + b) / 30:.2f}"
        assert written[b, a] == "0.02"
    assert np.isnan(np.diag(values)).all()
    assert "random" in axes.get_title()
    with pytest.raises(UsageError, match="overlaps need at least two"):
        plots.overlap_matrix(replace(comparison, overlaps=()))


@pytest.mark.parametrize("same", [False, True])
def test_sizes_with_labels_that_do_not_collide(same):
    reports = [
        model(3, LLAMA, f"{LONG}-{i}", seed=0 if same else i, size=0.1 if same else 0.1 + i / 500) for i in range(8)
    ]
    figure = plots.size_and_intruders(reports)
    (axes,) = figure.axes
    rows = Comparison(tuple(reports), (), "0").rows()
    dots = [point for line in axes.lines for point in points(line)]
    assert dots == [(row["update_norm_relative"], row["intruders"]) for row in rows]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for x, y in axes.transData.transform(dots):
        assert not any(box.contains(x, y) for box in boxes)


def test_a_wide_range_of_sizes_is_logarithmic():
    small, large = (model(1, LLAMA, path, size=size) for path, size in (("a", 0.001), ("b", 0.3)))
    assert plots.size_and_intruders([small, large]).axes[0].get_xscale() == "log"
    assert plots.size_and_intruders([large]).axes[0].get_xscale() == "linear"
