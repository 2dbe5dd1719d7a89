"""Tables of the documentation that are made from the code which they are about.

``python docs/tables.py`` writes them into the pages, between their marks; a test holds the pages to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from spectra.adapters import DIALECTS
from spectra.files.gguf.names import MODULES
from spectra.files.stored.quantised import READS
from spectra.records.layer import Vector
from spectra.records.report import LayerReport, Report
from spectra.render.coverage import headline
from spectra.render.finding import finding

HOME = Path(__file__).parent
MARK = re.compile(r"(<!-- (\w+): docs/tables\.py -->\n).*?((?<=\n)|\n)(<!-- end -->)", re.DOTALL)
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
        "findings": _table(("state", "the first lines"), ((state, _first(report)) for state, report in _states())),
    }


def _first(report: Report) -> str:
    part = headline(report)
    return "<br>".join([*([] if part is None else part.splitlines()), *finding(report).lines])


def _states() -> Iterator[tuple[str, Report]]:
    """Every state that a report can be in, with one that is in it."""
    clear = [_layer(f"layers.{number}.q") for number in range(200)]
    some = [_layer(f"layers.{number}.q", number < 12) for number in range(200)]
    noisy = [_layer(f"pooler.{number}", 4, noise_like_base=True) for number in range(10)]
    failed = [_layer(f"layers.{number}.v", vectors=(), status="failed", error="NaN") for number in range(2)]
    unchanged = [_layer(f"layers.{number}.q", vectors=(), status="unchanged") for number in range(210)]
    small = [replace(layer, status="proved_small") for layer in clear]
    reason = "the base has no weight of this name"
    skipped = {"name": "text_model.q", "reason": reason, "kind": "not_placed", "parameters": 100}
    yield "no intruders", _report(clear)
    yield "none, with layers of an untrained base", _report([*clear, *noisy])
    yield "none, by the size of the update", _report(small)
    yield "some", _report(some)
    yield "some, with layers of an untrained base", _report([*some, *noisy])
    yield "untrained bases alone", _report(noisy)
    yield "layers that failed", _report([*clear, *failed])
    yield "every changed layer failed", _report(failed)
    yield "a part of the fine-tune", _report(clear, skipped=(skipped,))
    yield "nothing changed", _report(unchanged)


def _layer(name: str, intruders: int = 0, **changes: object) -> LayerReport:
    vectors = tuple(
        Vector(i, 10.0 - i, 0.2 if i < intruders else 0.9, (0.1, 0.95), 3, 1.0, 0.5, "svd", i < intruders, ())
        for i in range(10)
    )
    made = LayerReport(
        name=name, module_type=name.rpartition(".")[2], role="linear", shape=(4096, 4096), stored_shape=(4096, 4096),
        status="analysed", update={"kind": "low_rank", "rank": 8, "parameters": 100}, vectors=vectors,
        intruders=int(intruders), intruder_indices=tuple(range(intruders)), measures={"update_norm_relative": 0.01},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def _report(layers: list[LayerReport], **changes: object) -> Report:
    made = Report(
        base={"path": "base"}, tuned={"path": "tuned", "format": "peft-lora"},
        settings={"top_k": 10, "epsilon": 0.5, "side": "left"}, layers=tuple(layers), skipped=(), spectra_version="",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {first} | {second} |" for first, second in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def pages() -> dict[Path, str]:
    """The pages with their tables as they are now."""
    made = tables()
    found = {}
    for page in sorted(HOME.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if MARK.search(text):
            found[page] = MARK.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[4]}", text)
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
