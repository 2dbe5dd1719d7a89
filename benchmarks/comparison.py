"""Fine-tunes of one base compared: verdicts, measures, the count by adapter weight, random updates.

``quick`` and ``thorough`` are those of ``spectra compare`` (thorough draws 20 random updates).  The plain way would
be one SVD of each base weight and one of every tuned, rescaled and randomly updated one; its seconds are those of one
such SVD times how many there would be.  Counts are held against the exact engine's, at weights 1 and 2.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

import spectra
from benchmarks.fixtures import FOLDER
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import ENTRY, factors, scaled_base, seeded, write_adapter
from spectra.analysis.study import WEIGHTS, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Fine-tunes of one base compared"
RANKS = (4, 8, 16, 32)
FAMILY = ("lora-r1", "lora-r4", "lora-r16", "lora-r64", "rslora-r16", "dora-r16", "full")


def run(options: Options) -> Iterator[Row | str]:
    family = [FOLDER / name for name in FAMILY[: options.scale(quick=2, default=len(FAMILY))]]
    yield from _rows("fixtures, 160 wide", family, FOLDER / "base", options)
    layers = options.layers or options.scale(quick=1, default=2)
    for width in options.sizes or options.scale(quick=(192,), default=(1024, 2048)):
        names = [f"model.layers.{i}.self_attn.q_proj" for i in range(layers)]
        with tempfile.TemporaryDirectory(dir=options.scratch) as home:
            base = Path(home) / "base"
            base.mkdir()
            save_file(
                {f"{name}.weight": scaled_base(width, width, seeded(i)) for i, name in enumerate(names)},
                base / "model.safetensors",
            )
            unit = 7 * ENTRY * width**0.5
            adapters = [
                write_adapter(
                    Path(home) / f"lora-r{rank}",
                    {name: factors(width, width, rank, unit, seeded(rank + i)) for i, name in enumerate(names)},
                    rank,
                    rank,
                )
                for rank in RANKS
            ]
            yield from _rows(f"{width} wide", adapters, base, options)


def _rows(what: str, tuned: list[Path], base: Path, options: Options) -> Iterator[Row]:
    exact = spectra.compare(tuned, base, engine="exact", quick=True, cache=False)  # the warm-up, too
    twice = [[(2.0, path)] for path in tuned]
    doubled = spectra.compare([], base, merge=twice, engine="exact", quick=True, cache=False)
    pairs = [layer for report in exact.reports for layer in report.layers]
    alone = sum(map(_seconds_of_svd, {layer.name: layer.shape for layer in pairs}.values()))
    each = sum(_seconds_of_svd(layer.shape) for layer in pairs)
    draws = Study().draws
    for depth in ("quick", "thorough"):
        started = time.perf_counter()
        comparison = spectra.compare(tuned, base, quick=depth == "quick", cache=False)
        seconds = time.perf_counter() - started
        plain = alone + each * (1 if depth == "quick" else 1 + len(WEIGHTS) - 1 + draws)
        agrees = [_counts(a) == _counts(b) for a, b in zip(comparison.reports, exact.reports, strict=True)]
        if depth == "thorough":
            agrees += [
                [dict(map(tuple, layer.weights["counts"]))[2.0] for layer in a.layers if layer.weights] == _counts(b)
                for a, b in zip(comparison.reports, doubled.reports, strict=True)
            ]
        yield {
            "models": what,
            "fine-tunes": len(tuned),
            "weights": len(pairs),
            "depth": depth,
            "seconds": seconds,
            "ms a weight": 1e3 * seconds / len(pairs),
            "plain SVDs, s": plain,
            "× plain": plain / seconds,
            "agrees": all(agrees),
        }


_SVDS: dict[tuple[int, int], float] = {}


def _seconds_of_svd(shape: tuple[int, int]) -> float:
    """Of a float32 matrix of that shape; measured once."""
    if shape not in _SVDS:
        W = scaled_base(*shape, seeded(1))
        torch.linalg.svd(W, full_matrices=False)
        started = time.perf_counter()
        torch.linalg.svd(W, full_matrices=False)
        _SVDS[shape] = time.perf_counter() - started
    return _SVDS[shape]


def _counts(report: spectra.Report) -> list[int]:
    return [layer.intruders for layer in report.layers]


def notes(rows: list[Row]) -> list[str]:
    return ["Whole comparisons, reading included; the plain way is extrapolated from one SVD of each shape."]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [f"{row['models']}, {row['depth']}" for row in rows], [row["× plain"] for row in rows], "{:.1f}×")
    axes.set_xlabel("times as fast as plain SVDs")
