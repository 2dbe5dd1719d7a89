"""The report for people, as plain text: what matters first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from spectra.errors import in_one_line
from spectra.records.report import LayerReport, Report, worst_layers
from spectra.records.sweeps import mean_measure, mean_update_size
from spectra.render.chance import by_chance, chance_in_words, nearness
from spectra.render.columns import (
    decimals,
    failures,
    grouped_notes,
    in_ascii,
    method_of,
    number,
    percent,
    plural,
    table,
)
from spectra.render.coverage import headline, partial
from spectra.render.finding import UNRELATED, finding

PICTURE_ROWS = 40  # more layers than this, and only those with intruders are drawn
PICTURE_COLUMNS = 60
WORST_ROWS = 8
RANGES = 6  # so many runs of indices are spelled out in the table of worst layers
MARKS = {"intruder": "█", "borderline intruder": "▓", "borderline": "░", "not": "·", "absent": " "}
ASCII_MARKS = {"intruder": "#", "borderline intruder": "%", "borderline": "+", "not": ".", "absent": " "}


def render_report(report: Report, *, verbose: bool = False, ascii_only: bool = False) -> str:
    """One report: what was found, totals, worst layers, module types, and the layer × index picture."""
    sections = [
        headline(report) or "",
        "\n".join(finding(report).lines),
        _facts(report),
        _problems(report),
        _worst(report),
        _module_types(report),
        _picture(report, verbose, ASCII_MARKS if ascii_only else MARKS),
        _skipped(report, verbose),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return in_ascii(text) if ascii_only else text


def render_summary(reports: Sequence[Report], unreadable: Sequence[Exception] = ()) -> str:
    """Several reports as one table, a row each, the worst first; then what could not be read."""
    header = ["fine-tune", "method", "rank", "alpha", "‖dW‖/‖W0‖", "‖dW‖₂/θ", "intruders", "by chance", "share",
              "energy", "all", "layers", "level"]  # fmt: skip
    rows = []
    for report in sorted(reports, key=lambda report: report.share, reverse=True):
        summary = report.summary
        level = summary["intruder_level"]
        if summary["layers_failed"]:
            level += f" ({plural(summary['layers_failed'], 'layer')} failed)"
        said = partial(report)
        if said is not None:
            level += f" (partial: {said})"
        rows.append([
            report.tuned["path"], report.tuned["format"],
            number(report.tuned.get("rank")), number(report.tuned.get("alpha")),
            decimals(mean_update_size(report)), decimals(report.update_over_threshold, 2), str(summary["intruders"]),
            by_chance(report.expected_by_chance), f"{report.share:.1%}",
            percent(mean_measure(report, "intruder_energy_share")),
            str(summary["intruders_all"]), f"{summary['layers_with_intruders']} of {summary['layers_judged']}", level,
        ])  # fmt: skip
    for error in unreadable:
        path, _, problem = str(error).partition(": ")
        rows.append([path, "not read", *["-"] * (len(header) - 3), in_one_line(problem, 100)])
    notes = (
        "Sorted by share, which is of the vectors compared in layers whose base is no plain noise; all counts every "
        "layer. ‖dW‖/‖W0‖ is the mean over layers; ‖dW‖₂/θ is the largest update beside the size at which a random one "
        "has its first intruder. By chance: the count of random updates with the same singular values. Energy: the "
        "intruders' share of Σσ² of the vectors compared. Level puts the share into a word; it grades no fine-tune."
    )
    return table(header, rows, left=(0, 1, 12)) + "\n\n" + notes + "\n"


def _facts(report: Report) -> str:
    summary, settings, tuned = report.summary, report.settings, report.tuned
    method = method_of(tuned)
    if tuned.get("conditional"):
        method += " (conditional: active only after its invocation tokens)"
    floors = sorted({f"{layer.random_floor:.2f}" for layer in report.layers if layer.random_floor is not None})
    counts = [f"{summary['layers_analysed']} analysed"]
    if summary["layers_proved_small"]:
        counts.append(f"{summary['layers_proved_small']} proved small")
    counts.append(f"{summary['layers_unchanged']} unchanged")
    if summary["layers_failed"]:
        counts.append(f"{summary['layers_failed']} FAILED")
    counts.append(f"{summary['layers_skipped']} skipped")
    total, every, paper = (summary[key] for key in ("intruders", "intruders_all", "intruders_as_in_paper"))
    intruders = f"{total} in {plural(summary['layers_with_intruders'], 'layer')}"
    if every != total:
        intruders += f"; {every} in all layers, noise-like ones included"
    if paper != every:
        intruders += f"; {paper} as the paper counts, without embeddings and heads"
    top = (
        f"the top {settings['top_k']} {settings['side']} singular vectors of each layer, epsilon {settings['epsilon']}"
    )
    rows = [("fine-tune", f"{tuned['path']}  ({method})"), ("base", report.base["path"])]
    said = str(report.base.get("caveat") or "")
    if report.base.get("claimed") and repr(tuned.get("base_model_name_or_path")) not in said:
        rows.append(("", f"note: {report.base['claimed']}"))
    if said:
        rows.append(("", f"note: {said}"))
    rows.append(("looked at", top))
    if floors:
        floor = floors[0] if len(floors) == 1 else f"{floors[0]}–{floors[-1]}"
        rows.append(("", f"(a random direction would show a cosine of about {floor})"))
    parameters = f"{summary['trainable_parameters']:,} values in the updates of these layers"
    share = mean_measure(report, "intruder_energy_share")
    if total and share is not None:
        intruders += f"; {share:.1%} of Σσ² of the vectors compared, the mean over layers"
    rows += [("layers", ", ".join(counts)), ("intruders", intruders)]
    if report.judged:
        rows.append(("by chance", chance_in_words(report)))
    near = nearness(report)
    if near is not None:
        rows.append(("nearest", near))
    size = mean_update_size(report)
    if size is not None:
        rows.append(("update", f"mean ‖dW‖/‖W0‖ {decimals(size)}, {parameters}"))
    if summary["borderline"]:
        cosines = plural(summary["borderline"], "cosine")
        rows.append(("borderline", f"{cosines} within 0.001 of epsilon, settled in float64"))
    return "\n".join(in_one_line(f"{label:<11}{text}".rstrip()) for label, text in rows)


def _problems(report: Report) -> str:
    return "\n".join(failures(report.failed) + ["note: " + note for note in remarks(report)])


def remarks(report: Report) -> list[str]:
    """What readers of the totals should know of single layers and of the cache."""
    lines = grouped_notes((layer.name, layer.notes) for layer in report.layers)
    lines += [
        f"{layer.name}: the copy of its base weight that came with the adapter is another weight; "
        "is this the wrong base?"
        for layer in report.layers
        if "base_copy_differs" in layer.flags
    ]
    lines += [
        f"{layer.name}: what the adapter stores whole differs from the base's by "
        f"{layer.measures['update_norm_relative']:.2f} of it: is this the wrong base?"
        for layer in report.layers
        if layer.update["kind"] == "dense"
        and str(report.tuned["format"]).startswith("peft-")
        and (layer.measures.get("update_norm_relative") or 0) >= UNRELATED
    ]
    if report.base.get("changed_since_cached"):
        lines.append("the base has changed since its spectra were cached; they were not used")
    stale = sum("stale_cache" in layer.flags for layer in report.layers)
    if stale:
        lines.append(f"the cached spectra of {plural(stale, 'layer')} are of other weights and were not used")
    small = [layer.name for layer in report.layers if layer.vectors and min(layer.shape) < 128]
    if small:
        lines.append(
            f"{plural(len(small), 'layer')} narrower than 128, where chance alone brings a cosine closer to epsilon"
        )
    return lines


def _worst(report: Report) -> str:
    layers = worst_layers(report, WORST_ROWS)
    if not layers:
        return ""
    rows = []
    for layer in layers:
        lowest, known = lowest_cosine(layer)
        rows.append([
            layer.name + (" *" if layer.noise_like_base else ""), str(layer.intruders), ranges(layer.intruder_indices),
            f"{lowest:.2f}" if known else f"≤ {lowest:.2f}", decimals(layer.measures["update_norm_relative"]),
            decimals(layer.measures.get("update_over_threshold"), 2),
            decimals(layer.measures["effective_rank"], 1), number(layer.update["rank"]),
        ])  # fmt: skip
    header = ["worst layers", "intruders", "at index", "lowest cos", "‖dW‖/‖W0‖", "‖dW‖₂/θ", "eff. rank",
              "rank"]  # fmt: skip
    text = table(header, rows, left=(0, 2))
    text += "\nθ: the size at which a random update is expected to have its first intruder there"
    if any(layer.noise_like_base for layer in layers):
        text += "\n* its base is plain noise, where anything moves the vectors"
    return text


def lowest_cosine(layer: LayerReport) -> tuple[float, bool]:
    """(the lowest cosine of a layer's intruders, True); (an upper bound on it, False) where it is not known."""
    intruders = [vector for vector in layer.vectors if vector.intruder]
    lowest = min(v.max_cosine_bounds[1] if v.max_cosine is None else v.max_cosine for v in intruders)
    return lowest, all(vector.max_cosine is not None for vector in intruders)


def _module_types(report: Report) -> str:
    kinds = report.summary["by_module_type"]
    if not any(row["intruders"] for row in kinds.values()):
        return ""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1]["intruders"], item[0]))
    rows = [
        [name, str(row["layers"]), str(row["intruders"]), f"{row['intruders'] / max(row['vectors'], 1):.0%}"]
        for name, row in ordered
        if row["layers"]
    ]
    return table(["by module type", "layers", "intruders", "of vectors"], rows, left=(0,))


