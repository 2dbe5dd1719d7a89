"""Whether random updates have intruders of which Spectra says, without drawing any, that they have none.

An audit and a comparison draw random updates of a layer only where its update is not *faint*: below a third of the size
at which a random one has its first expected intruder, and mixing less than three quarters of a base vector into any
leading one (``spectra.analysis.chance``).  Here random updates of every kind are drawn all the same: on spectra of
SmolLM2 and all-MiniLM, stretched to weights of 64 to 2048, of one to 64 equal values, of plain noise, with all values
equal (the hardest case) and falling as a power.  ``mixing`` has those below a third that the second condition
leaves to be drawn: it is needed.

The last rows have what the engine krylov goes by: singular values estimated from its own Lanczos process
(``spectra.svd.density``), beside the computed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.stretched import STRONG, stretched, stretched_base, tuned, weights
from spectra.analysis.chance import FAINT, is_faint
from spectra.analysis.null import null_counts
from spectra.analysis.threshold import predicted_threshold
from spectra.svd import Base, Question, choose_engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Random updates that need not be drawn"
QUESTION = Question(10, 0.5, "left")
PARTS = (FAINT / 4, FAINT / 2, FAINT * 0.999)
RANKS = (1, 8, 64)
DENSE = 576  # sizes up to which updates of full rank are drawn


def run(options: Options) -> Iterator[Row]:
    sizes = options.sizes or options.scale(quick=(64,), default=(64, 128, 256, 576, 1024, 2048))
    draws = options.scale(quick=1, default=4)
    spectra = [torch.linalg.svdvals(weight.double()).numpy() for weight in weights(options.quick).values()]
    for p in sizes:
        shapes = [(p, p), (p, 3 * p), (3 * p, p)]
        for kind in [*(f"{rank} equal" for rank in RANKS), "all equal", "noise", "power law"]:
            if kind in ("all equal", "noise", "power law") and p > DENSE:
                continue
            yield _row(p, kind, spectra, shapes, draws)
    yield from _estimates(options)


def _row(p: int, kind: str, spectra: list[np.ndarray], shapes: list[tuple[int, int]], draws: int) -> Row:
    """Of all bases, shapes and parts: the random updates that are faint, and those that only mix too much."""
    found = {True: [0, 0, 0], False: [0, 0, 0]}  # faint? draws, with an intruder, intruders
    for number, values in enumerate(spectra):
        s, shape = stretched(values, p), shapes[number % len(shapes)]
        theta = predicted_threshold(s, shape, epsilon=QUESTION.epsilon, top_k=QUESTION.top_k, side=QUESTION.side)
        if theta is None:
            continue
        relative = _relative(kind, shape, number)
        for part in PARTS:
            update = part * theta * relative
            faint = is_faint(s, shape, float(np.linalg.norm(update)), float(update[0]), theta, QUESTION)
            counts = null_counts(s, shape, update, QUESTION, draws=draws, seed=number)
            for place, more in enumerate((counts.size, np.count_nonzero(counts), counts.sum())):
                found[faint][place] += int(more)
    return {
        "weight": p,
        "update": kind,
        "faint": found[True][0],
        "with an intruder": found[True][1],
        "mixing": found[False][0],
        "of these with one": found[False][1],
        "θ̄ estimated": None,
        "by chance": None,
        "estimated": None,
        "agrees": not found[True][1],
    }


def _relative(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Singular values of an update, the largest 1."""
    p = min(shape)
    if kind == "all equal":
        return np.ones(p)
    if kind == "power law":
        return (1.0 + np.arange(p)) ** -0.7
    if kind == "noise":
        s = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), compute_uv=False)
        relative: np.ndarray = s / s[0]
        return relative
    return np.ones(min(int(kind.split()[0]), p))


def _estimates(options: Options) -> Iterator[Row]:
    """Of krylov: the estimated threshold over the one from all singular values, and the counts by chance from both."""
    sizes, draws = options.scale(quick=((128,), 2), default=((1024, 2048, 4096), 10))
    for p in sizes:
        for number, (name, weight) in enumerate(weights(options.quick).items()):
            W0 = stretched_base(weight, p, p)
            problem = tuned(W0, "lora", 8, STRONG, seed=number)
            assert problem.B is not None
            assert problem.A is not None
            update = problem.update.tuned(W0)
            answer = choose_engine("krylov").compare(Base(W0), update, QUESTION)
            if answer.estimated_values is None:  # certificates left something open, and it was decomposed
                continue
            exact = torch.linalg.svdvals(W0.double()).numpy()
            sigma = torch.linalg.svdvals(problem.B @ problem.A).numpy()[:8].astype(np.float64)
            thetas, means = [], []
            for values in (exact, answer.estimated_values):
                thetas.append(predicted_threshold(values, (p, p), epsilon=QUESTION.epsilon, top_k=QUESTION.top_k))
                means.append(null_counts(values, (p, p), sigma, QUESTION, draws=draws, seed=number))
            if thetas[0] is None or thetas[1] is None:
                continue
            spread = float(np.sqrt((means[0].var(ddof=1) + means[1].var(ddof=1)) / draws))
            yield {
                "weight": p,
                "update": f"{name}, rank 8",
                "faint": None,
                "with an intruder": None,
                "mixing": None,
                "of these with one": None,
                "θ̄ estimated": thetas[1] / thetas[0],
                "by chance": float(means[0].mean()),
                "estimated": float(means[1].mean()),
                "agrees": options.quick or bool(abs(means[0].mean() - means[1].mean()) <= max(3 * spread, 0.3)),
            }


def notes(rows: list[Row]) -> list[str]:
    drawn = [row for row in rows if row["faint"] is not None]
    faint, missed, mixing, some = (
        sum(row[what] for row in drawn) for what in ("faint", "with an intruder", "mixing", "of these with one")
    )
    said = [
        f"{missed:,} of {faint:,} faint random updates have an intruder; of {mixing:,} others as small, {some:,} do."
    ]
    ratios = [row["θ̄ estimated"] for row in rows if row["θ̄ estimated"] is not None]
    if ratios:
        means = [(row["by chance"], row["estimated"]) for row in rows if row["θ̄ estimated"] is not None]
        total, estimated = (sum(column) for column in zip(*means, strict=True))
        said.append(
            f"Estimated thresholds are {min(ratios):.3f} to {max(ratios):.3f} times those from all singular values; "
            f"counts by chance add up to {estimated:.1f} and {total:.1f}."
        )
    return said


def draw(rows: list[Row], axes: Axes) -> None:
    some = [row for row in rows if row["mixing"]]
    bars(
        axes,
        [f"{row['weight']}, {row['update']}" for row in some],
        [100 * row["of these with one"] / row["mixing"] for row in some],
        "{:.3g} %",
    )
    axes.set_xlabel("random updates with an intruder, of those that are small but mix too much to be skipped, %")
