"""The page itself: what is read without a script, and where the script puts the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib import resources
from typing import Any

from spectra.errors import in_one_line
from spectra.page.data import as_script
from spectra.page.library import hash_of, plotly_library
from spectra.page.words import ABOUT, GLOSSARY, MORE_MATRICES
from spectra.records.report import CANNOT_TELL, LEVELS, Report
from spectra.records.sweeps import mean_measure, mean_update_size, trainable_ratio
from spectra.render.chance import by_chance
from spectra.render.columns import decimals, failures, method_of, number, percent, plural
from spectra.render.coverage import partial, unseen
from spectra.render.finding import finding
from spectra.render.text import remarks

MARK = "<!doctype html>\n<!-- spectra.page/1 -->"  # how a page begins; nothing else is ever replaced by one
SCRIPTS = ("core.js", "counts.js", "figures.js", "map.js", "charts.js", "table.js", "layer.js", "compare.js", "page.js")
LISTED = 200  # skipped tensors of one reason that are named


def document(
    reports: Sequence[Report], labels: Sequence[str], data: Mapping[str, Any], unreadable: Sequence[str]
) -> str:
    """The whole file."""
    library, library_hash = plotly_library()
    script = asset(*SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {hash_of(script.encode())} {library_hash}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    several = len(reports) > 1
    title = f"{len(reports)} fine-tunes" if several else f"{labels[0]}: {finding(reports[0]).title.lower()}"
    body = asset("body.html").format(
        above=_unreadable(unreadable) + (_several(reports, labels) if several else ""),
        below="" if several else asset("epsilon.html"),
        findings="\n".join(_of_report(_finding, reports)),
        records="\n".join(_of_report(_record, reports)),
        more_matrices=_e(MORE_MATRICES),
        glossary="".join(f"<dt>{_e(word)}</dt><dd>{_e(meaning)}</dd>" for word, meaning in GLOSSARY),
        about=_e(ABOUT),
        version=_e(reports[0].spectra_version),
    )
    return (
        f'{MARK}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="intruder-spectra {_e(reports[0].spectra_version)}">\n'
        f"<title>{_e(title)} · Spectra</title>\n<style>\n{asset('page.css')}</style>\n"
        "<noscript><style>[data-report] {display: block !important} .live {display: none}</style></noscript>\n"
        f"</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{as_script(data)}</script>\n'
        f'<script type="text/plain" id="library">{library}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


@lru_cache
def asset(*names: str) -> str:
    """Files of ``assets/``, one after the other."""
    home = resources.files("spectra.page") / "assets"
    return "".join((home / name).read_text(encoding="utf-8") for name in names)


def _e(text: Any) -> str:
    return escape(in_one_line(str(text)))


def _of_report(write: Any, reports: Sequence[Report]) -> Iterable[str]:
    for place, report in enumerate(reports):
        yield f'<div data-report="{place}"{" hidden" if place else ""}>\n{write(report)}\n</div>'


def _unreadable(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    title = plural(len(problems), "fine-tune") + " could not be read"
    return f'<section class="failed"><h3>{title}</h3>{_list(problems)}</section>'


def _several(reports: Sequence[Report], labels: Sequence[str]) -> str:
    """What stands above a fine-tune that was chosen among several."""
    bases = list(dict.fromkeys(str(report.base.get("path")) for report in reports))
    of = f"of <bdi>{_e(bases[0])}</bdi>" if len(bases) == 1 else f"of {len(bases)} bases"
    title = f'<h2 id="comparison-title">{len(reports)} fine-tunes {of}, side by side</h2>'
    options = "".join(f'<option value="{place}">{_e(label)}</option>' for place, label in enumerate(labels))
    return (
        asset("epsilon.html", "comparison.html").replace("<h2></h2>", title)
        + '<div class="picker live"><label for="report">Fine-tune shown below</label>'
        f'<select id="report">{options}</select></div>'
    )


def _finding(report: Report) -> str:
    found, part, tuned, level = finding(report), partial(report), report.tuned, report.intruder_level
    heading = f"<h2>{_e(found.title)}</h2>"
    if part is not None:
        heading = f"<h2>Partial: {_e(part)}</h2>{_list(unseen(report))}<h3>Of the rest: {_e(found.title)}</h3>"
    notes = "".join(f"<p>{_e(line)}</p>" for line in found.more)
    return f"""<section class="finding {level.replace(" ", "-")}" aria-label="What was found">
