"""The figure of a repair: what an evaluation says at every scale, beside its controls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from spectra.errors import UsageError
from spectra.plots.style import (
    BLACK,
    DOUBLE,
    GREEN,
    GREY,
    INTRUDER,
    NORMAL,
    ORANGE,
    PURPLE,
    SINGLE,
    VERMILLION,
    Look,
    figure_function,
    frame,
    grid,
    look,
    new_figure,
    shortened,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Columns of a sweep that are no metric.
FACTS = ("variant", "scale", "seed", "vectors", "layers", "change_norm", "update_norm", "update_change")
# How each variant is written, and its look; one that is not named here takes the next free one.
VARIANTS = {
    "intruders": ("intruder dimensions", Look(INTRUDER, "o", "-")),
    "neighbour": ("their neighbours", Look(VERMILLION, "s", (0, (4, 1.5)))),
    "random": ("random directions", Look(ORANGE, "^", (0, (1, 1)))),
    "shrink": ("update of the same size", Look(GREEN, "v", (0, (6, 1.5, 1, 1.5)))),
    "weight": ("whole update times λ", Look(PURPLE, "D", (0, (8, 2, 1, 2, 1, 2)))),
}
BASE: dict[str, Any] = {"color": BLACK, "linestyle": (0, (6, 2)), "linewidth": 0.9}
TUNED: dict[str, Any] = {"color": GREY, "linestyle": "-", "linewidth": 0.7}
WHAT = {"fine-tune": "over the fine-tune", "base": "over the base"}


@figure_function
def repair_tradeoff(
    sweep: pandas.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    relative_to: Literal["fine-tune", "base"] | None = None,
    title: str = "",
) -> Figure:
    """What becomes of each metric as intruder dimensions are scaled down, and what the controls do to it.

    A panel a metric; λ falls from left to right, from the fine-tune itself, whose value is the grey line across, to
    the removal of the vectors.  The dashed line is the base.  The random control is the mean over its seeds, with a
    band from the least to the largest.  A repair is worth something where its line lies better than those of the
    controls, at the same height in the panel of the task.  (Shuttleworth et al., arXiv 2410.21228v3, figure 8.)

    Parameters
    ----------
    sweep : from :func:`spectra.repairs.sweep.sweep`, of one fine-tune.
    metrics : its columns to draw; by default all numbers that ``evaluate`` returned.
    relative_to : draw differences from the fine-tune's or the base's value.
    title : over the panels, such as the fine-tune's name.

    Raises
    ------
    UsageError : no sweep of one fine-tune, no such metric, or the row to relate to is missing.
    """
    rows = _rows(sweep)
    metrics = _metrics(rows, metrics)
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "base"))
    spare = (look(place) for place in range(len(VARIANTS), len(VARIANTS) + len(variants)))
    looks = {variant: VARIANTS.get(variant) or (variant, next(spare)) for variant in variants}
    columns = min(len(metrics), 3)
    height = 2.2 if columns < 3 else 2.0
    figure = new_figure(SINGLE if columns == 1 else DOUBLE, height * -(-len(metrics) // columns))
    axes = grid(figure, len(metrics), columns, sharex=True)
    for one, metric in zip(axes, metrics, strict=True):
        _panel(one, rows, metric, looks, relative_to)
        name = metric.replace("_", " ") + (f"\n{WHAT[relative_to]}" if relative_to else "")
        one.set_ylabel("\n".join(shortened([part], height - 0.6, NORMAL)[0] for part in name.split("\n")))
    axes[0].set_xlim(*_limits(rows))
    figure.align_ylabels()
    legend: list[tuple[str, Any]] = [(name, own.line) for name, own in looks.values()]
    if any(row["scale"] == 1 for row in rows):
        legend.append(("fine-tune, λ = 1", TUNED))
    if any(row["variant"] == "base" for row in rows):
        legend.append(("base", BASE))
    frame(figure, legend, title=[title], x="scale λ of the chosen singular values")
    return figure


def _rows(sweep: pandas.DataFrame) -> list[dict[str, Any]]:
    missing = [name for name in ("variant", "scale", "seed") if name not in getattr(sweep, "columns", ())]
    if missing:
        raise UsageError(f"no column {missing[0]!r}; expected what sweep returns")
    rows: list[dict[str, Any]] = sweep.to_dict("records")
    if not any(row["variant"] != "base" for row in rows):
        raise UsageError("nothing to draw: the sweep has no row")
    seen = set()
    for row in rows:
        key = (row["variant"], None if row["variant"] == "base" else row["scale"], row["seed"])
        if key in seen:
            raise UsageError(f"{row['variant']} at scale {row['scale']:g} occurs twice; draw one fine-tune at a time")
        seen.add(key)
    return rows


def _metrics(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str] | None) -> list[str]:
    there = [name for name in rows[0] if name not in FACTS and _is_number(rows[0][name])]
    for name in wanted or ():
        if name not in there:
            raise UsageError(f"no metric {name!r}; expected some of {', '.join(there) or 'none that is there'}")
    metrics = list(there if wanted is None else wanted)
    if not metrics:
        raise UsageError("nothing to draw: no metric in the sweep")
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _panel(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    looks: Mapping[str, tuple[str, Look]],
    relative_to: str | None,
) -> None:
    tuned = next((float(row[metric]) for row in rows if row["scale"] == 1), None)
    base = next((float(row[metric]) for row in rows if row["variant"] == "base"), None)
    origin = 0.0
    if relative_to is not None:
        if relative_to not in WHAT:
            raise UsageError(f"relative_to = {relative_to!r}; expected fine-tune, base or None")
        reference = tuned if relative_to == "fine-tune" else base
        if reference is None:
            raise UsageError(f"relative_to = {relative_to!r}, but the sweep has no row of it")
        origin = reference
    for value, how in ((tuned, TUNED), (base, BASE)):
        if value is not None and math.isfinite(value):
            axes.axhline(value - origin, **how, zorder=1)
    for variant, (name, own) in looks.items():
        values: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            if row["variant"] == variant:
                values[float(row["scale"])].append(float(row[metric]) - origin)
        scales = sorted(values, reverse=True)
        axes.plot(scales, [fmean(values[scale]) for scale in scales], **own.line, label=name)
        low, high = [min(values[scale]) for scale in scales], [max(values[scale]) for scale in scales]
        if low != high:
            axes.fill_between(scales, low, high, color=own.color, alpha=0.2, linewidth=0)


def _limits(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """λ from the largest, on the left, to the smallest."""
    scales = [float(row["scale"]) for row in rows if row["variant"] != "base"]
    margin = 0.04 * (max(scales) - min(scales)) or 0.1
    return max(scales) + margin, min(scales) - margin
