"""Aligned columns of text, numbers as they stand in them, and all of it in ASCII."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectra.errors import in_one_line

if TYPE_CHECKING:
    from spectra.records.report import LayerReport

LEAST_NAME = 16  # characters that a first column keeps, however narrow the terminal
NAMED, NOTES = 3, 4  # so many layers are named in a note, and so many notes shown
# How the notes of layers begin that matter to who reads totals alone.
WEIGHTY = (
    "vocabulary resized", "layer_replication", "no alpha is stored", "the stored alpha", "one alpha is stored",
    "peft applies the update of a MultiheadAttention", "VeRA's projections were not stored",
)  # fmt: skip

# What a terminal that knows no more than ASCII shows instead, longer ones first.
ASCII_WORDS = {
    "‖σ(W1)−σ(W0)‖/‖σ(W0)‖": "|s1-s0|/|s0|", "‖dW‖₂/σ₁": "|dW|2/s1", "₂": "2", "θ": "theta", "±": "+-", "‖": "|",
    "Σσ²": "the sum of sigma^2", "Σ": "sum ", "²": "^2", "√": "sqrt ", "r₉₀": "r90", "ε": "epsilon", "≤": "<=",
    "≥": ">=", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"', "→": "->",
    "λ": "lambda", "σ": "sigma",
}  # fmt: skip


def in_ascii(text: str) -> str:
    """For a terminal that knows no more than ASCII."""
    for word, plain in ASCII_WORDS.items():
        text = text.replace(word, plain)
    return text.encode("ascii", "replace").decode()


def plural(count: int, word: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def decimals(value: Any, digits: int = 3) -> str:
    """With so many decimals; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """With one decimal; "-" for None."""
    return "-" if value is None else f"{value:.1%}"


def number(value: Any, digits: int | None = None) -> str:
    """As short as it is exact, or with so many digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if digits else f"{value:g}"


def method_of(tuned: Mapping[str, Any]) -> str:
    """The method of a report's fine-tune with its rank, alpha and scaling, as far as they are known."""
    text = str(tuned["format"])
    if tuned.get("rank") is not None:
        text += f", rank {tuned['rank']}"
    if tuned.get("alpha") is not None:
        text += f", alpha {number(tuned['alpha'])}"
    if tuned.get("scaling") is not None:
        text += f", scaling {number(tuned['scaling'], 3)}"
    return text


def failures(failed: Sequence[LayerReport]) -> list[str]:
    """A line for each reason for which layers could not be analysed, equal but for the layer's name."""
    alike: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in failed:
        alike.setdefault((layer.status, str(layer.error).replace(layer.name, "…")), []).append(layer)
    lines = []
    for (status, _), layers in alike.items():
        first = layers[0]
        which = first.name if len(layers) == 1 else f"{len(layers)} layers, first {first.name}"
        lines.append(f"{status}: {which}: {first.error}")
    return lines


def grouped_notes(of_layers: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """What the notes of layers say that matters for the whole, each once, with the layers it is about.

    Parameters
    ----------
    of_layers : (layer's name, its notes).
    """
    about: dict[str, list[str]] = {}
    for name, notes in of_layers:
        for note in notes:
            if note.startswith(WEIGHTY):
                about.setdefault(note, []).append(name)
    lines = []
    for note, names in about.items():
        few = len(names) <= NAMED
        lines.append(f"{', '.join(names) if few else f'{len(names)} layers, first {names[0]}'}: {note}")
    more = len(lines) - NOTES
    return lines if more <= 0 else [*lines[:NOTES], f"{more} more of this kind; each layer's own are in the JSON"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns two spaces apart, those in ``left`` aligned to the left, the others to the right; a line each."""
    filled = [header, *([in_one_line(cell) for cell in row] for row in rows)]  # names come from files
    widths = [max(len(line[i]) for line in filled) for i in range(len(header))]
    lines = []
    for line in filled:
        cells = [
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def fitted(text: str, width: int) -> str:
    """A text whose tables are no wider than a terminal, as far as their first columns can be shortened.

    The end of a name stays, which tells layers apart.
    """
    lines = text.split("\n")
    start = 0
    while start < len(lines):
        end = start
        while end < len(lines) and "  " in lines[end].strip():
            end += 1
        if end - start > 1 and max(map(len, lines[start:end])) > width:
            lines[start:end] = _narrowed(lines[start:end], width)
        start = max(end, start + 1)
    return "\n".join(lines)


def _narrowed(lines: Sequence[str], width: int) -> list[str]:
    longest = max(map(len, lines))
    ends = (at for at in range(1, longest) if all(line[at : at + 2].strip() == "" for line in lines))
    first = next(ends, longest)
    room = max(LEAST_NAME, first - (longest - width))
    if room >= first:
        return list(lines)
    narrowed = []
    for line in lines:
        name = line[:first].rstrip()
        if len(name) > room:
            name = f"~{name[1 - room :]}"
        narrowed.append(f"{name:<{room}}{line[first:]}".rstrip())
    return narrowed
