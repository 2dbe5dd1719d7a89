"""Figures of single layers: which vectors resemble which, and the singular values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import UsageError
from spectra.plots.style import (
    BLACK,
    COSINES,
    DOUBLE,
    DPI,
    GREEN,
    GREY,
    INTRUDER,
    ORANGE,
    SINGLE,
    colour_bar,
    figure_function,
    frame,
    grid,
    log_ticks,
    look,
    new_figure,
    shortened,
    whole_numbers,
)
from spectra.plots.subjects import FineTunes, as_comparison, panel_names, total_of
from spectra.records.comparison import Comparison
from spectra.records.layer import LayerSpectra, Vector
from spectra.records.report import Report
from spectra.records.sweeps import decided

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARETDOWN, TICKUP = 7, 2  # matplotlib's numbers for markers that stand on their point
ACROSS = 4  # panels side by side on two columns
INTRUDER_MARK: dict[str, Any] = {
    "color": INTRUDER, "marker": "v", "linestyle": "none", "markersize": 4.5, "markeredgewidth": 0,
}  # fmt: skip
THRESHOLD: dict[str, Any] = {"color": BLACK, "linestyle": (0, (4, 2)), "linewidth": 0.7}
FLOOR: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 1.5)), "linewidth": 0.9}
EPS32 = float(np.finfo(np.float32).eps)  # a singular value this far below the largest is rounding


@figure_function
def similarity_matrix(layers: Sequence[LayerSpectra]) -> Figure:
    """The |cos| of every singular vector of W0 + dW with every one of W0, a panel a layer.

    Rows are the pretrained vectors, columns the tuned ones, the largest singular value at the top left.
    A vector that the fine-tune left alone is a dark cell on the diagonal; one that changed places with its
    neighbours is a dark cell beside it; an **intruder dimension is a pale column**, spread over many pretrained
    vectors and close to none, and carries a mark above it.  Only the leading columns were judged, which the
    legend says.

    Where a panel has fewer pixels than the matrix has entries, each pixel shows the largest |cos| of its
    block, so that a thin diagonal never fades.

    Raises
    ------
    UsageError : no layer, or different sides.
    """
    shared, names = panel_names(layers)
    sides = {layer.side for layer in layers}
    if len(sides) > 1:
        raise UsageError("left and right singular vectors do not go into one figure")
    columns = min(len(layers), ACROSS)
    width = SINGLE if len(layers) == 1 else DOUBLE
    inches = (width - 0.95) / columns - 0.25
    shape = np.max([layer.cosines.shape for layer in layers], axis=0)
    tall = inches * float(np.clip(shape[0] / shape[1], 0.7, 1.3))
    lines = max(name.count("\n") + 1 if name else 0 for name in names)
    figure = new_figure(width, (tall + 0.32 + 0.14 * lines) * -(-len(layers) // columns) + 0.1)
    alike = len({layer.cosines.shape for layer in layers}) == 1
    axes = grid(figure, len(layers), columns, sharex=alike, sharey=alike)
    titles = _titles(names, inches)
    mark = _column_mark(inches * 72 / max(layer.cosines.shape[1] for layer in layers))
    for one, layer, title in zip(axes, layers, titles, strict=True):
        image = _matrix(one, layer.cosines, int(0.9 * inches * DPI["png"]))
        intruders = [vector.index for vector in layer.vectors if vector.intruder]
        (marks,) = one.plot(
            intruders, [1.0] * len(intruders), **mark, transform=one.get_xaxis_transform(), clip_on=False, zorder=5
        )
        marks.set_in_layout(False)  # where there are none, matplotlib takes them to be in the figure's corner
        one.set_title(title, pad=8)
    side = "" if sides == {"left"} else "right "
    colour_bar(figure, image, axes, "|cos|", tall * -(-len(layers) // columns))
    frame(
        figure,
        [(_judged(layers), mark)],
        title=[shared],
        x=f"{side}singular vector of $W_0 + \\Delta W$",
        y=f"{side}singular vector of $W_0$",
    )
    return figure


def _titles(names: Sequence[str], inches: float) -> list[str]:
    """The panels' names, each line of them as wide as a panel."""
    lines = zip(*(name.split("\n") for name in names), strict=True)
    return ["\n".join(parts) for parts in zip(*(shortened(line, inches, 8) for line in lines), strict=True)]


