"""The figures: what is drawn is what the records say, and it can be read."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from spectra import plots
from spectra.errors import UsageError
from spectra.plots.counts import OTHER, PARTS
from spectra.plots.kinds import KINDS
from spectra.plots.style import StyledFigure, look, text_width
from spectra.plots.subjects import depth, fitting
from spectra.records.comparison import Comparison
from tests.support.figures import (
    LLAMA,
    LONG,
    MAGIC,
    SEVERAL,
    SOURCES,
    STEPS,
    arrays,
    compared,
    drawn,
    faults,
    heights,
    layer,
    marks,
    model,
    of,
    points,
    report,
    vector,
)
from tests.support.paths import ROOT

ALL = [
    pytest.param(kind, source, id=f"{name}-{case}")
    for name, kind in KINDS.items()
    for case, source in SOURCES[kind.needs].items()
    if not (name == "overlap" and case == "one")
]


# --- all figures


@pytest.mark.parametrize(("kind", "source"), ALL)
def test_nothing_is_cut_off_or_written_over(kind, source):
    """All text lies within the figure, and no two texts on each other; it is as wide as columns are."""
    figure = drawn(kind, source)
    width, height = figure.get_size_inches()
    assert width in (3.4, 5.0, 7.0)
    assert 1 < height < 13
    assert faults(figure) == []


def test_what_is_cut_off_or_written_over_is_seen():
    figure = plots.epsilon_sweep(SEVERAL[:1])
    assert faults(figure) == []
    figure.axes[0].set_title("a title that is far too long for the one column of a paper " * 2)
    figure.axes[0].text(0.5, -0.02, "over the ticks", transform=figure.axes[0].transAxes, va="top", ha="center")
    kinds = Counter(kind for kind, *_ in faults(figure))
    assert kinds["cut off"] == 1
    assert kinds["written over"] >= 1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_files(kind):
    """The right kinds of file, with fonts in them, and the same bytes each time."""
    one, again = (drawn(kind, SOURCES[kind.needs]["several"]) for _ in range(2))
    for format in plots.FORMATS:
        data = plots.render(one, format)
        assert data.startswith(MAGIC[format])
        assert data == plots.render(one, format)
        assert data == plots.render(again, format)
    svg, pdf = plots.render(one, "svg"), plots.render(one, "pdf")
    assert b"<text" in svg
    assert b"<dc:date>" not in svg
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf


def test_the_callers_settings_are_kept_and_change_nothing():
    wanted = plots.render(plots.epsilon_sweep(SEVERAL), "svg")
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        assert plots.render(plots.epsilon_sweep(SEVERAL), "svg") == wanted
        assert dict(mpl.rcParams) == before


def test_a_figure_saves_itself_with_its_fonts(tmp_path):
    figure = plots.epsilon_sweep(SEVERAL)
    figure.savefig(tmp_path / "figure.pdf")
    assert b"/FontFile2" in (tmp_path / "figure.pdf").read_bytes()
    assert isinstance(figure, StyledFigure)
    assert figure._repr_png_().startswith(MAGIC["png"])


def test_save(tmp_path):
    figure = plots.epsilon_sweep(SEVERAL)
    plots.save(figure, tmp_path / "figure.PDF")
    assert (tmp_path / "figure.PDF").read_bytes() == plots.render(figure, "pdf")
    with pytest.raises(UsageError, match=r"figure\.jpg: expected a name that ends in \.png, \.svg or \.pdf"):
        plots.save(figure, tmp_path / "figure.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.PDF"]
    with pytest.raises(UsageError, match="format = 'gif'"):
        plots.render(figure, "gif")


def test_registry():
    assert list(KINDS) == [
        "similarity", "cosines", "spectra", "layers", "depth", "epsilon", "top-k", "weights", "ranks", "trajectory",
        "overlap", "size",
    ]  # fmt: skip
    for kind in KINDS.values():
        assert getattr(plots, kind.function).__doc__
        assert kind.function in plots.__all__
        assert kind.help
    assert set(plots.__all__) <= set(dir(plots))
    for name in plots.__all__:
        assert getattr(plots, name) is not None
    with pytest.raises(AttributeError, match="pie"):
        _ = plots.pie


def test_what_is_imported():
    """The registry needs no matplotlib; a figure says that it does, and never loads torch."""
    lazy = "import sys, spectra.plots; assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    missing = """
import sys; sys.modules['matplotlib'] = None
from spectra.plots import KINDS
from spectra.errors import UsageError
for kind in KINDS.values():
    try: kind.draw([])
    except UsageError as error: assert str(error).endswith("pip install 'intruder-spectra[plots]'"), error
    else: raise AssertionError
"""
    whole = """
import sys, spectra.plots
for name in spectra.plots.__all__: getattr(spectra.plots, name)
assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)
"""
    for code in (lazy, missing, whole):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_to_draw(kind):
    with pytest.raises(UsageError, match=r"nothing to draw|no overlaps"):
        kind.draw([])


# --- looks


def test_lines_differ_without_colour():
    looks = [look(place) for place in range(12)]
    assert len({one.marker for one in looks}) == 12
    assert len({(str(one.linestyle), one.color) for one in looks}) == 12
    assert all(a.linestyle != b.linestyle for a, b in itertools.pairwise(looks))


def lightness(colour):
    """CIE L* of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_parts_of_bars_differ_without_colour():
    for (one, hatch), (other, pattern) in itertools.combinations(PARTS, 2):
        assert hatch != pattern or abs(lightness(one) - lightness(other)) > 30


@pytest.mark.parametrize("name", ["magma", "magma_r"])
def test_shades_are_even_in_lightness(name):
    levels = [lightness(mpl.colormaps[name](x)[:3]) for x in np.linspace(0, 1, 21)]
    steps = np.diff(levels if name == "magma" else levels[::-1])
    assert (steps > 1.5).all()
    assert (steps < 6.5).all()


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


# --- where the intruders are


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


# --- sweeps


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


# --- fine-tunes against each other


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
    with pytest.raises(UsageError, match="one: no training step in the name; expected one like checkpoint-200"):
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
    with pytest.raises(UsageError, match="no overlaps"):
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
