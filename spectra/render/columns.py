"""Aligned columns of text, numbers as they stand in them, and all of it in ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a terminal that knows no more than ASCII shows instead, longer ones first.
ASCII_WORDS = {
    "‖σ(W1)−σ(W0)‖/‖σ(W0)‖": "|s1-s0|/|s0|", "‖dW‖₂/σ₁": "|dW|2/s1", "‖": "|", "Σσ²": "the sum of sigma^2", "Σ": "sum ",
    "²": "^2", "√": "sqrt ", "r₉₀": "r90", "ε": "epsilon", "≤": "<=", "≥": ">=", "×": "x", "·": "*", "−": "-", "–": "-",
    "—": "-", "…": "...", "“": '"', "”": '"',
    "→": "->", "λ": "lambda", "σ": "sigma",
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


def number(value: Any, digits: int | None = None) -> str:
    """As short as it is exact, or with so many digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if digits else f"{value:g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns two spaces apart, those in ``left`` aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in [header, *rows]:
        cells = [
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
