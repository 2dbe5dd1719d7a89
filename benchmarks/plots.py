"""Plots that can be read at the width of a column, in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 3.5  # inches
LINE = 0.17  # inches that a row of names takes
SHORT, LETTER = 24, 0.06  # letters of a name that a column has room for; inches that one more takes
MOST_WITHIN = 4  # lines that a legend within the plot may name
# Okabe & Ito 2008; a marker of its own says the same without colour.
LOOKS = {
    "plain": ("#000000", "o"),
    "peft": ("#999999", "s"),
    "exact": ("#0072B2", "D"),
    "krylov": ("#D55E00", "^"),
    "krylov, one space": ("#56B4E9", "<"),
    "spectra": ("#D55E00", "^"),
    "factors": ("#0072B2", "o"),
    "cached": ("#009E73", "v"),
    "cached, cold": ("#CC79A7", "P"),
    "auto": ("#E69F00", "*"),
}
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.markersize": 4.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "svg.hashsalt": "spectra",  # the same plot, the same file
    "savefig.dpi": 220,
}


def write_plot(draw: Callable[[list[Row], Axes], None], rows: list[Row], title: str, path: Path) -> None:
    """``path``.png and .svg, high enough for the names on the vertical axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(rows, axes)
        figure.suptitle(title, fontsize=8, x=0.02, ha="left")
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log" and isinstance(axis.get_major_locator(), LogLocator):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(NullFormatter())
        lines = len(axes.get_yticks()) if isinstance(axes.yaxis.get_major_locator(), FixedLocator) else 0
        longest = max((len(tick.get_text()) for tick in axes.get_yticklabels()), default=0) if lines else 0
        handles, labels = axes.get_legend_handles_labels()
        below = bool(handles) and (lines > 0 or len(handles) > MOST_WITHIN)  # names take the room beside the plot
        wide = max(map(len, labels), default=0) > SHORT
        columns = min(len(handles), 5 if lines else 1 if wide else 2)
        room = LINE * -(-len(handles) // columns) if below and not lines else 0.0
        figure.set_size_inches(WIDTH + LETTER * max(0, longest - SHORT), max(2.4, 1.3 + LINE * lines) + room)
        if below:
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1)
        elif handles:
            axes.legend()
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def look(method: str) -> dict[str, Any]:
    colour, marker = LOOKS.get(method, ("#56B4E9", "x"))
    return {"color": colour, "marker": marker}


def dots(axes: Axes, rows: Sequence[Row], names: Callable[[Row], str], value: str, series: str = "method") -> None:
    """A line of dots for each name, a look for each of ``series``; the values on a logarithmic axis."""
    order = list(dict.fromkeys(names(row) for row in rows))
    for one in dict.fromkeys(row[series] for row in rows):
        mine = [row for row in rows if row[series] == one]
        axes.plot(
            [row[value] for row in mine],
            [order.index(names(row)) for row in mine],
            linestyle="none",
            label=one,
            **look(str(one)),
        )
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xscale("log")


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], form: str = "{:.3g}") -> None:
    """Horizontal bars with their values written beside them."""
    axes.barh(range(len(names)), values, 0.6, color="#0072B2")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for at, value in enumerate(values):
        axes.annotate(form.format(value), (value, at), xytext=(3, 0), textcoords="offset points", va="center")
    axes.margins(x=0.18)
    axes.grid(False, axis="y")
