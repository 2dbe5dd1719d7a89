"""Figures of counts against a threshold: epsilon, k, and the weight an adapter is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spectra.errors import UsageError
from spectra.plots.style import BLACK, GREY, SINGLE, figure_function, frame, from_zero, look, new_figure, whole_numbers
from spectra.plots.subjects import FineTunes, as_comparison, compared, definition, total_of
from spectra.records.comparison import Comparison
from spectra.records.sweeps import EPSILONS, by_epsilon, by_top_k, by_weight, decided, free_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USED: dict[str, Any] = {"color": BLACK, "linestyle": (0, (4, 2)), "linewidth": 0.7}
FLOOR: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 1.5)), "linewidth": 0.9}
THRESHOLD: dict[str, Any] = {
    "color": GREY,
    "marker": "^",
    "linestyle": "none",
    "markersize": 6,
    "markeredgecolor": "white",
}


@figure_function
def epsilon_sweep(source: FineTunes) -> Figure:
    """How the count of intruders depends on the threshold ε, a line a fine-tune.

    The total over all layers, and its share of the vectors compared: on the right, or in a panel of its own where
    the fine-tunes changed different layers.  The dashed line is the ε of the report.  The dotted line
    is what a random direction reaches on average over the layers, max |cos|: below it almost nothing can be an
    intruder, and between it and the dashed line the curves tell whether the finding hangs on the choice of ε.

    Raises
    ------
    UsageError : no fine-tune, or cosines that the engine only bounded.
    """
    comparison = as_comparison(source)
    used = float(comparison.reports[0].settings["epsilon"])
    epsilons = sorted({*EPSILONS, used})
    curves = [by_epsilon(report, epsilons) for report in comparison.reports]
    vectors = [max(compared(report), 1) for report in comparison.reports]
    if len(set(vectors)) == 1:
        figure = new_figure(SINGLE, 2.3)
        axes = [figure.add_subplot()]
        _lines(axes[0], comparison, curves)
        share = axes[0].secondary_yaxis("right", functions=_percent_of(vectors[0]))
        share.set_ylabel(f"share of {vectors[0]} vectors (%)")
        share.spines["right"].set_visible(True)
    else:
        figure, axes = _counts_and_shares(
            comparison,
            curves,
            [[(x, 100 * n / size) for x, n in curve] for curve, size in zip(curves, vectors, strict=True)],
        )
    floors = [
        layer.random_floor
        for report in comparison.reports
        for layer in decided(report)
        if layer.random_floor is not None
    ]
    legend: list[tuple[str, dict[str, Any]]] = [(f"ε = {used:g}, as reported", USED)]
    for one in axes:
        one.axvline(used, **USED)
        if floors:
            one.axvline(fmean(floors), **FLOOR)
    if floors:
        legend.append(("random direction", FLOOR))
    axes[-1].set_xlabel("intruder threshold ε")
    axes[-1].set_xlim(0, 1)
    axes[0].set_ylabel(f"intruders (k = {comparison.reports[0].settings['top_k']})")
    return _named(figure, comparison, legend)


def _percent_of(vectors: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """A count as a share in per cent, and back."""
    return (lambda count: 100 * count / vectors), (lambda share: share * vectors / 100)


@figure_function
def top_k_sweep(source: FineTunes) -> Figure:
    """How many intruders are among the k leading vectors of each layer, against k; a line a fine-tune.

    Above, the total over all layers; below, its share of the vectors that are among the k leading.  A share
    that falls with k means that intruders sit at the very top of the spectrum.

    Raises
    ------
    UsageError : no fine-tune.
    """
    comparison = as_comparison(source)
    curves = [by_top_k(report) for report in comparison.reports]
    shares = [
        [(k, 100 * count / max(compared(report, int(k)), 1)) for k, count in curve]
        for curve, report in zip(curves, comparison.reports, strict=True)
    ]
    figure, axes = _counts_and_shares(comparison, curves, shares)
    axes[1].set_xlabel("k, leading singular vectors of each layer")
    whole_numbers(axes[1], "x")
    axes[0].set_ylabel(f"intruders (ε = {comparison.reports[0].settings['epsilon']:g})")
    return _named(figure, comparison, [])


def _counts_and_shares(
    comparison: Comparison,
    curves: Sequence[Sequence[tuple[float, int]]],
    shares: Sequence[Sequence[tuple[float, float]]],
) -> tuple[Figure, list[Axes]]:
    """Counts above shares."""
    figure = new_figure(SINGLE, 3.3)
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)))
    _lines(axes[0], comparison, curves)
    _lines(axes[1], comparison, shares)
    axes[1].set_ylabel("share (%)")
    figure.align_ylabels()
    return figure, axes


def _lines(axes: Axes, comparison: Comparison, curves: Sequence[Sequence[tuple[float, float]]]) -> None:
    """A line a fine-tune; where there are several, those with many points have a mark at every third."""
    for place, (label, curve) in enumerate(zip(comparison.labels, curves, strict=True)):
        every = (place % 3, 3) if len(curves) > 1 and len(curve) > 12 else 1
        axes.plot(*zip(*curve, strict=True), **look(place).line, markevery=every, label=label)
    from_zero(axes)
    whole_numbers(axes, "y")


def _named(figure: Figure, comparison: Comparison, more: list[tuple[str, dict[str, Any]]]) -> Figure:
    """With a legend of the fine-tunes, or one's name and total over it."""
    if len(comparison.reports) == 1:
        frame(figure, more, title=[comparison.labels[0], total_of(comparison.reports[0])])
    else:
        frame(figure, [*((label, look(i).line) for i, label in enumerate(comparison.labels)), *more])
    return figure


