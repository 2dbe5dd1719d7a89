"""How the time for one square weight grows with its size n, LoRA of rank 16, float32.

Bases are planted, and have the spectrum of a trained weight, stretched to each size, with an update as faint as an
ordinary adapter's (``benchmarks/stretched.py``).
``cached, cold`` computes the base's spectrum, ``cached`` finds it in the page cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import stretched
from benchmarks.methods import engine, stored_spectrum, timed
from benchmarks.options import Options, Row
from benchmarks.plots import look
from benchmarks.problems import prescribed_base, tuned
from benchmarks.stretched import FAINT, stretched_base, weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Growth with the size of the weight"
ASYMPTOTIC = 1024


def run(options: Options) -> Iterator[Row]:
    sizes = options.scale(quick=(64, 128, 256), default=(256, 512, 1024, 2048, 4096))
    name, weight = next(iter(weights(options.quick).items()))
    for base, n in itertools.product(("planted", name), options.sizes or ((*sizes, 8192) if options.full else sizes)):
        rank = min(options.rank, n // 8)
        if base == "planted":
            problem = tuned(prescribed_base(n, n), "lora", rank)
        else:
            problem = stretched.tuned(stretched_base(weight, n, n), "lora", rank, FAINT)
        with stored_spectrum(problem.W0, options.scratch) as stored:
            methods = {
                "exact": engine("exact", problem),
                "krylov": engine("krylov", problem),
                "cached": engine("cached", problem, stored),
                "cached, cold": engine("cached", problem),
            }
            first = None
            for method, once in methods.items():
                timing = timed(once, options.repeat)
                first = first or timing.answer
                yield {
                    "base": base,
                    "n": n,
                    "method": method,
                    "seconds": timing.seconds,
                    "runs": timing.runs,
                    "answered by": timing.answer.by,
                    "intruders": timing.answer.count,
                    "agrees": timing.answer.agrees(first),
                }


def slope(rows: list[Row], least: int = 0) -> float | None:
    """Of log seconds over log n, by least squares over sizes from ``least``."""
    points = [(row["n"], row["seconds"]) for row in rows if row["n"] >= least]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def notes(rows: list[Row]) -> list[str]:
    said = []
    for what, mine in _lines(rows).items():
        large, overall = _form(slope(mine, ASYMPTOTIC)), _form(slope(mine))
        said.append(f"{what}: seconds grow as n^{large} from n = {ASYMPTOTIC}, as n^{overall} over all sizes.")
    return said


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method on each base."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row['method']}, {row['base']}", []).append(row)
    return lines


def _form(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def draw(rows: list[Row], axes: Axes) -> None:
    for what, mine in _lines(rows).items():
        points = [(row["n"], row["seconds"]) for row in mine]
        fitted = slope(mine, ASYMPTOTIC) or slope(mine)
        dashed = {"linestyle": "-" if mine[0]["base"] == "planted" else ":"}
        label = f"{what}, $n^{{{_form(fitted)}}}$"
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1, **look(mine[0]["method"]) | dashed)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["n"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size n of an n × n weight")
    axes.set_ylabel("seconds")
