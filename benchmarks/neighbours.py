"""Two audits at once on one machine, and one alone: by the command, and by two processes of Python.

Each audit is of the same weights with a LoRA, by krylov, with nothing cached; of a pair, both begin together and the
time is that of the slower one.  In Python ``torch`` is imported first, as in a notebook.  ``spinning`` has the threads
that wait for each other spin, as OpenMP by itself has them: the control.
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
from benchmarks.seven_b import write_base, write_tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Two audits at once"
SPINNING = {"GOMP_SPINCOUNT": "300000"}
BAR = 2.5  # a pair may take so many times what one alone takes
PYTHON = """
import sys, torch, spectra
torch.ones(64, 64) @ torch.ones(64, 64)
spectra.audit(sys.argv[1], sys.argv[2], engine="krylov", cache=False)
"""


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=256, default=4096)
    layers = options.layers or options.scale(quick=1, default=4)
    shapes = {"self_attn.o_proj": (width, width)}
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        base, adapter = Path(home) / "base", Path(home) / "adapter"
        write_base(base, range(layers), shapes)
        write_tuned(adapter, range(layers), shapes, options.rank)
        command = [sys.executable, "-m", "spectra", "audit", str(adapter), "--base", str(base), "--engine", "krylov"]
        ways = {
            "the command": ([*command, "--no-cache", "--quiet"], {}),
            "the command, spinning": ([*command, "--no-cache", "--quiet"], SPINNING),
            "Python": ([sys.executable, "-c", PYTHON, str(adapter), str(base)], {}),
            "Python, spinning": ([sys.executable, "-c", PYTHON, str(adapter), str(base)], SPINNING),
        }
        for how, (arguments, given) in list(ways.items())[: options.scale(quick=1, default=len(ways))]:
            unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}
            environment = {name: value for name, value in os.environ.items() if name not in unset} | given
            _together(arguments, environment, 1)  # the page cache is warm
            repeat = 1 if given else min(3, options.repeat)  # the controls take long
            alone = min(_together(arguments, environment, 1) for _ in range(repeat))
            pair = min(_together(arguments, environment, 2) for _ in range(repeat))
            yield {"how": how, "weights": layers, "width": width, "one alone": alone, "two at once": pair,
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
    names = [f"{row['how']}, {what}" for row in rows for what in ("one alone", "two at once")]
    seconds = [row[what] for row in rows for what in ("one alone", "two at once")]
    bars(axes, names, seconds, "{:.3g} s")
    axes.set_xlabel(f"seconds for {rows[0]['weights']} weights of {rows[0]['width']}")