def _picture(report: Report, verbose: bool, marks: dict[str, str]) -> str:
    analysed = [layer for layer in report.layers if layer.vectors]
    if not analysed:
        return ""
    shown = analysed
    hidden = ""
    if len(analysed) > PICTURE_ROWS and not verbose:
        shown = sorted((layer for layer in analysed if layer.intruders), key=lambda layer: -layer.intruders)[
            :PICTURE_ROWS
        ]
        shown.sort(key=analysed.index)
        hidden = f"({len(analysed) - len(shown)} more layers; --verbose draws all)"
        if not shown:
            return ""
    count = max(len(layer.vectors) for layer in analysed)
    if count > PICTURE_COLUMNS:
        return f"(no picture: more than {PICTURE_COLUMNS} vectors a layer)"
    prefix = _common_prefix([layer.name for layer in shown])
    width = max(len(layer.name) - len(prefix) + 2 * bool(layer.noise_like_base) for layer in shown)
    width = max(width, len("layer × index"))
    index = "".join(str(i % 10) for i in range(count))
    lines = [f"{'layer × index':<{width}}  {index}"]
    for layer in shown:
        star = " *" if layer.noise_like_base else ""
        lines.append(f"{layer.name[len(prefix) :] + star:<{width}}  {_row(layer, count, marks)}".rstrip())
    key = f"{marks['intruder']} intruder, {marks['not']} not; index 0 is the largest singular value"
    if report.summary["borderline"]:
        key += f"; {marks['borderline intruder']} {marks['borderline']} the same, borderline"
    if any(layer.noise_like_base for layer in shown):
        key += "; * its base is plain noise"
    if prefix:
        key += f"; names without {prefix!r}"
    counts = {row["index"]: row["intruders"] for row in report.summary["by_index"] if row["intruders"]}
    by_index = ", ".join(f"{index} in {plural(count, 'layer')}" for index, count in counts.items())
    lines += [key, f"by index: {by_index}" if counts else "", hidden]
    return "\n".join(line for line in lines if line)


def _row(layer: LayerReport, count: int, marks: dict[str, str]) -> str:
    row = [marks["absent"]] * count
    for vector in layer.vectors:
        kind = "intruder" if vector.intruder else "not"
        if "borderline" in vector.flags:
            kind = "borderline intruder" if vector.intruder else "borderline"
        row[vector.index] = marks[kind]
    return "".join(row)


def _skipped(report: Report, verbose: bool) -> str:
    if not report.skipped:
        return ""
    reasons = Counter(item["reason"] for item in report.skipped)
    lines = [f"skipped: {len(report.skipped)}"]
    for reason, count in reasons.most_common():
        names = [item["name"] for item in report.skipped if item["reason"] == reason]
        if verbose and not reason.startswith("left out"):
            lines += [f"  {name}: {reason}" for name in names]
        else:
            lines.append(f"  {count} × {reason} ({names[0]}{', …' if count > 1 else ''})")
    return "\n".join(lines)


def _common_prefix(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) + "." if shared else ""


def ranges(indices: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    return ",".join(parts) if len(parts) <= RANGES else ",".join(parts[:RANGES]) + ",…"
