"""A repair, and the check of one, for people and as CSV: first what was done, then each vector before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from textwrap import fill
from typing import Any

from spectra.records.repair import ROW_COLUMNS, LayerRepair, Repair, ScaledVector, Verification
from spectra.render.columns import decimals, in_ascii, number, plural, table
from spectra.render.table import as_csv

WIDTH = 110
SHOWN_LAYERS = 24  # more than these, and only those that changed most are listed unasked
SHOWN_FILES = 3
GONE = 1e-6  # of a singular value: a few units of float32's rounding
ARROW = " → "
CHECK_COLUMNS = ("folder", "layer", "error", "tolerance", "holds")

NOTES = {
    "table": "index: rank in W by singular value, 0 the largest (lower: below the leading ones that were computed; "
    "gone: removed). σ, energy (σ²/‖W‖²) and index are those of the fine-tune and of the result. change: "
    "‖dW'−dW‖/‖dW‖. error: distance of the written weights from the formula, over ‖dW'‖.",
    "count": "note: {stayed} still among the top {top_k} of the result: a scaled vector keeps its direction, and a "
    "scale close to 1 often only moves it down the ranks, where it still counts as an intruder, with less energy. "
    "Use a smaller scale, or 0, to remove it.",
    "others": "note: the count of intruders did not fall: others that were below the leading ones moved up into them.",
    "noise": "note: the base of {layers} (*) is plain noise, as if it was never trained. Anything moves its vectors; "
    "what is scaled there is what was learnt.",
}


def render_repair(record: Repair, *, verbose: bool = False, ascii_only: bool = False) -> str:
    """What was scaled and what came of it, the facts, the vectors layer by layer, what to know."""
    sections = [
        _verdict(record),
        _facts(record),
        _problems(record),
        _vectors(record, verbose),
        _notes(record, verbose),
        _left_behind(record.left_behind, verbose),
    ]
    return _joined(sections, ascii_only)


def render_verification(verification: Verification, *, verbose: bool = False, ascii_only: bool = False) -> str:
    """Whether the repair holds, what is amiss, and the layers that do not hold, or all."""
    shown = verification.layers if verbose else verification.failed
    rows = [
        [layer.name, number(layer.error, 2), number(layer.tolerance, 2), "holds" if layer.holds else "DIFFERS"]
        for layer in shown
    ]
    sections = [
        _check(verification),
        "\n".join(f"problem: {problem}" for problem in verification.problems),
        table(["layer", "error", "allowed", ""], rows, left=(0, 3)) if rows else "",
    ]
    return _joined(sections, ascii_only)


def to_csv(record: Repair | Verification) -> str:
    """One row a chosen vector; of a check, one row a layer."""
    return as_csv(ROW_COLUMNS if isinstance(record, Repair) else CHECK_COLUMNS, record.rows())


def _joined(sections: Iterable[str], ascii_only: bool) -> str:
    text = "\n\n".join(section for section in sections if section) + "\n"
    return in_ascii(text) if ascii_only else text


def _verdict(record: Repair) -> str:
    dry, summary = record.output is None, record.summary
    start = "Dry run: " if dry else "Repaired: "
    if not record.scaled:
        what = "the weights stay what they are" if record.settings["merged"] else "every file stays what it is"
        return f"{start if dry else 'Unchanged: '}no singular vector was chosen with a scale other than 1, so {what}."
    count, intruders = summary["vectors_scaled"], summary["intruders_scaled"]
    what = plural(count, "intruder dimension")
    if intruders < count:
        what = f"{plural(count, 'singular vector')}, {intruders} of them intruder dimensions,"
    layers, decided = summary["layers_changed"], summary["layers_decided"]
    where = plural(layers, "layer") if decided is None else f"{layers} of {plural(decided, 'layer')}"
    scales = {vector.scale for vector in record.scaled}
    done = "removed" if scales == {0} else f"scaled by {_span(scales, '{:g}')}"
    before = plural(summary["intruders_before"], "intruder")
    return (
        f"{start}{what} in {where} {'would be ' if dry else ''}{done}; {before} before, "
        f"{summary['intruders_after']} after."
    )


def _facts(record: Repair) -> str:
    settings, summary, changed = record.settings, record.summary, record.changed
    output = record.output
    target = "none: a dry run writes nothing" if output is None else f"{output.get('path')}  ({output['format']})"
    rows = [
        ("source", f"{record.source.get('path')}  ({_method(record.source)})"),
        ("base", str(record.base.get("path"))),
        *([("", f"note: {record.base['caveat']}")] if record.base.get("caveat") else []),
        ("output", target),
        ("chosen", _chosen(settings)),
    ]
    if not isinstance(settings["scale"], (int, float)):
        rows.append(("scale", "; ".join(f"{pattern}: {value:g}" for pattern, value in settings["scale"].items())))
    if changed:
        rows.append(("update", f"changed by {_percent(summary['update_change'])} (‖dW'−dW‖/‖dW‖ over these layers)"))
        rows.append(("precision", _precision(record)))
        if settings["keep_rank"]:
            reached = _span((vector.scale_achieved for vector in record.scaled), "{:.3g}")
            rows.append(("", f"(the rank is kept, by the best approximation of that rank; scales reached: {reached})"))
        rows.append(("size", _size(record)))
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def _method(facts: Mapping[str, Any]) -> str:
    text = str(facts["format"])
    if facts.get("rank") is not None:
        text += f", rank {facts['rank']}"
    if facts.get("alpha") is not None:
        text += f", alpha {number(facts['alpha'])}, scaling {number(facts.get('scaling'), 3)}"
    return text


def _chosen(settings: Mapping[str, Any]) -> str:
    top, which = f"the top {settings['top_k']} {settings['side']} singular vectors", settings["which"]
    if isinstance(which, str):
        words = {"all": "every intruder", "top": "the first intruder of each layer"}
        return f"{words[which]} among {top}, epsilon {number(settings['epsilon'])}"
    named = "; ".join(f"{pattern}: {','.join(map(str, indices))}" for pattern, indices in which.items())
    return f"by index: {named}"


def _precision(record: Repair) -> str:
    summary = record.summary
    text = f"{', '.join(sorted({layer.dtype for layer in record.changed}))}, off the formula by at most "
    sizes = ((summary["weight_error"], "of ‖W'‖"), (summary["update_error"], "of ‖dW'‖"))
    text += " and ".join(f"{error:.1g} {of}" for error, of in sizes if error is not None) or "nothing that was measured"
    return f"{text}; scales by at most {summary['scale_error']:.1g}"


def _size(record: Repair) -> str:
    summary, changed = record.summary, record.changed
    before = [layer.rank for layer in changed if layer.rank is not None]
    after = [layer.rank_after for layer in changed if layer.rank_after is not None]
    text = f"{_change(summary['parameters'], summary['parameters_after'], '{:,}')} values stored for these layers"
    if before and after:
        text = f"rank {_to(_span(before), _span(after))}, {text}"
    elif before:
        text += ", whole instead of as factors"
    return text


def _problems(record: Repair) -> str:
    failed = record.audit.failed if record.audit is not None else ()
    return "\n".join(f"{layer.status}: {layer.name}: {layer.error}" for layer in failed)


def _vectors(record: Repair, verbose: bool) -> str:
    layers = record.layers if verbose else record.changed
    if not layers:
        return ""
    shown, hidden = layers, ""
    if len(layers) > SHOWN_LAYERS and not verbose:
        most = sorted(layers, key=lambda layer: -(layer.update_change or 0))[:SHOWN_LAYERS]
        shown = tuple(layer for layer in layers if layer in most)
        hidden = f"({plural(len(layers) - len(shown), 'more layer')}, which changed less; --verbose lists all)"
    columns = _columns(record)
    rows = [
        [get(layer, vector) if place == 0 or not of_layer else "" for _, of_layer, get in columns]
        for layer in shown
        for place, vector in enumerate(layer.vectors)
    ]
    text = table([title for title, _, _ in columns], rows, left=(0,))
    return "\n\n".join(["\n".join(line for line in (text, hidden) if line), fill(NOTES["table"], WIDTH)])


def _columns(record: Repair) -> list[tuple[str, bool, Callable[[LayerRepair, ScaledVector], str]]]:
    """(title, whether it tells of the layer rather than the vector, cell); without those that would say nothing."""
    vectors = [vector for layer in record.layers for vector in layer.vectors]
    mixed = len({vector.intruder for vector in vectors}) > 1
    missed = any(abs(vector.scale_achieved - vector.scale) > 5e-4 for vector in vectors)
    ranked = any(layer.rank is not None for layer in record.layers)
    columns: list[tuple[bool, str, bool, Callable[[LayerRepair, ScaledVector], str]]] = [
        (True, "layer", True, lambda layer, _: layer.name + (" *" if layer.noise_like_base else "")),
        (True, "index", False, lambda _, v: _to(str(v.index), _place(v))),
        (mixed, "intruder", False, lambda _, v: "yes" if v.intruder else "no"),
        (True, "cos", False, lambda _, v: decimals(v.max_cosine, 2)),
        (True, "scale", False, lambda _, v: number(v.scale)),
        (missed, "reached", False, lambda _, v: f"{v.scale_achieved:.3f}"),
        (True, "σ", False, lambda _, v: _change(v.sigma, 0.0 if _gone(v) else v.sigma_after, "{:.4g}")),
        (True, "energy", False, lambda _, v: _change(v.energy, v.energy_after, "{:.2%}")),
        (True, "change", True, lambda layer, _: _percent(layer.update_change)),
        (True, "error", True, lambda layer, _: "-" if layer.update_error is None else f"{layer.update_error:.1e}"),
        (ranked, "rank", True, lambda layer, _: _to(_rank(layer.rank), _rank(layer.rank_after))),
        (True, "intruders", True, lambda layer, _: _to(str(layer.intruders_before), str(layer.intruders_after))),
    ]  # fmt: skip
    return [(title, of_layer, get) for wanted, title, of_layer, get in columns if wanted]


def _notes(record: Repair, verbose: bool) -> str:
    summary, lines = record.summary, []
    before, after, top_k = summary["intruders_before"], summary["intruders_after"], record.settings["top_k"]
    ranks = [None if _gone(vector) else vector.index_after for vector in record.scaled if vector.intruder]
    stayed = sum(index is not None and index < top_k for index in ranks)
    if stayed:
        still = f"{stayed} of {plural(len(ranks), 'scaled intruder')} {'is' if stayed == 1 else 'are'}"
        lines.append(fill(NOTES["count"].format(stayed=still, top_k=top_k), WIDTH))
    if after > before or (after == before and ranks and not stayed):
        lines.append(fill(NOTES["others"], WIDTH))
    noisy = summary["layers_noise_like_base"]
    if noisy:
        lines.append(fill(NOTES["noise"].format(layers=plural(noisy, "layer")), WIDTH))
    lines += [f"note: {remark}" for remark in record.remarks]
    if verbose:
        lines += [f"note: {layer.name}: {note}" for layer in record.layers for note in layer.notes]
    return "\n".join(lines)


def _left_behind(files: Mapping[str, str], verbose: bool) -> str:
    if not files:
        return ""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in files.items():
        groups[reason].append(name)
    lines = [f"left behind: {plural(len(files), 'file')} of the source"]
    for reason, names in groups.items():
        shown = names if verbose else names[:SHOWN_FILES]
        more = "" if len(shown) == len(names) else f", … ({len(names) - len(shown)} more)"
        lines.append(f"  {', '.join(shown)}{more}: {reason}")
    return "\n".join(lines)


def _check(verification: Verification) -> str:
    count = len(verification.layers)
    if verification.holds:
        worst = max((layer.error or 0.0 for layer in verification.layers), default=0.0)
        compared = f"; {plural(count, 'layer')}, largest error {worst:.1g} of ‖W'‖" if count else ""
        what = f"{verification.folder} matches its record of a repair of {verification.source}"
        return f"Verified: {what}{compared}."
    amiss = [f"{len(verification.failed)} of {plural(count, 'layer')} not as recorded"] if verification.failed else []
    amiss += [plural(len(verification.problems), "problem")] if verification.problems else []
    return (
        f"NOT verified: {verification.folder} is not the repair of {verification.source} that its record says: "
        f"{', '.join(amiss)}."
    )


def _to(before: str, after: str) -> str:
    return before if before == after else before + ARROW + after


def _change(before: float, after: float, form: str) -> str:
    return _to(form.format(before), form.format(after))


def _gone(vector: ScaledVector) -> bool:
    """Whether nothing but rounding is left of it."""
    return abs(vector.scale_achieved) < GONE


def _place(vector: ScaledVector) -> str:
    if _gone(vector):
        return "gone"
    return "lower" if vector.index_after is None else str(vector.index_after)


def _rank(rank: int | None) -> str:
    return "whole" if rank is None else str(rank)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _span(values: Iterable[float], form: str = "{}") -> str:
    """The smallest and the largest value, or the one that both are."""
    ordered = sorted(values)
    ends = [form.format(ordered[0]), form.format(ordered[-1])]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)
