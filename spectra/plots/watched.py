"""The figure of a training that was watched: how its intruders appeared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import UsageError
from spectra.plots.style import (
    BLACK,
    DOUBLE,
    GREY,
    INTRUDER,
    Look,
    figure_function,
    frame,
    from_zero,
    grid,
    log_ticks,
    look,
    new_figure,
    whole_numbers,
)
from spectra.records.history import PREFIX, Record
from spectra.sources.saved import load_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TYPES = 3  # module types with a line of their own: those with the most intruders
ALL = Look(INTRUDER, "o", "-")
NOISE: dict[str, Any] = {"color": INTRUDER, "linestyle": (0, (1, 1)), "linewidth": 0.9}
LIMIT: dict[str, Any] = {"color": BLACK, "linestyle": (0, (6, 2)), "linewidth": 0.9}


@figure_function
def training_history(history: Sequence[Record] | str | Path, *, title: str = "") -> Figure:
    """Intruders over the steps of a training, how far it is from the first one, and the size of its update.

    Above: the number of intruders, of all module types and of the three with most of them; and ‖dW‖/‖W0‖, the
    largest of the layers and their mean.  Below, the margins that :func:`spectra.records.history.metrics_of`
    defines, each with a dashed line where the first intruder is: the lowest max |cos| less epsilon, and the factor by
    which the update may grow until one is predicted, both outside noise-like bases.

    Parameters
    ----------
    history : of a monitor or callback, or the file it wrote.
    title : over the panels.

    Raises
    ------
    UsageError : no records.  CheckpointError : a file that is no history.
    """
    records = load_history(history) if isinstance(history, str | Path) else list(history)
    if not records:
        raise UsageError("nothing to draw: no audit of this training")
    figure = new_figure(DOUBLE, 3.6)
    counts, sizes, cosine, threshold = grid(figure, 4, 2, sharex=True)
    _line(counts, records, f"{PREFIX}intruders", ALL)
    legend: list[tuple[str, dict[str, Any]]] = [("all types", ALL.line)]
    every = f"{PREFIX}intruders_all"
    if any(record.metrics[every] != record.intruders for record in records):
        counts.plot(*_series(records, every), **NOISE)
        legend.append(("with noise-like bases", NOISE))
    for place, name in enumerate(_most(records), start=1):
        own = look(place)
        steps = [record.step for record in records if name in record.by_module_type]
        counts.plot(steps, [r.by_module_type[name] for r in records if name in r.by_module_type], **own.line)
        legend.append((name, own.line))
    mean: dict[str, Any] = {"color": GREY, "linestyle": "-", "linewidth": 0.7}
    _line(sizes, records, f"{PREFIX}update_norm_largest", ALL)
    sizes.plot(*_series(records, f"{PREFIX}update_norm"), **mean)
    _line(cosine, records, f"{PREFIX}cosine_margin", ALL)
    _line(threshold, records, f"{PREFIX}threshold_margin", ALL)
    cosine.axhline(0, **LIMIT)
    if factors := _series(records, f"{PREFIX}threshold_margin")[1]:
        log_ticks(threshold, "y", min(*factors, 1) / 1.3, max(*factors, 1) * 1.3)
        threshold.axhline(1, **LIMIT)
    counts.set_ylabel("intruders")
    sizes.set_ylabel("update size\n$\\|\\Delta W\\|/\\|W_0\\|$")
    cosine.set_ylabel("lowest |cos|\nless epsilon")
    threshold.set_ylabel("growth to the first\nintruder (predicted)")
    whole_numbers(counts, "y")
    from_zero(counts)
    from_zero(sizes)
    whole_numbers(threshold, "x")
    figure.align_ylabels()
    legend += [("mean of layers", mean), ("first intruder", LIMIT)]
    frame(figure, legend, title=[title], x="training step")
    return figure


def _series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    known = [(record.step, record.metrics[name]) for record in records if name in record.metrics]
    return [step for step, _ in known], [value for _, value in known]


def _line(axes: Axes, records: Sequence[Record], name: str, own: Look) -> None:
    axes.plot(*_series(records, name), **own.line)


def _most(records: Sequence[Record]) -> list[str]:
    """The module types that had an intruder, those with the most at any step first."""
    most: dict[str, int] = {}
    for record in records:
        for name, count in record.by_module_type.items():
            most[name] = max(most.get(name, 0), count)
    return [name for name in sorted(most, key=lambda name: -most[name]) if most[name]][:TYPES]
