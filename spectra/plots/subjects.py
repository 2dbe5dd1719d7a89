"""What a figure is about: fine-tunes and layers, their short names, and the definition they share."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeAlias

from spectra.errors import UsageError
from spectra.records.comparison import Comparison
from spectra.records.layer import LayerSpectra
from spectra.records.report import LayerReport, Report

SEPARATORS = "/.-_ "
_LISTED = re.compile(r"(layer|block)s?$|^h$")
FineTunes: TypeAlias = Comparison | Report | Sequence[Report]


def as_comparison(source: FineTunes) -> Comparison:
    """Reports as the fine-tunes of a comparison that measured nothing more.

    Raises
    ------
    UsageError : there are none, or they were made with different definitions of an intruder.
    """
    if isinstance(source, Comparison):
        comparison = source
    else:
        reports = (source,) if isinstance(source, Report) else tuple(source)
        comparison = Comparison(reports, (), reports[0].spectra_version if reports else "")
    if not comparison.reports:
        raise UsageError("nothing to draw: no fine-tune was given")
    for key in ("top_k", "epsilon", "side"):
        values = sorted({report.settings[key] for report in comparison.reports})
        if len(values) > 1:
            raise UsageError(
                f"the reports were made with {key} = {' and '.join(map(str, values))}; "
                "counts under different definitions do not go into one figure"
            )
    return comparison


def definition(comparison: Comparison) -> str:
    """What counts as an intruder, for an axis label."""
    settings = comparison.reports[0].settings
    side = ", right vectors" if settings["side"] == "right" else ""
    return f"k = {settings['top_k']}, ε = {settings['epsilon']:g}{side}"


def total_of(report: Report) -> str:
    """The count in words, with what must be known to judge it."""
    summary = report.summary
    text = f"{summary['intruders']} intruders in {summary['vectors_compared']} vectors"
    if summary["intruders_all"] != summary["intruders"]:
        text += f", {summary['intruders_all']} with noise-like layers"
    if summary["layers_failed"]:
        text += f", {summary['layers_failed']} layer{'s' * (summary['layers_failed'] > 1)} failed"
    return text


def compared(report: Report, top_k: int | None = None) -> int:
    """How many singular vectors were compared, among the ``top_k`` leading ones of each layer."""
    return sum(top_k is None or vector.index < top_k for layer in report.layers for vector in layer.vectors)


def depth(layer: LayerReport) -> int | None:
    """The number of the layer in the model, None where its name has none: ``encoder.layer.3.experts.7.w1`` is at 3.

    That is the first number after a word for layers or blocks, or else the first of all.
    """
    parts = layer.name.split("#")[0].split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    listed = [i for i in numbers if i and _LISTED.search(parts[i - 1])]
    return next((int(parts[i]) for i in listed + numbers), None)


def panel_names(layers: Sequence[LayerSpectra]) -> tuple[str, list[str]]:
    """What all panels share (for a title over them; "" where nothing), and what each one shows."""
    if not layers:
        raise UsageError("nothing to draw: no layer was given")
    names, tuned = {layer.name for layer in layers}, {layer.tuned for layer in layers}
    if len(layers) == 1:
        return f"{layers[0].tuned}: {layers[0].name}", [""]
    if len(names) == 1:
        return layers[0].name, [layer.tuned for layer in layers]
    if len(tuned) == 1:
        return layers[0].tuned, [layer.name for layer in layers]
    return "", [f"{layer.tuned}\n{layer.name}" for layer in layers]


def fitting(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """The names, shortened alike where one does not fit, and still all different where they were.

    The middle of each goes first, or, where that would make two the same, what all share at both ends; where
    nothing else does, a number tells them apart.
    """
    if all(map(fits, names)):
        return list(names)
    distinct = len(set(names))
    bare = _without_shared_ends(names)
    for candidates in (
        [_elided(name, fits, 0.5) for name in names],
        bare,
        [_elided(name, fits, 0.5) for name in bare],
        [_elided(name, fits, 0.0) for name in bare],
        [_elided(name, fits, 1.0) for name in bare],
    ):
        if len(set(candidates)) == distinct and all(map(fits, candidates)):
            return candidates
    places = {name: place for place, name in enumerate(dict.fromkeys(names), 1)}
    return [f"{_elided(name, lambda text: fits(text + ' (99)'), 1.0)} ({places[name]})" for name in names]


def _without_shared_ends(names: Sequence[str]) -> list[str]:
    """The names without the whole words that all of them begin and end with."""
    if len(set(names)) < 2:
        return list(names)
    start = _shared_words(names)
    rest = [name[start:] for name in names]
    end = _shared_words([name[::-1] for name in rest])
    return ["…" * (start > 0) + name[: len(name) - end] + "…" * (end > 0) for name in rest]


def _shared_words(names: Sequence[str]) -> int:
    """How many letters, up to a separator, all names begin with."""
    shared = 0
    for place, letters in enumerate(zip(*names, strict=False), 1):
        if len(set(letters)) > 1:
            break
        if letters[0] in SEPARATORS:
            shared = place
    return shared


def _elided(name: str, fits: Callable[[str], bool], head: float) -> str:
    """As much of the name as fits, the share ``head`` of it from its beginning."""
    if fits(name):
        return name

    def shorter(kept: int) -> str:
        first = round(kept * head)
        return name[:first] + "…" + name[len(name) - (kept - first) :]

    return shorter(bisect_left(range(1, len(name)), True, key=lambda kept: not fits(shorter(kept))))
