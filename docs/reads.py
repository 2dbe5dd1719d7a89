"""The tables of "What it reads", made from the registries of dialects and of quantised forms.

``python docs/reads.py`` writes them into ``docs/formats.md``, between its marks; a test holds the page to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from spectra.adapters import DIALECTS
from spectra.files.gguf.names import MODULES
from spectra.files.stored.quantised import READS

PAGE = Path(__file__).with_name("formats.md")
MARK = re.compile(r"(<!-- (\w+): docs/reads\.py -->\n).*?(\n<!-- end -->)", re.DOTALL)
# How the files themselves are read has no registry: one function opens a folder, whatever lies in it.
FILES = (
    ("safetensors: a file, shards, a diffusers pipeline; pickles with `--allow-pickle`", "stored"),
    (
        "GGUF in F32, F16, BF16 or quantised, also in parts, of the architectures " + ", ".join(sorted(MODULES)),
        "under transformers' names, rows in its order",
    ),
    ("GGUF of any other architecture", "under GGUF's own names, against GGUF of that architecture alone"),
)
FORMS = (
    (
        "mixtures of experts, stacked or one file per expert, and one form against the other (gpt-oss also as linear "
        "modules)",
        "a matrix an expert",
    ),
    ("query, key and value in one matrix, gate and up in one", "whole; apart with `--split-fused`"),
    ("resized vocabularies, tied heads", "the shared rows; the embedding"),
)


def tables() -> dict[str, str]:
    """The tables by the names of their marks."""
    quantised = [(text, "dequantised in float32, as the writer defines it") for text in READS.values() if text]
    # PEFT's first, of these LoRA's; the others in the order in which they are asked.
    dialects = sorted(DIALECTS, key=lambda dialect: (dialect.name != "peft", not dialect.name.startswith("peft")))
    return {
        "adapters": _table(("adapters", "tuned weight"), [row for dialect in dialects for row in dialect.reads]),
        "bases": _table(("stored as", "read as"), [*FILES, *quantised, *FORMS]),
    }


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {first} | {second} |" for first, second in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def page() -> str:
    """The page with its tables as they are now."""
    made = tables()
    return MARK.sub(lambda match: match[1] + made[match[2]] + match[3], PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
