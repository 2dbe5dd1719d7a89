"""Two audits at once on one machine, and one alone: by the command, and by two processes of Python.

Each audit is of the same weights, with nothing cached: large ones with a LoRA, by krylov, whose parallel regions are
many and small, and small dense ones, whose two decompositions are nearly all that there is.  Of a pair, both begin
together and the time is that of the slower one.  In Python ``torch`` is imported first, as in a notebook.  ``spinning``
has the threads that wait for each other spin, as OpenMP by itself has them: the control.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import normal, seeded
from benchmarks.seven_b import planted, write_base, write_tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

TITLE = "Two audits at once"
SPINNING = {"GOMP_SPINCOUNT": "300000"}
UNSET = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}
BAR = 2.5  # a pair may take so many times what one alone takes
PYTHON = """
import sys, torch, spectra
torch.ones(64, 64) @ torch.ones(64, 64)
spectra.audit(sys.argv[1], sys.argv[2], engine=sys.argv[3], cache=False)
"""


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=256, default=4096)
    layers = options.layers or options.scale(quick=1, default=4)
    few, small = options.scale(quick=1, default=40), options.scale(quick=128, default=576)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        home = Path(scratch)
        shapes = {"self_attn.o_proj": (width, width)}
        write_base(home / "base", range(layers), shapes)
        write_tuned(home / "lora", range(layers), shapes, options.rank)
        write_base(home / "small", range(few), {"self_attn.o_proj": (small, small)})
        write_base(home / "dense", range(few), {"self_attn.o_proj": (small, small)}, make=_dense)
        yield from _rows("LoRA, krylov", layers, width, home / "lora", home / "base", "krylov", options)
        if not options.quick:
            yield from _rows("dense", few, small, home / "dense", home / "small", "auto", options)


def _dense(module: str, layer: int, m: int, n: int, seed: int) -> Tensor:
    """What :func:`planted` makes, with noise of a hundredth of its norm."""
    W = planted(module, layer, m, n, seed)
    noise = normal(seeded(seed + 1), m, n)
    dense: Tensor = W + noise * (0.01 * W.norm() / noise.norm())
    return dense


def _rows(what: str, layers: int, width: int, tuned: Path, base: Path, engine: str, options: Options) -> Iterator[Row]:
    command = [sys.executable, "-m", "spectra", "audit", str(tuned), "--base", str(base)]
    command += ["--engine", engine, "--no-cache", "--quiet"]
    python = [sys.executable, "-c", PYTHON, str(tuned), str(base), engine]
    ways = {
        "the command": (command, {}),
        "the command, spinning": (command, SPINNING),
        "Python": (python, {}),
        "Python, spinning": (python, SPINNING),
    }
    for how, (arguments, given) in list(ways.items())[: options.scale(quick=1, default=len(ways))]:
        environment = {name: value for name, value in os.environ.items() if name not in UNSET} | given
        _together(arguments, environment, 1)  # the page cache is warm
        repeat = 1 if given else min(3, options.repeat)  # the controls take long
        alone = min(_together(arguments, environment, 1) for _ in range(repeat))
        pair = min(_together(arguments, environment, 2) for _ in range(repeat))
        yield {"weights": f"{layers} × {width:,}, {what}", "how": how, "one alone": alone, "two at once": pair,
               "ratio": pair / alone, "within the bar": pair <= BAR * alone}  # fmt: skip


def _together(arguments: list[str], environment: dict[str, str], count: int) -> float:
    """The seconds until as many processes as that, begun together, are done."""
    started = time.perf_counter()
    running = [subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) for _ in range(count)]
    if any(process.wait() for process in running):
        raise RuntimeError(f"failed: {' '.join(arguments)}")
    return time.perf_counter() - started


def notes(rows: list[Row]) -> list[str]:
    return [
        "Whole processes, from their start to the report, with the libraries' loading; the best of up to three runs.",
        f"The bar is {BAR:g} times one alone.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    names = [f"{row['weights']}\n{row['how']}" for row in rows]
    bars(axes, names, [row["ratio"] for row in rows], "{:.2g}")
    axes.set_xlabel("two at once, in times of one alone")
