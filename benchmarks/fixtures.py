"""Seconds of a whole audit of each trained fine-tune in ``fixtures/``: ``auto`` against ``exact``.

These weights are small (160 to 448 wide), where the exact engine is hard to beat: ``auto`` must not be
slower by more than a tenth.  The two take turns, and the ratio is the median over turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import spectra
from benchmarks.options import Options, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra import Report

TITLE = "Small trained models: auto against exact"
FOLDER = Path(__file__).parent.parent / "fixtures"
ALLOWED = 1.1


def run(options: Options) -> Iterator[Row]:
    members = sorted(name for name in json.loads((FOLDER / "family.json").read_text()) if name != "base")
    for member in members[: options.scale(quick=2, default=len(members))]:
        for side in ("left", "right"):
            turns = [(_audit(member, side, "auto"), _audit(member, side, "exact")) for _ in range(options.repeat + 1)]
            auto, exact = ([turn[at][0] for turn in turns[1:]] for at in (0, 1))  # the first is the warm-up
            verdicts = [_verdicts(report) for _, report in turns[0]]
            yield {
                "fine-tune": member,
                "side": side,
                "auto s": statistics.median(auto),
                "exact s": statistics.median(exact),
                "auto / exact": statistics.median(a / e for a, e in zip(auto, exact, strict=True)),
                "engines": " ".join(sorted({layer.engine or "none" for layer in turns[0][0][1].layers})),
                "layers": len(turns[0][0][1].layers),
                "intruders": sum(len(indices) for indices in verdicts[0].values()),
                "agrees": verdicts[0] == verdicts[1],
            }


def _audit(member: str, side: str, engine: str) -> tuple[float, Report]:
    started = time.perf_counter()
    report = spectra.audit(FOLDER / member, FOLDER / "base", side=side, engine=engine, cache=False)
    return time.perf_counter() - started, report


def _verdicts(report: Report) -> dict[str, tuple[int, ...]]:
    return {layer.name: tuple(layer.intruder_indices) for layer in report.layers}


def notes(rows: list[Row]) -> list[str]:
    worst = max(rows, key=lambda row: row["auto / exact"])
    verdict = "within" if worst["auto / exact"] <= ALLOWED else "NOT within"
    return [
        f"The largest auto / exact is {worst['auto / exact']:.2f} ({worst['fine-tune']}, {worst['side']}): "
        f"{verdict} the {ALLOWED} that is allowed.",
        "Seconds are those of a whole audit, reading included; nothing is cached.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    names = list(dict.fromkeys(row["fine-tune"] for row in rows))
    for side, marker, colour in (("left", "<", "#0072B2"), ("right", ">", "#D55E00")):
        mine = [row for row in rows if row["side"] == side]
        places = [names.index(row["fine-tune"]) for row in mine]
        values = [row["auto / exact"] for row in mine]
        axes.plot(values, places, marker, color=colour, label=f"{side} vectors")
    axes.axvline(ALLOWED, color="black", linestyle="--", linewidth=0.8, label=f"allowed: {ALLOWED}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of auto / seconds of exact")
