"""``plot``: a figure of fine-tunes, computed from their files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from spectra.errors import UsageError
from spectra.plots.kinds import KINDS
from spectra.records.report import Report
from spectra.runs.options import AuditOptions, takes_options
from spectra.sources.live import Source, several
from spectra.sources.resolve import checkpoints_of
from spectra.tasks.audit import audit_many
from spectra.tasks.compare import SIZE, compare, layer_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 3  # layers of one fine-tune that are drawn side by side where none are named
LAYER_OPTIONS = (
    "top_k", "epsilon", "side", "include", "exclude", "dtype", "device", "threads", "split_fused", "ignore_options",
    "allow_pickle", "local_files_only", "initial_adapter", "progress",
)  # fmt: skip


@takes_options(AuditOptions, engine="cached")
def plot(
    tuned: Source | Sequence[Source],
    base: Source | None = None,
    *,
    kind: str,
    to: str | Path | None = None,
    size: int = SIZE,
    **options: Unpack[AuditOptions],
) -> Figure:
    """A figure of one fine-tune or of several, as ``spectra plot`` draws it; needs matplotlib.

    Parameters
    ----------
    tuned, base : as for :func:`spectra.compare`.
    kind : one of those that ``spectra plot --help`` lists, such as "similarity", "layers" or "ranks".
    to : a file to write the figure to as well; its ending says in which format.
    size : how many leading vectors of each side a similarity matrix shows.
    {options}

    Figures of single layers show those that ``include`` names, or else the layers with the most intruders, those whose
    base is trained first.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError : no such kind; nothing to draw; the file cannot be written.
    SpectraError : as for :func:`spectra.audit`.
    """
    if kind not in KINDS:
        raise UsageError(f"kind = {kind!r:.80}; expected one of {', '.join(KINDS)}")
    chosen, sources = KINDS[kind], several(tuned)
    source: Any
    if chosen.needs == "layers":
        sources = [step for one in sources for step in (checkpoints_of(one) if isinstance(one, str | Path) else [one])]
        named = {name: value for name, value in options.items() if name in LAYER_OPTIONS}
        if not options["include"]:
            audits: Any = {**options, "engine": "auto"}
            named["include"] = worst_of(audit_many(sources, base, **audits))
        source = layer_spectra(sources, base, size=size, **named)  # type: ignore[arg-type]  # by their names
    else:
        source = compare(sources, base, quick=kind != "weights", draws=0, **options)
    figure = chosen.draw(source)
    if to is not None:
        from spectra.plots import save

        save(figure, to)
    return figure


def worst_of(reports: Sequence[Report]) -> list[str]:
    """Patterns for the layers with the most intruders: some of a single fine-tune, the one of several.

    Layers whose base is plain noise come last, since anything moves their vectors.

    Raises
    ------
    UsageError : no layer has vectors.
    """
    totals: dict[str, int] = {}
    noise = {layer.name for report in reports for layer in report.layers if layer.noise_like_base}
    for report in reports:
        for layer in report.layers:
            if layer.vectors:
                totals[layer.name] = totals.get(layer.name, 0) + layer.intruders
    if not totals:
        raise UsageError(f"{reports[0].tuned['path']}: nothing to draw: no layer was changed")
    names = sorted(totals, key=lambda name: (name in noise, -totals[name]))[: PANELS if len(reports) == 1 else 1]
    return [glob.escape(name) for name in names]
