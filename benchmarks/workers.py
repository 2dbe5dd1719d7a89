"""Two workers at a time on one machine: weights in threads, weights in processes, or threads within each weight.

Every audit is a whole one, files to report, with nothing cached.  Workers have one thread each, so that there are never
more threads than cores; ``processes`` is a ``ProcessPoolExecutor`` handed to :func:`spectra.audit`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import spectra
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.seven_b import weights, write_base, write_tuned
from spectra.records.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Two workers"


def run(options: Options) -> Iterator[Row | str]:
    workers = min(options.workers, os.cpu_count() or 1)
    width = options.width or options.scale(quick=192, default=2048)
    layers = options.layers or options.scale(quick=2, default=6)
    shapes = weights(width, width * 43 // 16)
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        base, adapter = Path(home) / "base", Path(home) / "adapter"
        write_base(base, range(layers), shapes)
        write_tuned(adapter, range(layers), shapes, options.rank)

        def audited(workers: int, threads: int) -> Report:
            return spectra.audit(adapter, base, cache=False, workers=workers, threads=threads)

        def in_processes() -> Report:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                return spectra.audit(adapter, base, cache=False, threads=1, executor=pool)

        ways: dict[str, Callable[[], Report]] = {
            "one worker, one thread": lambda: audited(1, 1),
            f"one worker, {workers} threads": lambda: audited(1, workers),
            f"{workers} workers, one thread each": lambda: audited(workers, 1),
            f"{workers} processes, one thread each": in_processes,
        }
        first: Report | None = None
        alone = 0.0
        for name, way in ways.items():
            way()  # page cache and libraries are warm
            seconds, report = min((_timed(way) for _ in range(min(3, options.repeat))), key=lambda timed: timed[0])
            if first is None:
                first, alone = report, seconds
            yield {
                "how": name,
                "weights": len(report.layers),
                "width": width,
                "seconds": seconds,
                "speed-up": alone / seconds,
                "intruders": report.total(),
                "agrees": _verdicts(report) == _verdicts(first),
            }


def _timed(way: Callable[[], Report]) -> tuple[float, Report]:
    started = time.perf_counter()
    report = way()
    return time.perf_counter() - started, report


def _verdicts(report: Report) -> dict[str, tuple[int, ...]]:
    return {layer.name: tuple(layer.intruder_indices) for layer in report.layers}


def notes(rows: list[Row]) -> list[str]:
    return ["The best of up to three runs each; processes start anew in each run and load the libraries."]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [row["how"] for row in rows], [row["seconds"] for row in rows], "{:.3g} s")
    axes.set_xlabel(f"seconds for {rows[0]['weights']} weights")
