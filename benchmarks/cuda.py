"""Every engine on a GPU against the same engine on the CPU: verdicts and seconds for one weight.

Without a GPU there is nothing to compare, and the CPU stands alone.  The fixtures are audited whole, with ``--device
cuda`` and without, by every engine and on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

import spectra
from benchmarks.memory import ROOT
from benchmarks.methods import Method, engine, timed
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import KINDS, Problem, prescribed_base, tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "On a GPU"
ENGINES = ("exact", "krylov", "cached")
MEMBERS = ("lora-r1", "lora-r4", "lora-r16", "lora-r64", "rslora-r16", "dora-r16", "full")


def run(options: Options) -> Iterator[Row | str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    yield f"GPU: {torch.cuda.get_device_name() if len(devices) > 1 else 'none'}."
    for name in ENGINES:
        yield _fixtures(name, devices, MEMBERS[:1] if options.quick else MEMBERS)
    for n in options.sizes or options.scale(quick=(128,), default=(1024, 2048, 4096)):
        W0 = prescribed_base(n, n)
        for kind in KINDS:
            for name in ENGINES:
                first = None
                for device in devices:
                    timing = timed(_method(name, tuned(W0, kind, min(options.rank, n // 8)), device), options.repeat)
                    first = first or timing
                    yield {
                        "what": f"{n}×{n}, {kind}",
                        "engine": name,
                        "device": device,
                        "seconds": timing.seconds,
                        "× cpu": first.seconds / timing.seconds,
                        "intruders": timing.answer.count,
                        "agrees": timing.answer.agrees(first.answer),
                    }


def _method(name: str, problem: Problem, device: str) -> Method:
    parts = {key: getattr(problem, key) for key in ("W0", "B", "A", "magnitude", "W1")}
    moved = {key: value.to(device) if value is not None else None for key, value in parts.items()}
    return engine(name, Problem(problem.kind, **moved))  # type: ignore[arg-type]


def _fixtures(name: str, devices: list[str], members: tuple[str, ...]) -> Row:
    """All layers of the fixtures, both sides: their intruders on every device."""
    intruders, seconds = [], []
    for device in devices:
        started = time.perf_counter()
        reports = [
            spectra.audit(ROOT / "fixtures" / member, ROOT / "fixtures" / "base", engine=name, side=side, device=device)
            for member in members
            for side in ("left", "right")
        ]
        seconds.append(time.perf_counter() - started)
        intruders.append([[layer.intruder_indices for layer in report.layers] for report in reports])
    return {
        "what": f"{len(members)} fixtures, left and right",
        "engine": name,
        "device": " and ".join(devices),
        "seconds": seconds[-1],
        "× cpu": seconds[0] / seconds[-1],
        "intruders": sum(len(layer) for report in intruders[-1] for layer in report),
        "agrees": intruders[0] == intruders[-1],
    }


def notes(rows: list[Row]) -> list[str]:
    return ["Weights of the fixtures are 160 wide: too small for a GPU to help."]


def draw(rows: list[Row], axes: Axes) -> None:
    shown = [row for row in rows if "×" in row["what"]] or rows
    names = [f"{row['what']}, {row['engine']}, {row['device']}" for row in shown]
    bars(axes, names, [row["seconds"] for row in shown], "{:.3g} s")
    axes.set_xlabel("seconds")
