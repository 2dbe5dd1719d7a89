"""Seconds for one weight's verdict: peft, the plain definition and every engine, on the same inputs.

Bases are planted (eight outliers on a falling bulk), and have the spectra of trained weights at their own size and
stretched to others (``benchmarks/stretched.py``); updates of these are as faint as an ordinary adapter's, or strong
enough for intruders.  ``peft`` is the detection inside ``peft.tuners.lora.intruders.reduce_intruder_dimension`` (LoRA
only; the column ``whole`` is the call with its repair), ``plain`` the definition by two full SVDs.  ``cached`` is warm:
the base's spectrum lies on disk, in the page cache, and is read, checked against the weight and used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from benchmarks import stretched
from benchmarks.methods import Method, compared, engine, peft, plain, stored_spectrum
from benchmarks.options import Options, Row
from benchmarks.plots import dots
from benchmarks.problems import KINDS, Problem, prescribed_base, tuned
from benchmarks.stretched import FAINT, STRONG, stretched_base, weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Seconds for one weight, float32"
UPDATES = (("lora", FAINT), ("lora", STRONG), ("dense", FAINT), ("dora", FAINT))  # of trained spectra
BARS = {2048: 20, 4096: 45}  # krylov on a stretched spectrum with a LoRA, in times of two full SVDs


def run(options: Options) -> Iterator[Row]:
    """A row for each shape, kind of update and method."""
    sizes = options.sizes or options.scale(quick=(192, 256), default=(1024, 2048, 4096))
    squares = [(n, n) for n in sizes]
    long = options.scale(quick=((192, 320), (320, 192)), default=((4096, 11008), (11008, 4096)))
    real = weights(options.quick)
    for name, W0 in real.items():
        W0 = W0 / torch.linalg.matrix_norm(W0, 2)
        yield from rows_of(f"{name}, its own", stretched.tuned(W0, "lora", options.rank, FAINT), options, True)
    for m, n in (*squares, *(long if options.sizes is None else ())):
        # Two SVDs of a long weight take minutes.
        everything = m == n or options.quick or options.full
        W0 = prescribed_base(m, n)
        for kind in KINDS if everything else KINDS[:1]:
            yield from rows_of("planted", tuned(W0, kind, options.rank), options, everything)
        for name, weight in real.items():
            if (m == n) != (weight.shape[0] == weight.shape[1]):
                continue
            W0 = stretched_base(weight, m, n)
            kinds = UPDATES if everything and name == next(iter(real)) else UPDATES[:2]
            for kind, strength in kinds:
                problem = stretched.tuned(W0, kind, options.rank, strength)
                yield from rows_of(
                    f"{name}, {'faint' if strength == FAINT else 'strong'}", problem, options, everything
                )


def rows_of(base: str, problem: Problem, options: Options, everything: bool) -> Iterator[Row]:
    kind, W0 = problem.kind, problem.W0
    with stored_spectrum(W0, options.scratch) as stored:
        methods: dict[str, Method] = {}
        if everything:
            methods["plain"] = plain(problem)
            if kind == "lora":
                methods["peft"] = peft(problem)
        methods |= {"exact": engine("exact", problem), "krylov": engine("krylov", problem)}
        methods["cached"] = engine("cached", problem, stored)
        repeat = options.repeat if base == "planted" else min(options.repeat, 3)
        yield from compared({"base": base, "shape": problem.shape, "kind": kind}, methods, repeat)


def notes(rows: list[Row]) -> list[str]:
    said = [
        "Medians after a warm-up; ratios within this run. × plain, × peft, × exact: how many times faster than these.",
        "cached is warm: it reads the base's spectrum from the page cache and checks that it belongs to the weight.",
    ]
    for size, bar in BARS.items():
        cold = [
            row["× plain"]
            for row in rows
            if row["shape"] == f"{size}×{size}"
            and row["method"] == "krylov"
            and row["kind"] == "lora"
            and row["base"] != "planted"
        ]
        if cold:
            reached = sum(ratio >= bar for ratio in cold)
            said.append(
                f"krylov on trained spectra of {size}, LoRA: {min(cold):.1f} to {max(cold):.1f} times two full SVDs; "
                f"{reached} of {len(cold)} reach {bar}."
            )
    if not all(row["agrees"] for row in rows):
        said.append("Some answers differ.")
    return said


def draw(rows: list[Row], axes: Axes) -> None:
    dots(axes, rows, lambda row: f"{row['shape']} {row['kind']}, {row['base']}", "seconds")
    axes.set_xlabel("seconds, logarithmic")
