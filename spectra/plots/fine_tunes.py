"""Figures that hold fine-tunes against each other: rank, training step, size, and shared directions."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import PurePath
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import UsageError
from spectra.plots.placing import label_points
from spectra.plots.style import (
    BLACK,
    BLUE,
    COSINES,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SINGLE,
    SMALL,
    VERMILLION,
    Look,
    colour_bar,
    figure_function,
    frame,
    from_zero,
    log_ticks,
    look,
    new_figure,
    shortened,
    text_width,
    whole_numbers,
)
from spectra.plots.subjects import FineTunes, as_comparison, definition
from spectra.records.comparison import Comparison, short_names
from spectra.records.report import Report
from spectra.records.sweeps import decided

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = "$\\Vert\\Delta W\\Vert_F\\,/\\,\\Vert W_0\\Vert_F$"
RANDOM: dict[str, Any] = {
    "color": GREY, "marker": "_", "linestyle": "none", "markersize": 9, "markeredgewidth": 1.4,
}  # fmt: skip
FULL: dict[str, Any] = {"color": BLACK, "linestyle": (0, (6, 2)), "linewidth": 0.9}
# How each method is written, and its look; a format that is not named here takes the next free one.
METHODS = {
    "peft-lora": ("LoRA", Look(BLUE, "o", "-")),
    "peft-rslora": ("rsLoRA", Look(VERMILLION, "^", (0, (4, 1.5)))),
    "peft-dora": ("DoRA", Look(GREEN, "s", (0, (1, 1)))),
}
OTHERS = (Look(PURPLE, "D", (0, (6, 1.5, 1, 1.5))), Look(ORANGE, "v", (0, (8, 2, 1, 2, 1, 2))), Look(GREY, "P", "-"))


@figure_function
def counts_by_rank(source: FineTunes) -> Figure:
    """Intruders against the LoRA rank, and below them the size of the update, without which they say little.

    A mark a fine-tune; those of one method are joined where each has a rank of its own.  Full fine-tunes, which
    have no rank, are dashed lines across (a band where there are several), and a grey bar is the mean of random
    updates of the same size and rank, where they were drawn.

    A larger update brings more intruders, whatever its rank: compare ranks at equal height in the lower panel
    only.  Neither the learning rate nor the length of training is in the weights; state both beside this figure.

    Raises
    ------
    UsageError : no fine-tune has a rank, or one's update has no size.
    """
    comparison = as_comparison(source)
    rows = comparison.rows()
    for row in rows:
        if row["update_norm_relative"] is None:
            raise UsageError(
                f"{row['label']}: the size of the update is not known, and counts are not shown without it"
            )
    ranks = [_rank(report) for report in comparison.reports]
    low = [(rank, row) for rank, row in zip(ranks, rows, strict=True) if rank is not None]
    full = [row for rank, row in zip(ranks, rows, strict=True) if rank is None]
    if not low:
        raise UsageError("no fine-tune has a rank: at least one LoRA is needed")
    figure = new_figure(SINGLE, 3.5)
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)))
    legend: list[tuple[str, dict[str, Any]]] = []
    methods: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for rank, row in low:
        methods[row["method"]].append((rank, row))
    others = iter(OTHERS * len(methods))
    for method, members in sorted(methods.items(), key=lambda item: [*METHODS, item[0]].index(item[0])):
        name, own = METHODS.get(method) or (method.removeprefix("peft-"), next(others))
        members.sort(key=lambda item: item[0])
        apart = len({rank for rank, _ in members}) == len(members)
        how = own.line if apart and len(members) > 1 else own.dot
        for one, key in zip(axes, ("intruders", "update_norm_relative"), strict=True):
            one.plot([rank for rank, _ in members], [row[key] for _, row in members], **how, label=name)
        legend.append((name, how))
    drawn = [(rank, row["null_mean"]) for rank, row in low if row["null_mean"] is not None]
    if drawn:
        axes[0].plot(*zip(*drawn, strict=True), **RANDOM, zorder=1, clip_on=False, label="random updates")
        legend.append(("random updates", RANDOM))
    if full:
        for one, key in zip(axes, ("intruders", "update_norm_relative"), strict=True):
            values = [row[key] for row in full]
            for value in values:
                one.axhline(value, **FULL)
            if len(values) > 1:
                one.axhspan(min(values), max(values), color=GREY, alpha=0.15, linewidth=0)
        legend.append(("full fine-tuning", FULL))
    axes[0].set_ylabel(f"intruders ({definition(comparison)})")
    axes[1].set_ylabel(f"update size\n{SIZE}")
    mixed = any(
        report.tuned.get("rank") is None for report, rank in zip(comparison.reports, ranks, strict=True) if rank
    )
    axes[1].set_xlabel("LoRA rank $r$" + " (mean over layers)" * mixed)
    _rank_axis(axes[1], sorted({rank for rank, _ in low}))
    for one in axes:
        from_zero(one)
    whole_numbers(axes[0], "y")
    figure.align_ylabels()
    frame(figure, legend)
    return figure


def _rank(report: Report) -> float | None:
    """The rank of the updates, their mean where it is mixed; None where they have none."""
    if report.tuned.get("rank") is not None:
        return float(report.tuned["rank"])
    ranks = [float(layer.update["rank"]) for layer in report.layers if layer.update.get("rank")]
    return fmean(ranks) if ranks else None


def _rank_axis(axes: Axes, ranks: list[float]) -> None:
    """Powers of two; every rank that occurs where these are few."""
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(ranks[0])), math.ceil(math.log2(ranks[-1]))
    ticks = sorted({2.0**power for power in range(low, high + 1)})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(ranks[0] / 1.4, ranks[-1] * 1.4)


@figure_function
def trajectory(source: FineTunes) -> Figure:
    """How intruders appear during training: their number, the update's size and its effective rank, step by step.

    From checkpoints whose names end in their step (``checkpoint-200``), a line a run.  In the middle the largest
    ‖dW‖/‖W0‖ of any layer is the line, the mean over layers the thin one below it; at the bottom is the mean
    effective rank of dW, exp of the entropy of its singular values (Roy & Vetterli 2007).  Intruders that stop
    coming while the size still grows, or the other way round, is what to look for.

    Raises
    ------
    UsageError : fewer than two checkpoints of a run, or a fine-tune without a step.
    """
    comparison = as_comparison(source)
    stepless = [label for label, step in zip(comparison.labels, comparison.steps, strict=True) if step is None]
    if stepless:
        raise UsageError(
            f"{stepless[0]}: a trajectory needs the checkpoints of a training run; this name has no step such as "
            "checkpoint-200"
        )
    runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place, (report, step) in enumerate(zip(comparison.reports, comparison.steps, strict=True)):
        assert step is not None
        runs[str(PurePath(str(report.tuned.get("path", ""))).parent)].append((step, place))
    if max(map(len, runs.values())) < 2:
        raise UsageError("a trajectory needs at least two checkpoints of one run")
    rows = comparison.rows()
    figure = new_figure(SINGLE, 4.0)
    axes: list[Axes] = list(figure.subplots(3, 1, sharex=True))
    names = short_names(list(runs))
    for number, (name, members) in enumerate(zip(names, runs.values(), strict=True)):
        members.sort()
        own = look(number)
        steps = [step for step, _ in members]
        reports = [comparison.reports[place] for _, place in members]
        mine = [rows[place] for _, place in members]
        axes[0].plot(steps, [row["intruders"] for row in mine], **own.line, label=name)
        axes[1].plot(steps, [_largest_size(report) for report in reports], **own.line, label=name)
        mean: dict[str, Any] = {"color": own.color, "linestyle": own.linestyle, "linewidth": 0.7}
        axes[1].plot(steps, [_number(row["update_norm_relative"]) for row in mine], **mean)
        axes[2].plot(steps, [_number(row["effective_rank"]) for row in mine], **own.line, label=name)
    axes[0].set_ylabel(f"intruders\n({definition(comparison)})")
    axes[1].set_ylabel(f"update size\n{SIZE}")
    axes[2].set_ylabel("effective rank\nof $\\Delta W$")
    axes[2].set_xlabel("training step")
    whole_numbers(axes[0], "y")
    for one in axes:
        from_zero(one)
    figure.align_ylabels()
    sizes: list[tuple[str, dict[str, Any]]] = [
        ("largest of the layers", {"color": GREY, "linewidth": 1.1, "marker": "o"}),
        ("their mean", {"color": GREY, "linewidth": 0.7}),
    ]
    if len(runs) == 1:
        sizes = [(name, {**how, "color": look(0).color}) for name, how in sizes]
        frame(figure, sizes, title=names)
    else:
        frame(figure, [*((name, look(number).line) for number, name in enumerate(names)), *sizes])
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _largest_size(report: Report) -> float:
    """The largest ‖dW‖_F / ‖W0‖_F of any layer; nan where none is known, 0 where nothing has changed yet."""
    sizes = [layer.measures.get("update_norm_relative") for layer in decided(report)]
    return max((size for size in sizes if size is not None), default=math.nan if sizes else 0.0)


@figure_function
def overlap_matrix(source: Comparison) -> Figure:
    """How much of their leading directions each two updates share, between 0 and 1.

    Below the diagonal is the overlap ‖UₐᵀU_b‖_F²/min(i, j) of the leading directions of the two updates (Hu et
    al. 2021, section 7.2), the mean over the layers both change: 1 where one span holds the other.  Above the
    diagonal, in italics and shaded alike, is what random directions would give, max(i, j)/d.  A cell that is
    as pale as its mirror image says that the two have nothing in common.  A dash: no layer in common.

    Raises
    ------
    UsageError : the comparison has no overlaps.
    """
    if not isinstance(source, Comparison) or not source.overlaps:
        raise UsageError("overlaps need at least two fine-tunes, compared from their files")
    count = len(source.reports)
    values = np.full((count, count), np.nan)
    for pair in source.overlaps:
        low, high = sorted((int(pair["a"]), int(pair["b"])))
        values[high, low], values[low, high] = _number(pair["overlap"]), _number(pair["random"])
    room = min(1.3, max(text_width(label) for label in source.labels) + 0.05)
    names = shortened(source.labels, room)
    width = SINGLE if count <= 5 else DOUBLE if count > 8 else 5.0
    cell = (width - room - 0.75) / count
    figure = new_figure(width, max(cell * 0.8, 0.24) * count + room + 0.25)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=COSINES, aspect="auto")
    for row in range(count):
        for column in range(count):
            value = values[row, column]
            if row == column:
                continue
            axes.text(
                column, row, "–" if math.isnan(value) else f"{value:.2f}", ha="center", va="center",
                fontsize=SMALL if cell > 0.33 else 6, color="white" if value > 0.45 else "black",
                fontstyle="italic" if column > row else "normal",
            )  # fmt: skip
    axes.set_xticks(range(count), names, rotation=90 if room > cell else 0)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.plot([-0.5, count - 0.5], [-0.5, count - 0.5], color=GREY, linewidth=0.6)
    colour_bar(figure, image, axes, "subspace overlap", max(cell * 0.8, 0.24) * count)
    axes.set_title("below: measured;  above, italic: random directions", fontsize=SMALL)
    frame(figure)
    return figure


@figure_function
def size_and_intruders(source: FineTunes) -> Figure:
    """Intruders against the size of the update, a labelled point a fine-tune.

    Points on one rising line have as many intruders as their size explains; one far above the others at its
    size put its change into few new directions.  Sizes are means over the layers, on a logarithmic axis where
    they span more than a decade.

    Raises
    ------
    UsageError : no fine-tune, or one's update has no size.
    """
    comparison = as_comparison(source)
    rows = comparison.rows()
    for row in rows:
        if row["update_norm_relative"] is None:
            raise UsageError(f"{row['label']}: the size of the update is not known")
    sizes = [float(row["update_norm_relative"]) for row in rows]
    counts = [int(row["intruders"]) for row in rows]
    figure = new_figure(SINGLE, 2.6 if len(rows) <= 6 else 3.2)
    axes = figure.add_subplot()
    for place, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        axes.plot([size], [count], **look(place).dot, markersize=5, label=comparison.labels[place])
    if min(sizes) > 0 and max(sizes) > 10 * min(sizes):
        log_ticks(axes, "x", min(sizes) / 1.7, max(sizes) * 1.7)
    else:
        axes.set_xlim(0, max(sizes) * 1.12 or 1)
    axes.set_ylim(-0.03 * max(*counts, 1), 1.12 * max(*counts, 1))
    axes.set_xlabel(f"update size {SIZE} (mean over layers)")
    axes.set_ylabel(f"intruders ({definition(comparison)})")
    whole_numbers(axes, "y")
    frame(figure)
    label_points(figure, axes, list(zip(sizes, counts, strict=True)), shortened(comparison.labels, 1.2))
    return figure
