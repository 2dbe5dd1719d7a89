"""Figures of where in a model the intruders are: by layer and singular index, by depth and module type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import UsageError
from spectra.plots.style import (
    BLACK,
    BLUE,
    DOUBLE,
    GREEN,
    NORMAL,
    NOVELTY,
    ORANGE,
    PURPLE,
    SINGLE,
    SKY,
    SMALL,
    VERMILLION,
    colour_bar,
    figure_function,
    frame,
    from_zero,
    grid,
    new_figure,
    plain,
    shortened,
    text_width,
    uncertain,
    whole_numbers,
)
from spectra.plots.subjects import FineTunes, as_comparison, definition, depth, total_of
from spectra.records.report import LayerReport, Report
from spectra.records.sweeps import decided

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

TYPES_ACROSS = 8
OTHER = "other types"
# (colour, hatch), so that the parts of a bar differ in black and white too; the last is for all other types.
PARTS = (
    (BLUE, ""), (ORANGE, "////"), (GREEN, "\\\\\\\\"), (SKY, "...."), (VERMILLION, "xxxx"), (PURPLE, "----"),
    (BLACK, ""), ("#FFFFFF", ""),
)  # fmt: skip


@figure_function
def layer_index_counts(source: FineTunes) -> Figure:
    """A map of the intruders: layers downwards, singular indices to the right, a panel a module type.

    Index 0 is the largest singular value, depth the last number in a layer's name ("–" where it has none).  The
    shade is max |cos|: pale is a vector that the fine-tune left as it was, dark one that resembles no pretrained
    vector.  Intruder dimensions carry a mark.  Grey means that the engine decided without computing the cosine,
    and an empty place that there was no vector to compare.  Several fine-tunes make a row of panels each.

    Raises
    ------
    UsageError : no fine-tune, or no layer with vectors.
    """
    comparison = as_comparison(source)
    tables = [_by_type(report) for report in comparison.reports]
    types = sorted({kind for table in tables for kind in table}, key=lambda kind: _order(kind, tables))
    if not types:
        raise UsageError("nothing to draw: no layer has singular vectors that were compared")
    several = len(tables) > 1
    columns = min(len(types), TYPES_ACROSS)
    bands = -(-len(types) // columns)  # rows of panels that a fine-tune takes
    rows = max(len(layers) for table in tables for layers in table.values())
    top_k = comparison.reports[0].settings["top_k"]
    width = SINGLE if columns < 3 and not several else DOUBLE
    names = shortened(comparison.labels, 1.2) if several else [""]
    inches = (width - 1.0 - max(map(text_width, names))) / columns - 0.08
    # All fine-tunes on one page, if they are not too many to be seen there.
    least = 0.45 if several else 0.7
    tall = float(np.clip(0.13 * rows, least, max(least, min(2.4, 8.0 / (bands * len(tables)) - 0.1))))
    titles = _type_names(types, inches)
    lines = max(title.count("\n") + 1 for title in titles)
    above = 0.15 * lines * (bands if bands > 1 else 1)
    figure = new_figure(width, (tall + 0.08) * bands * len(tables) + above * (len(tables) if bands > 1 else 1) + 0.2)
    axes = figure.subplots(bands * len(tables), columns, squeeze=False, sharex=True)
    size = float(np.clip(0.8 * 72 * min(inches / top_k, tall / rows), 0.8, 4.0))
    image = None
    for place, (table, name) in enumerate(zip(tables, names, strict=True)):
        for number in range(bands * columns):
            one = axes[place * bands + number // columns][number % columns]
            layers = table.get(types[number], []) if number < len(types) else []
            first = table.get(types[number - number % columns], [])
            alike = number % columns > 0 and [depth(layer) for layer in layers] == [depth(layer) for layer in first]
            if layers:
                image = _map(one, layers, top_k, size, tall, labelled=not alike)
            else:
                one.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
                one.spines[:].set_visible(False)
            if number < len(types) and (place == 0 or bands > 1):
                one.set_title(titles[number], fontsize=SMALL)
            if number == 0 and several:
                one.set_ylabel(name, fontsize=SMALL, rotation=0, ha="right", va="center")
    colour_bar(figure, image, axes, "max |cos|", tall * bands * len(tables))
    unknown = any(
        vector.max_cosine is None for table in tables for panel in table.values() for x in panel for vector in x.vectors
    )
    frame(
        figure,
        [("intruder dimension", _MARK), *([("cosine not computed", uncertain())] if unknown else [])],
        title=[] if several else [comparison.labels[0], total_of(comparison.reports[0])],
        x=f"index of the singular vector ({definition(comparison)})" + "; rows: depth" * several,
        y="" if several else "depth",
    )
    return figure


# White on the dark cells that it marks.
_MARK: dict[str, Any] = {
    "color": "white", "marker": "v", "linestyle": "none", "markersize": 4, "markeredgewidth": 0.4,
    "markeredgecolor": "black",
}  # fmt: skip


def _order(kind: str, tables: Sequence[Mapping[str, Sequence[LayerReport]]]) -> tuple[bool, str]:
    """Types that recur come first, then the single ones, such as embeddings."""
    return max(len(table.get(kind, ())) for table in tables) < 2, kind


def _type_names(types: Sequence[str], inches: float) -> list[str]:
    """The types as titles, on two lines where one would be too narrow."""
    if all(text_width(kind) <= inches for kind in types):
        return [plain(kind) for kind in types]
    parts = [kind.rpartition(".") for kind in types]
    above = [head if text_width(head) <= inches else shortened([head], inches)[0] for head, _, _ in parts]
    below = shortened([tail for _, _, tail in parts], inches)
    return [f"{plain(head)}\n{tail}" for head, tail in zip(above, below, strict=True)]


def _by_type(report: Report) -> dict[str, list[LayerReport]]:
    """The layers that have vectors, by module type, each type's by depth and name."""
    table: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in decided(report):
        if layer.vectors:
            table[layer.module_type].append(layer)
    return {kind: sorted(layers, key=_place) for kind, layers in sorted(table.items())}


