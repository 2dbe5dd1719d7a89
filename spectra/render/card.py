"""A section for a model card: Markdown of one report, and its place in a card that is there already.

The figures go into the text and not into the card's ``model-index``: that lists evaluations, each on a data set, and
leaderboards sort by it.  What this reports is measured on weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spectra.errors import UsageError, in_one_line
from spectra.records.report import Report
from spectra.records.sweeps import mean_measure, mean_update_size
from spectra.render.chance import chance_in_words
from spectra.render.columns import decimals, failures, grouped_notes, method_of, plural
from spectra.render.coverage import partial, unseen
from spectra.render.finding import finding
from spectra.render.naming import invocation, named_model, public_names, without_paths

BEGIN, END = "<!-- spectra:begin -->", "<!-- spectra:end -->"
TYPES = 12  # so many module types are listed
# A marker has a line of its own, so that a card can speak of markers without having one.
_MARKERS = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t]*(<!--[ \t]*spectra:(begin|end)[ \t]*-->)[ \t]*\r?$", re.MULTILINE)
_PLAIN = re.compile(r"[\w ./#=@:+,()×-]+", re.ASCII)
_SPECIAL = re.compile(r"([\\`*_\[\]<>|&#~!$])")

WORDS = (
    "An *intruder dimension* is a leading singular vector of a tuned weight that is nearly orthogonal to every "
    "singular vector of the base weight ([Shuttleworth et al. 2024](https://arxiv.org/abs/2410.21228)). The count says "
    "how much of the top of the spectrum is new. It does not say how good this model is, nor how much it forgot: "
    "weights show risk, and only an evaluation shows forgetting. Counts of several fine-tunes compare "
    "only where their updates are of similar size."
)


def to_model_card(
    report: Report,
    *,
    root: str | Path | None = None,
    url: str | None = None,
    versions: Mapping[str, str] | None = None,
    further: Sequence[str] = (),
    addresses: Mapping[str, str] | None = None,
) -> str:
    """The section, Markdown between its two markers, without a line end after the last.

    Parameters
    ----------
    report : its paths are called as :func:`spectra.render.naming.public_names` says.
    root : the working directory, below which paths are shown; without it, the last parts of paths are.
    url : where Spectra has its home, if it has one.
    versions : of the libraries that computed, by name.
    further : words of the command that the report does not have, such as ``--allow-pickle``.
    addresses : a path of the report → the address of which that is a local copy.
    """
    names = public_names([report.tuned["path"], report.base["path"]], root, addresses)
    found = finding(replace(report, baseline=None))
    said = partial(report)
    made = " and ".join(f"{name} {version}" for name, version in (versions or {}).items())
    home = f"[Spectra]({url})" if url else "Spectra"
    sections = [
        "## Spectral audit",
        "" if said is None else f"**Partial: {_prose(said)}**",
        " ".join([f"**{_prose(found.said)}**", *map(_prose, found.more)]),
        _table(("Finding", ""), _facts(report, names)),
        _module_types(report),
        "\n".join(f"- {_prose(note)}" for note in _notes(report, names, root)),
        WORDS,
        f"Made with {home} {report.spectra_version}{f' ({made})' if made else ''}. To reproduce it:",
        f"```sh\n{invocation([report], names, further)}\n```",
    ]
    return "\n\n".join([BEGIN, *filter(None, sections), END])


def with_section(card: bytes, section: str, where: str | Path) -> bytes:
    """A card with the section between its markers, or after its content where it has none; all else byte for byte.

    Parameters
    ----------
    card : the file's content, UTF-8, with or without a byte order mark; new lines end as most of its own do.
    where : the file, for the error.

    Raises
    ------
    UsageError : no UTF-8; a marker without the other, twice, or the end before the beginning.
    """
    try:
        card.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not text in UTF-8 (at byte {error.start})") from None
    end = b"\r\n" if card.count(b"\r\n") * 2 > card.count(b"\n") else b"\n"
    text = section.encode().replace(b"\n", end)
    markers = list(_MARKERS.finditer(card))
    if not markers:
        if not card.removeprefix(b"\xef\xbb\xbf"):
            return card + text + end
        return card + (b"" if card.endswith(b"\n") else end) + (b"" if _ends_empty(card) else end) + text + end
    kinds = [marker[2].decode() for marker in markers]
    if kinds != ["begin", "end"]:
        raise UsageError(
            f"{where}: its markers are {', '.join(kinds)}; expected {BEGIN} once and, after it, {END} once, each on a "
            "line of its own"
        )
    begin, stop = markers
    return card[: begin.start(1)] + text + card[stop.end(1) :]


def _ends_empty(card: bytes) -> bool:
    return re.search(rb"\n[ \t]*\r?\n\Z", card) is not None


def _facts(report: Report, names: Mapping[str, str]) -> list[tuple[str, str]]:
    summary, settings, tuned = report.summary, report.settings, report.tuned
    base = _code(names[str(report.base["path"])])
    claimed = tuned.get("base_model_name_or_path")
    if claimed and report.base.get("named_by_adapter") is not True:
        base += f" (the adapter's config names {_code(named_model(str(claimed)))})"
    counts = [f"{summary['layers_analysed'] + summary['layers_proved_small']} analysed"]
    counts.append(f"{summary['layers_unchanged']} unchanged")
    if summary["layers_failed"]:
        counts.append(f"**{summary['layers_failed']} that could not be analysed**")
    counts.append(f"{summary['layers_skipped']} skipped")
    if report.coverage.is_partial:
        counts.append(f"**{report.coverage.unseen} not looked at**")
    vectors, total, every = (summary[key] for key in ("vectors_compared", "intruders", "intruders_all"))
    share = f" ({total / vectors:.1%})" if vectors else ""
    beyond = f"; {every} in all layers, noise-like ones included" if every != total else ""
    rows = [
        ("Fine-tune", _prose(method_of(tuned)) + (" (active on some tokens only)" if tuned.get("conditional") else "")),
        ("Base model", base),
        (
            "Looked at",
            f"the top {settings['top_k']} {settings['side']} singular vectors of each layer; an intruder's cosine with "
            f"every one of the base's is below {settings['epsilon']}",
        ),
        ("Layers", ", ".join(counts)),
        ("Intruder dimensions", f"{total} of {vectors} vectors{share}, in "
         f"{plural(summary['layers_with_intruders'], 'layer')}{beyond}"),
    ]  # fmt: skip
    if summary["intruders_as_in_paper"] != total:
        rows.append(("Without embeddings and heads", str(summary["intruders_as_in_paper"])))
    if report.judged:
        rows.append(("By chance", _prose(chance_in_words(report))))
    energy = mean_measure(report, "intruder_energy_share")
    if total and energy is not None:
        rows.append(("Intruders' share of energy", f"{energy:.1%} of Σσ² of these vectors, the mean over layers"))
    if report.update_over_threshold is not None:
        ratio = decimals(report.update_over_threshold, 2)
        rows.append(("Largest update", f"{ratio} of the size at which a random update has its first intruder"))
    size = mean_update_size(report)
    if size is not None:
        rows.append(("Size of the update", f"‖ΔW‖/‖W₀‖ {decimals(size)}, the mean over layers"))
    floors = sorted({f"{layer.random_floor:.2f}" for layer in report.layers if layer.random_floor is not None})
    if floors:
        rows.append(("A random direction's cosine", "about " + "–".join(dict.fromkeys((floors[0], floors[-1])))))
    return rows


def _module_types(report: Report) -> str:
    kinds = report.summary["by_module_type"]
    types = sorted((item for item in kinds.items() if item[1]["intruders"]), key=lambda item: -item[1]["intruders"])
    rows = [
        (_code(name), str(row["layers"]), str(row["intruders"]), f"{row['intruders'] / max(row['vectors'], 1):.0%}")
        for name, row in types[:TYPES]
    ]
    if not rows:
        return ""
    return _table(("Where they are", "layers", "intruders", "of the vectors"), rows, right=3)


def _notes(report: Report, names: Mapping[str, str], root: str | Path | None) -> list[str]:
    notes = [str(report.base["caveat"])] if report.base.get("caveat") else []
    notes += unseen(report)
    notes += failures(report.failed)
    notes += grouped_notes((layer.name, layer.notes) for layer in report.layers)
    return [in_one_line(without_paths(note, names, root), 600) for note in notes]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0) -> str:
    left = len(header) - right
    lines = [header, ["---"] * left + ["---:"] * right, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(text: str) -> str:
    """A name in the type of code; whatever could be Markdown or HTML in it as a character's number."""
    text = in_one_line(text, 200)
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    return "<code>" + "".join(c if c.isalnum() else f"&#{ord(c)};" for c in text) + "</code>"


def _prose(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", in_one_line(text, 1000))