<div class="said">
<p class="what"><bdi>{_e(tuned.get("path", "a fine-tune"))}</bdi> <span>{_e(method_of(tuned))}</span></p>
{heading}
<p class="lead">{_e(found.said)}</p>
{_scale(report)}
{notes}
</div>
{_figures(report)}
</section>
{_remarks(report)}"""


def _scale(report: Report) -> str:
    """Where the share of intruders lies among the levels."""
    if report.intruder_level == CANNOT_TELL:
        return ""
    steps = []
    for limit, word in LEVELS:
        here = word == report.intruder_level
        span = "0" if not limit else f"≤ {limit:.0%}" if limit < 1 else f"> {LEVELS[-2][0]:.0%}"
        current = ' aria-current="true"' if here else ""
        steps.append(f'<li class="{word}"{current}><b>{word}</b> <span>{span}</span></li>')
    label = "Level of intruders, by their share of the vectors compared"
    return f'<ol class="scale" aria-label="{label}">{"".join(steps)}</ol>'


def _figures(report: Report) -> str:
    summary = report.summary
    size = mean_update_size(report)
    judged, noisy = summary["layers_judged"], summary["layers_noise_like_base"]
    apart = f"; {noisy} noise-like apart" if noisy else ""
    every, energy = summary["intruders_all"], percent(mean_measure(report, "intruder_energy_share"))
    beyond = f"; {every} in all layers" if every != summary["intruders"] else ""
    items = [
        (
            str(summary["intruders"]),
            "intruder dimensions",
            f"of {summary['vectors_compared']:,} vectors, with {energy} of their energy{beyond}",
        ),
        (by_chance(report.expected_by_chance), "by chance", "in random updates with the same singular values"),
        (str(summary["layers_with_intruders"]), "layers with intruders", f"of {judged} compared{apart}"),
        (decimals(size), "mean ‖ΔW‖ / ‖W₀‖", "the size of the update"),
        (decimals(report.update_over_threshold, 2), "largest ‖ΔW‖₂ / θ", "from 1 on, a first intruder is expected"),
        (_parameters(summary["trainable_parameters"]), "values in the update", _ratio(report)),
    ]
    if report.baseline is not None:
        items.append((str(report.baseline["intruders_new"]), "new since the baseline", "layer by layer"))
    cells = "".join(f"<div><dt>{what}<small>{more}</small></dt><dd>{value}</dd></div>" for value, what, more in items)
    return f'<dl class="figures">{cells}</dl>'


def _parameters(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / min(size, 1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,}"


def _ratio(report: Report) -> str:
    ratio = trainable_ratio(report)
    return (
        ""
        if ratio is None
        else f"{ratio:.3g} of the weights it changes"
        if ratio > 1
        else f"{ratio:.1%} of the weights it changes"
    )


def _remarks(report: Report) -> str:
    problems = failures(report.failed)
    notes = [str(report.base["caveat"])] if report.base.get("caveat") else []
    if report.base.get("claimed"):
        notes.append(str(report.base["claimed"]))
    if report.tuned.get("conditional"):
        notes.append("this adapter is active only after its invocation tokens")
    notes += remarks(report)
    html = ""
    if problems:
        title = plural(len(report.failed), "layer") + " could not be analysed"
        html += f'<section class="failed"><h3>{title}</h3>{_list(problems)}</section>\n'
    if notes:
        html += f'<section class="notes"><h3>To know</h3>{_list(notes)}</section>'
    return html


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"


def _record(report: Report) -> str:
    summary, settings = report.summary, report.settings
    counts = [
        (summary[f"layers_{what}"], words)
        for what, words in (
            ("analysed", "analysed"), ("proved_small", "proved small"), ("unchanged", "unchanged"),
            ("failed", "failed"), ("skipped", "skipped"), ("noise_like_base", "with a base of plain noise"),
        )
    ]  # fmt: skip
    floors = sorted({round(layer.random_floor, 2) for layer in report.layers if layer.random_floor is not None})
    inputs = [
        ("Fine-tune", report.tuned.get("path")),
        ("Method", method_of(report.tuned)),
        ("Its fingerprint", _fingerprint(report.tuned)),
        ("Base", report.base.get("path")),
        ("Base is stored as", report.base.get("quantised") or report.base["format"]),
        ("Its fingerprint", _fingerprint(report.base)),
    ]
    chosen = [
        ("Compared", f"the top {settings['top_k']} {settings['side']} singular vectors of each layer"),
        ("Intruder below", f"ε = {settings['epsilon']:g}"),
        ("A random direction", "–".join(f"{floor:.2f}" for floor in (floors[:1] + floors[1:][-1:]))),
        ("Layers", ", ".join(f"{count} {words}" for count, words in counts if count)),
        ("As the paper counts", f"{summary['intruders_as_in_paper']} intruders, without embeddings and heads"),
        ("Borderline", f"{plural(summary['borderline'], 'cosine')} within 0.001 of ε, settled in float64"),
        ("Engine", ", ".join(str(settings[key]) for key in ("engine", "dtype", "device") if settings.get(key))),
        ("Threads", settings.get("threads")),
        *((key.capitalize(), ", ".join(settings[key])) for key in ("include", "exclude") if settings.get(key)),
        ("Fused matrices", "split" if settings.get("split_fused") else None),
        ("Spectra", report.spectra_version),
        ("Seconds", None if report.seconds is None else number(report.seconds, 3)),
    ]
    return f"""<div class="columns"><section><h3>Inputs</h3>{_facts(inputs)}</section>
<section><h3>Settings and totals</h3>{_facts(chosen)}</section></div>
{_skipped(report)}"""


def _fingerprint(facts: Mapping[str, Any]) -> str | None:
    print_ = facts.get("fingerprint")
    return None if print_ is None else f"{print_} (of its {facts.get('fingerprint_covers', 'headers')})"


def _facts(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<dt>{what}</dt><dd>{_e(said)}</dd>" for what, said in rows if said not in (None, ""))
    return f'<dl class="facts">{cells}</dl>'


def _skipped(report: Report) -> str:
    if not report.skipped:
        return "<section><h3>Skipped</h3><p>Nothing: every tensor of the fine-tune is in an update.</p></section>"
    reasons: dict[str, list[str]] = {}
    for item in report.skipped:
        reasons.setdefault(item["reason"], []).append(item["name"])
    html = ""
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = [f"and {len(names) - LISTED} more; the JSON report has all of them"] if len(names) > LISTED else []
        html += f"<details><summary>{len(names)} × {_e(reason)}</summary>{_list([*names[:LISTED], *more])}</details>"
    return f"<section><h3>Skipped: {plural(len(report.skipped), 'tensor')} or module</h3>{html}</section>"