@figure_function
def weight_curve(source: FineTunes) -> Figure:
    """How many intruders W0 + s·dW has, against the weight s that the update is given; a line a fine-tune.

    The axis is logarithmic; the fine-tune as it is has s = 1, the dashed line.  A triangle on the axis is s*,
    the weight at which the first intruder of all layers appears: below it an adapter is free of them.  Where s*
    lies beyond every weight that was tried there is no triangle.

    Raises
    ------
    UsageError : the reports know nothing of other weights; comparisons do.
    """
    comparison = as_comparison(source)
    curves = [[(s, count) for s, count in by_weight(report) if s > 0] for report in comparison.reports]
    if not any(curves):
        raise UsageError("no counts at other adapter weights in the reports; make them with: spectra compare")
    figure = new_figure(SINGLE, 2.3)
    axes = figure.add_subplot()
    thresholds = [free_weight(report)[0] for report in comparison.reports]
    legend: list[tuple[str, dict[str, Any]]] = []
    for place, (label, curve) in enumerate(zip(comparison.labels, curves, strict=True)):
        own = look(place)
        if curve:
            axes.plot(*zip(*curve, strict=True), **own.line, markersize=3, label=label)
        legend.append((label if curve else f"{label} (no weights tried)", own.line))
    for place, threshold in enumerate(thresholds):
        if threshold is not None and threshold > 0:
            how = {**THRESHOLD, "color": look(place).color}
            (mark,) = axes.plot([threshold], [0], **how, clip_on=False, zorder=6, label="s*")
            mark.set_in_layout(False)
    axes.axvline(1, **USED)
    weights = [s for curve in curves for s, _ in curve] + [s for s in thresholds if s is not None and s > 0]
    _powers_of_two(axes, min(weights), max(weights))
    from_zero(axes)
    axes.set_xlabel("adapter weight $s$ in $W_0 + s\\,\\Delta W$")
    axes.set_ylabel(f"intruders ({definition(comparison)})")
    whole_numbers(axes, "y")
    legend.append(("as trained, s = 1", USED))
    single = len(comparison.reports) == 1
    if any(threshold is not None for threshold in thresholds):
        value = f" = {thresholds[0]:.2g}" if single else ""
        legend.append((f"s*{value}: first intruder", THRESHOLD))
    frame(figure, legend[1:] if single else legend, title=comparison.labels[:1] if single else ())
    return figure


def _powers_of_two(axes: Axes, least: float, most: float) -> None:
    """A logarithmic axis with 1/4, 1/2, 1, 2 … on it."""
    axes.set_xscale("log", base=2)
    powers = [power for power in range(-12, 13) if least / 1.5 <= 2.0**power <= most * 1.5]
    step = -(-len(powers) // 9)
    shown = [power for power in powers if power % step == 0]
    axes.set_xticks(
        [2.0**power for power in shown], [str(2**power) if power >= 0 else f"1/{2**-power}" for power in shown]
    )
    axes.set_xticks([], minor=True)
