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
from benchmarks.methods import PATIENCE, Method, compared, engine, peft, plain, stored_spectrum
from benchmarks.options import Options, Row
from benchmarks.plots import dots
from benchmarks.problems import KINDS, Problem, prescribed_base, tuned
from benchmarks.stretched import FAINT, STRONG, stretched_base, weights
from spectra.svd import product_singular_values, spectral_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

TITLE = "Seconds for one weight, float32"
SLOW = "plain", "peft", "exact"
SOON = 10.0  # seconds from which one run will do, of trained spectra
UPDATES = (("lora", FAINT), ("lora", STRONG), ("dense", FAINT), ("dora", FAINT))  # of trained spectra
# On a stretched spectrum with a LoRA, in times of two full SVDs.
BARS = {("krylov", 2048): 20, ("krylov", 4096): 45, ("cached", 4096): 200}


def run(options: Options) -> Iterator[Row]:
    """A row for each shape, base, kind of update and method."""
    sizes = options.sizes or options.scale(quick=(192, 256), default=(1024, 2048, 4096))
    squares = [(n, n) for n in sizes]
    long = options.scale(quick=((192, 320), (320, 192)), default=((4096, 11008), (11008, 4096)))
    trained = weights(options.quick)
    for name, weight in trained.items():
        W0 = weight / torch.linalg.matrix_norm(weight, 2)
        faint = [stretched.tuned(W0, "lora", options.rank, FAINT)]
        yield from _rows(f"{name} itself", W0, faint, options, SLOW)
    for m, n in (*squares, *(long if options.sizes is None else ())):
        # Two SVDs of a long weight take minutes.
        everything = m == n or options.quick or options.full
        W0 = prescribed_base(m, n)
        problems = [tuned(W0, kind, options.rank) for kind in (KINDS if everything else KINDS[:1])]
        yield from _rows("planted", W0, problems, options, SLOW if everything else ("exact",))
        for place, (name, weight) in enumerate(trained.items()):
            if (m == n) != (weight.shape[0] == weight.shape[1]):
                continue
            W0 = stretched_base(weight, m, n)
            updates = UPDATES if everything and not place else UPDATES[:2]
            problems = [stretched.tuned(W0, kind, options.rank, strength) for kind, strength in updates]
            yield from _rows(name, W0, problems, options, ("plain",) if everything else ("exact",))


def _rows(base: str, W0: Tensor, problems: list[Problem], options: Options, slow: tuple[str, ...]) -> Iterator[Row]:
    with stored_spectrum(W0, options.scratch) as stored:
        for problem in problems:
            methods: dict[str, Method] = {}
            if "plain" in slow:
                methods["plain"] = plain(problem)
            if "peft" in slow and problem.kind == "lora":
                methods["peft"] = peft(problem)
            if "exact" in slow:
                methods["exact"] = engine("exact", problem)
            methods |= {"krylov": engine("krylov", problem), "cached": engine("cached", problem, stored)}
            what = {"base": base, "shape": problem.shape, "kind": problem.kind, "‖dW‖₂/σ₁": _strength(problem)}
            yield from compared(what, methods, options.repeat, PATIENCE if "exact" in slow else SOON)


def _strength(problem: Problem) -> float | None:
    if problem.B is None or problem.A is None or problem.magnitude is not None:
        return None
    return float(product_singular_values(problem.B, problem.A)[0]) / spectral_norm(problem.W0)


def notes(rows: list[Row]) -> list[str]:
    said = [
        "Medians after a warm-up; ratios within this run. × plain, × peft, × exact: how many times faster than these.",
        "cached is warm: it reads the base's spectrum from the page cache and checks that it belongs to the weight.",
    ]
    for (method, size), bar in BARS.items():
        mine = [row for row in rows if row["shape"] == f"{size}×{size}" and row["base"] != "planted"]
        ratios = [row["× plain"] for row in mine if row["method"] == method and row["kind"] == "lora"]
        if ratios:
            said.append(f"On trained spectra of {size}, LoRA: {reached(method, ratios, bar)}")
    if not all(row["agrees"] for row in rows):
        said.append("Some answers differ.")
    return said


def reached(method: str, ratios: list[float], bar: float) -> str:
    """What is said of a bar."""
    return (
        f"{method} is {min(ratios):.1f} to {max(ratios):.1f} times as fast as two full SVDs; "
        f"{sum(ratio >= bar for ratio in ratios)} of {len(ratios)} reach {bar:g}."
    )


def _name(row: Row) -> str:
    strong = row["base"] != "planted" and (row["‖dW‖₂/σ₁"] or 0) > (FAINT + STRONG) / 2
    return f"{row['shape']} {row['kind']}{', strong' if strong else ''}, {row['base']}"


def draw(rows: list[Row], axes: Axes) -> None:
    dots(axes, rows, _name, "seconds")
    axes.set_xlabel("seconds, logarithmic")
