"""A hundred LoRA adapters (rank 8 to 32) of one base in one run, against one of them, and against each by itself.

Every audit is a process of its own, with nothing cached; those one by one are five of them, extrapolated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.memory import ROOT
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import ENTRY, factors, seeded, write_adapter
from benchmarks.seven_b import STRENGTHS, weights, write_base
from spectra.records.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "A hundred adapters of one base"
RANKS = (8, 16, 16, 32)


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=128, default=1024)
    layers = options.layers or options.scale(quick=1, default=4)
    count, some = options.scale(quick=(8, 2), default=(100, 5))
    shapes = weights(width, width * 43 // 16)
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        folder = Path(home)
        write_base(folder / "base", range(layers), shapes)
        adapters = []
        for number in range(count):
            modules = {}
            for layer in range(layers):
                for position, (module, (m, n)) in enumerate(shapes.items()):
                    strength = STRENGTHS[(layer + number) % len(STRENGTHS)] * ENTRY * max(m, n) ** 0.5
                    generator = seeded(10_000 * number + 100 * layer + position + 7)
                    rank = RANKS[number % len(RANKS)]
                    modules[f"model.layers.{layer}.{module}"] = factors(m, n, rank, strength, generator)
            rank = RANKS[number % len(RANKS)]
            adapters.append(write_adapter(folder / "adapters" / f"{number:03}", modules, rank, rank))

        def audited(tuned: list[Path], *more: str) -> tuple[float, list[Report]]:
            target = folder / "reports.jsonl"
            target.unlink(missing_ok=True)
            command = [sys.executable, "-m", "spectra", "audit", *map(str, tuned), "--base", str(folder / "base")]
            started = time.perf_counter()
            subprocess.run([*command, *more, "--no-cache", "--quiet", "-o", str(target)], cwd=ROOT, check=True)
            seconds = time.perf_counter() - started
            return seconds, [Report.from_dict(json.loads(line)) for line in target.read_text().splitlines()]

        audited(adapters[:1])  # page cache and libraries are warm
        sample = [audited([adapter]) for adapter in adapters[:: count // some]]
        one = sum(seconds for seconds, _ in sample) / len(sample)
        together, reports = audited([folder / "adapters"])
        both, again = audited([folder / "adapters"], "--workers", "2")
        agrees_again = [_verdicts(report) for report in again] == [_verdicts(report) for report in reports]
        by_path = {report.tuned["path"]: _verdicts(report) for report in reports}
        agrees = all(by_path[str(report.tuned["path"])] == _verdicts(report) for _, (report,) in sample)
        for how, adapters_done, seconds in (
            ("one", 1, one), ("one by one", count, one * count), ("together", count, together),
            ("together, two workers", count, both),
        ):  # fmt: skip
            yield {
                "audits": how,
                "adapters": adapters_done,
                "weights": layers * len(shapes),
                "seconds": seconds,
                "× one": seconds / one,
                "how": f"mean of {some}" if how == "one" else "extrapolated" if how == "one by one" else "measured",
                "agrees": agrees and agrees_again and len(reports) == count,
            }


def _verdicts(report: Report) -> dict[str, tuple[int, ...]]:
    return {layer.name: tuple(layer.intruder_indices) for layer in report.layers}


def notes(rows: list[Row]) -> list[str]:
    alone, together, both = rows[1:]
    return [
        f"Together they take {together['× one']:.0f} times one audit ({both['× one']:.0f} with two workers), "
        f"{alone['seconds'] / together['seconds']:.1f} times less than one by one: each base weight is read once and "
        "decomposed once."
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [f"{row['adapters']}, {row['audits']}" for row in rows], [row["seconds"] for row in rows], "{:.3g} s")
    axes.set_xlabel("seconds")