def _place(layer: LayerReport) -> tuple[int, str]:
    at = depth(layer)
    return (-1 if at is None else at, layer.name)


def _map(
    axes: Axes, layers: Sequence[LayerReport], top_k: int, size: float, inches: float, *, labelled: bool
) -> AxesImage:
    """One panel, so many inches high, with marks of a size in points."""
    width = max(top_k, *(vector.index + 1 for layer in layers for vector in layer.vectors))
    values = np.full((len(layers), width), np.nan)
    marks = []
    for row, layer in enumerate(layers):
        for vector in layer.vectors:
            if vector.max_cosine is not None:
                values[row, vector.index] = vector.max_cosine
            else:
                axes.add_patch(uncertain((vector.index - 0.5, row - 0.5)))
            if vector.intruder:
                marks.append((vector.index, row))
    image = axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=NOVELTY, aspect="auto")
    if marks:
        edge = 0.4 if size > 2.5 else 0.0
        axes.plot(*zip(*marks, strict=True), **{**_MARK, "markersize": size, "markeredgewidth": edge})
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    whole_numbers(axes, "x")
    depths = [depth(layer) for layer in layers]
    first = [row for row in range(len(depths)) if row == 0 or depths[row] != depths[row - 1]]
    step = -(-len(first) // max(2, int(inches / 0.16)))
    shown = [row for place, row in enumerate(first) if place % step == 0]
    axes.set_yticks(shown, ["–" if depths[row] is None else str(depths[row]) for row in shown] if labelled else [])
    axes.spines[["top", "right"]].set_visible(True)
    return image


@figure_function
def counts_by_layer(source: FineTunes) -> Figure:
    """How many intruders there are at each depth of the model, by module type; a panel a fine-tune.

    Depth is the last number in a layer's name; layers without one, such as embeddings, stand at "–".  The
    parts of a bar are the module types with the most intruders over all fine-tunes, and the rest in one.

    Raises
    ------
    UsageError : no fine-tune, or no layer that was analysed.
    """
    comparison = as_comparison(source)
    counts = [_by_depth(report) for report in comparison.reports]
    if not any(counts):
        raise UsageError("nothing to draw: no layer was analysed")
    totals: dict[str, int] = defaultdict(int)
    for table in counts:
        for (_, kind), count in table.items():
            totals[kind] += count
    kinds = sorted((kind for kind in totals if totals[kind]), key=lambda kind: (-totals[kind], kind))
    if len(kinds) > len(PARTS):
        kinds = [*kinds[: len(PARTS) - 1], OTHER]
    several = len(counts) > 1
    columns = min(len(counts), 4) if several else 1
    width = DOUBLE if several else SINGLE
    inches = (width - 0.4) / columns - 0.1
    figure = new_figure(width, ((1.25 if several else 2.0) + 0.25) * -(-len(counts) // columns) + 0.1)
    panels = grid(figure, len(counts), columns, sharex=True, sharey=True)
    depths = sorted({at for table in counts for at, _ in table if at is not None})
    loose = any(at is None for table in counts for at, _ in table)
    titles = shortened(comparison.labels, inches - 0.4, NORMAL)
    bars: dict[str, BarContainer] = {}
    for axes, table, report, title in zip(panels, counts, comparison.reports, titles, strict=True):
        _stack(axes, table, kinds, depths, bars)
        _depth_axis(axes, depths, loose)
        if several:
            axes.set_title(f"{title}: {report.total()}")
    from_zero(*panels)
    whole_numbers(panels[0], "y")
    frame(
        figure,
        [(kind, bars[kind]) for kind in kinds],
        title=[] if several else [comparison.labels[0], total_of(comparison.reports[0])],
        x="depth",
        y=f"intruders ({definition(comparison)})",
    )
    return figure


def _by_depth(report: Report) -> dict[tuple[int | None, str], int]:
    """{(depth, module type): intruders}, zeros included."""
    table: dict[tuple[int | None, str], int] = defaultdict(int)
    for layer in decided(report):
        table[depth(layer), layer.module_type] += layer.intruders
    return dict(table)


def _stack(
    axes: Axes,
    table: Mapping[tuple[int | None, str], int],
    kinds: Sequence[str],
    depths: Sequence[int],
    bars: dict[str, BarContainer],
) -> None:
    """One panel's bars, a part a module type; the last takes what is not named."""
    at = [_beside(depths), *depths]
    bottom = np.zeros(len(at))
    for kind, (colour, hatch) in zip(kinds, PARTS, strict=False):
        mine = {name for _, name in table if (name not in kinds if kind == OTHER else name == kind)}
        heights = [
            sum(n for (where, name), n in table.items() if where == one and name in mine) for one in (None, *depths)
        ]
        bars[kind] = axes.bar(
            at, heights, 0.8, bottom=bottom, color=colour, hatch=hatch, edgecolor="black", linewidth=0.3, label=kind
        )
        bottom += heights


def _beside(depths: Sequence[int]) -> float:
    """Where the layers without a depth stand: apart from the first one."""
    return min(depths, default=0) - max(1.5, len(depths) / 16)


def _depth_axis(axes: Axes, depths: Sequence[int], loose: bool) -> None:
    step = max(1, -(-len(depths) // 8))
    step = next((nice for nice in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50) if nice >= step), step)
    shown = [one for one in depths if one % step == 0]
    ticks: list[float] = [_beside(depths)] if loose else []
    axes.set_xticks([*ticks, *shown], ["–"] * loose + [plain(str(one)) for one in shown])
    left = (_beside(depths) if loose else min(depths, default=0)) - 0.7
    axes.set_xlim(left, max(depths, default=_beside(depths)) + 0.7)
