"""Seconds for one weight's verdict: peft, the plain definition and every engine, on the same inputs.

``peft`` is the detection inside ``peft.tuners.lora.intruders.reduce_intruder_dimension`` (LoRA only; the
column ``whole`` is the call with its repair), ``plain`` the definition by two full SVDs.  ``cached`` is
warm: the base's spectrum lies on disk, in the page cache, and is read, checked against the weight and used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.methods import Method, compared, engine, peft, plain, stored_spectrum
from benchmarks.options import Options, Row
from benchmarks.plots import dots
from benchmarks.problems import KINDS, prescribed_base, tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

TITLE = "Seconds for one weight, float32"


def run(options: Options) -> Iterator[Row]:
    """A row for each shape, kind of update and method."""
    sizes = options.sizes or options.scale(quick=(192, 256), default=(1024, 2048, 4096))
    squares = [(n, n) for n in sizes]
    long = options.scale(quick=((192, 320), (320, 192)), default=((4096, 11008), (11008, 4096)))
    for m, n in (*squares, *(long if options.sizes is None else ())):
        # Two SVDs of a long weight take minutes.
        everything = m == n or options.quick or options.full
        W0 = prescribed_base(m, n)
        for kind in KINDS if everything else KINDS[:1]:
            yield from rows_of(W0, kind, options, everything)


def rows_of(W0: Tensor, kind: str, options: Options, everything: bool) -> Iterator[Row]:
    problem = tuned(W0, kind, options.rank)
    with stored_spectrum(W0, options.scratch) as stored:
        methods: dict[str, Method] = {}
        if everything:
            methods["plain"] = plain(problem)
            if kind == "lora":
                methods["peft"] = peft(problem)
        methods |= {"exact": engine("exact", problem), "krylov": engine("krylov", problem)}
        methods["cached"] = engine("cached", problem, stored)
        yield from compared({"shape": problem.shape, "kind": kind}, methods, options.repeat)


def notes(rows: list[Row]) -> list[str]:
    said = [
        "Medians after a warm-up; ratios within this run. × plain, × peft, × exact: how many times faster than these.",
        "cached is warm: it reads the base's spectrum from the page cache and checks that it belongs to the weight.",
    ]
    if not all(row["agrees"] for row in rows):
        said.append("Some answers differ.")
    return said


def draw(rows: list[Row], axes: Axes) -> None:
    dots(axes, rows, lambda row: f"{row['shape']} {row['kind']}", "seconds")
    axes.set_xlabel("seconds, logarithmic")
