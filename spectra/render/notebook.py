"""What a notebook shows of a record: its headline and a small table, as HTML without script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from spectra.records.comparison import Comparison
from spectra.records.inspection import Inspection
from spectra.records.ranks import RankReport
from spectra.records.repair import Repair, Verification
from spectra.records.report import Report
from spectra.records.sweeps import mean_update_size
from spectra.render import coverage
from spectra.render.chance import by_chance, chance_in_words
from spectra.render.columns import decimals, number, percent, plural
from spectra.render.finding import finding
from spectra.render.text import lowest_cosine, ranges

ROWS = 8  # of a table; the text has more


def to_table_html(record: Any) -> str:
    """The headline and a small table of a record, as HTML; every name from a file is escaped."""
    if isinstance(record, Report):
        return _report(record)
    if isinstance(record, Comparison):
        return _comparison(record)
    if isinstance(record, RankReport):
        return _ranks(record)
    if isinstance(record, Repair):
        return _repair(record)
    if isinstance(record, Verification):
        return _verification(record)
    if isinstance(record, Inspection):
        return _inspection(record)
    return f"<pre>{escape(repr(record))}</pre>"


def _shown(headline: str, header: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0) -> str:
    """A paragraph and a table; ``more`` rows are said to be left out, and columns of which nothing is known are."""
    parts = [f"<p>{'<br>'.join(escape(line) for line in headline.splitlines())}</p>"]
    if rows:
        known = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
        head = _cells("th", [header[i] for i in known])
        body = "".join(f"<tr>{_cells('td', [row[i] for i in known])}</tr>" for row in rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if more > 0:
        parts.append(
            f"<p>and {plural(more, 'more layer')}; <code>print(….to_text(verbose=True))</code> has them all</p>"
        )
    return "".join(parts)


def _cells(tag: str, cells: Sequence[str]) -> str:
    """Names begin at the left; notebooks put everything at the right."""
    left = ' style="text-align: left"'
    return "".join(f"<{tag}{'' if i else left}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))


def _report(report: Report) -> str:
    flagged = sorted((layer for layer in report.layers if layer.intruders), key=lambda layer: -layer.intruders)
    rows = [
        [
            layer.name, str(layer.intruders), ranges(layer.intruder_indices), f"{lowest_cosine(layer)[0]:.2f}",
            decimals(layer.measures.get("update_norm_relative")), number(layer.update["rank"]),
        ]
        for layer in flagged[:ROWS]
    ]  # fmt: skip
    size = mean_update_size(report)
    headline = f"{report.tuned.get('path')} on {report.base.get('path')}\n"
    said = coverage.headline(report)
    headline += "\n".join(finding(report).lines if said is None else (said, *finding(report).lines))
    if size is not None:
        headline += f"\nThe update's size is {decimals(size)} of the base's (mean of ‖dW‖/‖W0‖)."
    if report.judged:
        headline += f"\nBy chance: {chance_in_words(report)}."
    return _shown(
        headline, ("layer", "intruders", "at index", "lowest |cos|", "‖dW‖/‖W0‖", "rank"), rows, len(flagged) - ROWS
    )


def _comparison(comparison: Comparison) -> str:
    rows = [
        [
            str(row["label"]), str(row["method"]), number(row["rank"]), decimals(row["update_norm_relative"]),
            decimals(row["update_over_threshold"], 2), str(row["intruders"]), by_chance(report.expected_by_chance),
            percent(row["intruder_energy_share"]), str(row["vectors_compared"]), str(row["intruders_all"]),
            number(row["threshold"], 3),
        ]
        for row, report in zip(comparison.rows(), comparison.reports, strict=True)
    ]  # fmt: skip
    header = (
        "fine-tune", "method", "rank", "‖dW‖/‖W0‖", "‖dW‖₂/θ", "intruders", "by chance", "energy", "vectors compared",
        "in all layers", "weight of the first intruder",
    )  # fmt: skip
    return _shown(f"{plural(len(rows), 'fine-tune')} of {comparison.base.get('path')}", header, rows)


def _ranks(report: RankReport) -> str:
    choices = {} if report.suggestion is None else {choice.name: choice for choice in report.suggestion.choices}
    layers = sorted(report.layers, key=lambda layer: -layer.update_norm_fro)
    rows = []
    for layer in layers[:ROWS]:
        choice = choices.get(layer.name)
        rows.append([
            layer.name, number(layer.trained_rank), str(layer.rank_90), str(layer.rank_99),
            number(choice.rank if choice else None), number(choice.alpha if choice else None),
            "-" if choice is None else f"{choice.relative_error:.1%}",
        ])  # fmt: skip
    suggestion = report.suggestion
    headline = f"{report.tuned.get('path')}: ranks of {plural(len(layers), 'layer')}, the largest updates first"
    if suggestion is not None:
        headline += f"\nSuggestion: r = {suggestion.r}, lora_alpha = {number(suggestion.lora_alpha)}"
    header = ("layer", "trained rank", "rank for 90 %", "rank for 99 %", "suggested rank", "alpha", "error")
    return _shown(headline, header, rows, len(layers) - ROWS)


def _repair(repair: Repair) -> str:
    rows = [
        [
            layer.name, ", ".join(str(vector.index) for vector in layer.vectors[:ROWS]),
            ", ".join(sorted({f"{vector.scale:g}" for vector in layer.vectors})), str(layer.intruders_before),
            str(layer.intruders_after), "-" if layer.update_change is None else f"{layer.update_change:.1%}",
        ]
        for layer in repair.changed[:ROWS]
    ]  # fmt: skip
    where = "nothing written" if repair.output is None else f"written to {repair.output.get('path')}"
    headline = (
        f"{repair.source.get('path')}: {plural(len(repair.scaled), 'singular vector')} scaled in "
        f"{plural(len(repair.changed), 'layer')}; {where}"
    )
    header = ("layer", "vectors", "scaled by", "intruders before", "after", "change of the update")
    return _shown(headline, header, rows, len(repair.changed) - ROWS)


def _verification(check: Verification) -> str:
    what = "is the repair that its record describes" if check.holds else "is not the repair that its record describes"
    rows = [[layer.name, decimals(layer.error, 8), decimals(layer.tolerance, 8)] for layer in check.failed[:ROWS]]
    headline = "\n".join([f"{check.folder} {what}.", *check.problems[:ROWS]])
    return _shown(headline, ("layer", "error", "tolerance"), rows, len(check.failed) - ROWS)


def _inspection(inspection: Inspection) -> str:
    rows = [
        [
            str(update["module"]), str(update["formula"]), number(update["rank"]), number(update["alpha"]),
            " × ".join(map(str, update["shape"] or "-")), str(update["base_tensor"] or "-"),
        ]
        for update in inspection.updates[:ROWS]
    ]  # fmt: skip
    updates = plural(len(inspection.updates), "update")
    headline = f"{inspection.path}: {inspection.layout}, read as {inspection.format}, {updates}"
    headline += "".join(f"\n{note}" for note in (inspection.problem, inspection.caveat) if note)
    header = ("module", "formula", "rank", "alpha", "shape", "base weight")
    return _shown(headline, header, rows, len(inspection.updates) - ROWS)
