"""Results as files: Markdown to read, JSON and CSV to compute with, all with the machine they come from."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.options import Row


def machine() -> dict[str, Any]:
    """What a number depends on besides the code."""
    import torch

    import spectra

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "MKL" if "USE_MKL=ON" in torch.__config__.show() else "other",
        "spectra": spectra.__version__,
        "date": date.today().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_table(path: Path, title: str, rows: list[Row], notes: Sequence[str], facts: dict[str, Any]) -> None:
    """``path``.md, .json and .csv."""
    where = (
        f"{facts['cores']} cores of {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']} "
        f"({facts['blas']}), {facts['date']}"
    )
    lines = [f"# {title}", "", f"{where}.", "", *markdown(rows), ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", f"![{title}]({path.name}.svg)", "", f"`python -m benchmarks {path.name}`"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"title": title, "machine": facts, "rows": rows, "notes": list(notes)}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table with numbers to the right."""
    names = columns(rows)
    cells = [[text(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in names]

    def line(parts: Sequence[str]) -> str:
        padded = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    return [line(names), line(rule), *(line(parts) for parts in cells)]


def text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float) and 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    if isinstance(value, float):
        return f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