def _judged(layers: Sequence[LayerSpectra]) -> str:
    counts = {len(layer.vectors) for layer in layers}
    whole = all(len(layer.vectors) >= layer.cosines.shape[1] for layer in layers)
    return "intruder dimension" if whole else f"intruder dimension (judged: the leading {max(counts)})"


def _column_mark(points: float) -> dict[str, Any]:
    """What stands on a column so many points wide: a triangle, or a tick where that would hide its neighbours."""
    if points >= 3:
        return {**INTRUDER_MARK, "marker": CARETDOWN, "markersize": min(points, 5.0)}
    return {**INTRUDER_MARK, "marker": TICKUP, "markersize": 5, "markeredgewidth": max(0.6, points)}


def _matrix(axes: Axes, cosines: np.ndarray, pixels: int) -> Any:
    """The picture of a matrix on axes that are so many pixels wide; index 0 at the top left."""
    blocks = [max(1, -(-size // pixels)) for size in cosines.shape]
    for axis, block in enumerate(blocks):
        if block > 1:
            cosines = np.maximum.reduceat(cosines, np.arange(0, cosines.shape[axis], block), axis=axis)
    rows, columns = (size * block for size, block in zip(cosines.shape, blocks, strict=True))
    image = axes.imshow(
        cosines, vmin=0, vmax=1, cmap=COSINES, aspect="auto", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5)
    )
    whole_numbers(axes, "x")
    whole_numbers(axes, "y")
    axes.spines[["top", "right"]].set_visible(True)
    return image


@figure_function
def cosine_profile(source: Sequence[LayerSpectra] | FineTunes) -> Figure:
    """How much each leading tuned vector resembles the pretrained one that it resembles most.

    max |cos| against the index of the singular vector, 0 for the largest singular value.  1 is a vector that
    is still there; below the dashed line ε it is an intruder dimension.

    - Of layers: a line each, filled markers for intruders.
    - Of fine-tunes: a panel each with a thin line a layer and their median, a triangle an intruder; the dotted
      line is what a random direction would reach on average in the layer where that is highest.  Near it a
      vector has nothing to do with the base at all.

    Raises
    ------
    UsageError : nothing to draw, or cosines that the engine only bounded.
    """
    if isinstance(source, Comparison | Report):
        return _profile_of_fine_tunes(source)
    layers = [one for one in source if isinstance(one, LayerSpectra)]
    return (
        _profile_of_layers(layers) if layers else _profile_of_fine_tunes([x for x in source if isinstance(x, Report)])
    )


def _profile_of_layers(layers: Sequence[LayerSpectra]) -> Figure:
    shared, names = panel_names(layers)
    epsilons = sorted({layer.epsilon for layer in layers})
    figure = new_figure(SINGLE, 2.2)
    axes = figure.add_subplot()
    for place, layer in enumerate(layers):
        at = [(vector.index, cosine) for vector in layer.vectors if (cosine := _cosine(vector, layer.name)) is not None]
        own = look(place)
        axes.plot(*zip(*at, strict=True), **own.line, markerfacecolor="white", label=names[place])
        axes.plot(*_points(layer.vectors, layer.name), **own.dot)
    for epsilon in epsilons:
        axes.axhline(epsilon, **THRESHOLD)
    floors = [layer.random_floor for layer in layers if layer.random_floor is not None]
    if floors:
        axes.axhline(max(floors), **FLOOR)
    _profile_axes(axes)
    axes.set_xlabel("index of the singular vector of $W_0 + \\Delta W$")
    axes.set_ylabel("max |cos| with $W_0$'s")
    entries = [(name.replace("\n", ": "), {**look(i).line, "markerfacecolor": "white"}) for i, name in enumerate(names)]
    key: list[tuple[str, dict[str, Any]]] = [
        ("filled: intruder", {"color": GREY, "marker": "o", "linestyle": "none"}),
        (f"ε = {', '.join(f'{epsilon:g}' for epsilon in epsilons)}", THRESHOLD),
        *([("random direction", FLOOR)] if floors else []),
    ]
    frame(figure, (entries if len(layers) > 1 else []) + key, title=[shared])
    return figure


def _profile_of_fine_tunes(source: FineTunes) -> Figure:
    comparison = as_comparison(source)
    count = len(comparison.reports)
    columns = min(count, ACROSS)
    width = SINGLE if count == 1 else DOUBLE
    inches = (width - 0.5) / columns - 0.1
    tall = 1.7 if count == 1 else min(inches, 1.5)
    figure = new_figure(width, (tall + 0.35) * -(-count // columns) + 0.25)
    panels = grid(figure, count, columns, sharex=True, sharey=True)
    titles = shortened(comparison.labels, inches, 8)
    for axes, report, title in zip(panels, comparison.reports, titles, strict=True):
        layers = [layer for layer in decided(report) if layer.vectors]
        if not layers:
            raise UsageError(f"{report.tuned.get('path')}: no layer has vectors to draw")
        columns_of: dict[int, list[float]] = {}
        for layer in layers:
            known = [(v.index, c) for v in layer.vectors if (c := _cosine(v, layer.name)) is not None]
            axes.plot(*zip(*known, strict=True), color="#C8C8C8", linewidth=0.4, zorder=1)
            axes.plot(*_points(layer.vectors, layer.name), **INTRUDER_MARK, alpha=0.8, zorder=4)
            for index, cosine in known:
                columns_of.setdefault(index, []).append(cosine)
        medians = [(index, median(values)) for index, values in sorted(columns_of.items())]
        axes.plot(*zip(*medians, strict=True), **_MEDIAN)
        axes.axhline(report.settings["epsilon"], **THRESHOLD)
        floors = [layer.random_floor for layer in layers if layer.random_floor is not None]
        if floors:
            axes.axhline(max(floors), **FLOOR)
        axes.set_title(title if count > 1 else "")
        _profile_axes(axes)
    frame(
        figure,
        [
            ("a layer", {"color": "#C8C8C8", "linewidth": 0.8}),
            ("median of the layers", _MEDIAN),
            ("intruder dimension", INTRUDER_MARK),
            (f"ε = {comparison.reports[0].settings['epsilon']:g}", THRESHOLD),
            ("random direction", FLOOR),
        ],
        title=[comparison.labels[0], total_of(comparison.reports[0])] if count == 1 else [],
        x="index of the singular vector of $W_0 + \\Delta W$",
        y="max |cos| with $W_0$'s",
    )
    return figure


_MEDIAN: dict[str, Any] = {"color": BLACK, "marker": "o", "markersize": 3, "zorder": 3}


def _cosine(vector: Vector, name: str) -> float | None:
    """None for a vector of the null space, which has none."""
    if vector.max_cosine is None and "null_space" not in vector.flags:
        lower, upper = vector.max_cosine_bounds
        raise UsageError(
            f"{name}: the cosine of vector {vector.index} is only known to lie in [{lower:.2f}, {upper:.2f}]; "
            "use the exact or the cached engine"
        )
    return vector.max_cosine


def _points(vectors: Sequence[Vector], name: str) -> tuple[list[int], list[float]]:
    """The intruders' indices and cosines."""
    points = [(v.index, c) for v in vectors if v.intruder and (c := _cosine(v, name)) is not None]
    return [index for index, _ in points], [cosine for _, cosine in points]


def _profile_axes(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)
    whole_numbers(axes, "x")


@figure_function
def spectra(layers: Sequence[LayerSpectra]) -> Figure:
    """The singular values of W0, of W0 + dW and of the update dW itself, a panel a layer.

    The vertical axis is logarithmic; the index axis is linear near 0 and logarithmic beyond, so that the
    leading values have room beside thousands of others.  Where the spectrum of W0 + dW lies on that of W0 the
    update changed nothing; intruder dimensions, triangles, lift it at the front.  The spectrum of dW ends at
    its rank, or falls into the noise floor (dash-dotted; of a dense update): what is below it cannot be told
    from noise.

    Raises
    ------
    UsageError : no layer, or one of zeros alone.
    """
    shared, names = panel_names(layers)
    for layer in layers:
        if not layer.tuned_values[:1].any():
            raise UsageError(f"{layer.tuned}: {layer.name}: all singular values are zero")
    count = len(layers)
    columns = min(count, 3)
    width = SINGLE if count == 1 else DOUBLE
    inches = (width - 0.5) / columns - 0.15
    tall = 2.0 if count == 1 else 1.6
    lines = max(name.count("\n") + 1 if name else 0 for name in names)
    figure = new_figure(width, (tall + 0.2 + 0.14 * lines) * -(-count // columns) + 0.1)
    panels = grid(figure, count, columns, sharex=True, sharey=True)
    lowest: list[float] = []
    longest = max(layer.base_values.size for layer in layers)
    for axes, layer, title in zip(panels, layers, _titles(names, inches), strict=True):
        for values, how in (
            (layer.base_values, _BASE),
            (layer.tuned_values, _TUNED),
            (layer.update_values, _UPDATE),
        ):
            held = values[values > EPS32 * layer.tuned_values[0]]
            lowest.extend(held[-1:])
            dots = _DOTS if how is _UPDATE and held.size <= 64 else {}
            axes.plot(np.arange(held.size), held, **how, **dots)
        intruders = [vector.index for vector in layer.vectors if vector.intruder]
        axes.plot(intruders, layer.tuned_values[intruders], **INTRUDER_MARK, zorder=5)
        if layer.noise_edge is not None:
            axes.axhline(layer.noise_edge, **_EDGE)
        axes.set_title(title)
        axes.set_xscale("asinh", linear_width=10)
        ticks = [tick for tick in _INDICES if tick < longest]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.7, longest * 1.1)
    top = max(float(max(layer.tuned_values[0], layer.base_values[0])) for layer in layers)
    least = max(min(map(_bottom, layers)), min(lowest))
    for axes in panels:  # each, since what they share does not include how ticks are labelled
        log_ticks(axes, "y", least / 1.4, top * 1.4)
    entries = [("W₀", _BASE), ("W₀ + ΔW", _TUNED), ("ΔW", {**_UPDATE, **_DOTS})]
    entries.append(("intruder dimension", INTRUDER_MARK))
    if any(layer.noise_edge is not None for layer in layers):
        entries.append(("noise floor of ΔW", _EDGE))
    frame(figure, entries, title=[shared], x="index of the singular value", y="singular value")
    return figure


def _bottom(layer: LayerSpectra) -> float:
    """Where the axis ends: four decades below the largest value, two below the update's if it is small."""
    largest = float(layer.tuned_values[0])
    update = float(layer.update_values[0]) if layer.update_values.size else 0.0
    return min(1e-4 * largest, 1e-2 * update) if update > EPS32 * largest else 1e-4 * largest


_INDICES = (0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_BASE: dict[str, Any] = {"color": BLACK, "linestyle": (0, (3, 1.5)), "linewidth": 0.9, "zorder": 4}
_TUNED: dict[str, Any] = {"color": ORANGE, "linestyle": "-", "linewidth": 1.6, "zorder": 3}
_UPDATE: dict[str, Any] = {"color": GREEN, "linestyle": "-", "linewidth": 0.9}
_DOTS: dict[str, Any] = {"marker": ".", "markersize": 3}
_EDGE: dict[str, Any] = {"color": GREEN, "linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 0.7}
