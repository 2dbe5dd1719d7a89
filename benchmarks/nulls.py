"""How many intruders random updates have that ``spectra compare`` does not draw: those below a third of the threshold.

Base weights are those of every fifth block of SmolLM2.  Each gets random updates whose
largest singular value is that part of the size at which the first intruder is predicted, of one to 32 equal singular
values, the hardest case, or of falling ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.stretched import language_model_weights
from spectra.analysis.null import null_counts
from spectra.analysis.study import FAINT
from spectra.analysis.threshold import predicted_threshold
from spectra.svd import Question

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Intruders of faint random updates"
QUESTION = Question(10, 0.5, "left")
PARTS = (0.25, FAINT, 0.4, 0.5, 0.75)
UPDATES = {
    "1 value": np.ones(1),
    "8 equal values": np.ones(8),
    "8 falling values": np.linspace(1, 0.1, 8),
    "32 equal values": np.ones(32),
}


def run(options: Options) -> Iterator[Row]:
    draws, every = options.scale(quick=(2, 1), default=(10, 5))
    known = []
    for number, (name, weight) in enumerate(language_model_weights(options.quick).items()):
        if int(name.split(".")[2]) % every == 0:
            values = torch.linalg.svdvals(weight.double()).numpy()
            shape = (weight.shape[0], weight.shape[1])
            theta = predicted_threshold(values, shape, epsilon=QUESTION.epsilon, top_k=QUESTION.top_k)
            if theta is not None:
                known.append((number, values, shape, theta))
    for part in PARTS:
        for what, relative in UPDATES.items():
            drawn = np.concatenate([
                null_counts(values, shape, part * theta * relative, QUESTION, draws=draws, seed=number)
                for number, values, shape, theta in known
            ])  # fmt: skip
            yield {
                "‖dW‖₂ / predicted": part,
                "update": what,
                "weights": len(known),
                "draws": drawn.size,
                "with an intruder": int(np.count_nonzero(drawn)),
                "intruders": int(drawn.sum()),
                "agrees": part > FAINT or not drawn.any(),
            }


def notes(rows: list[Row]) -> list[str]:
    faint = [row for row in rows if row["‖dW‖₂ / predicted"] <= FAINT]
    found, drawn = (sum(row[what] for row in faint) for what in ("with an intruder", "draws"))
    return [f"{found:,} of {drawn:,} random updates of at most a third of the predicted size have an intruder."]


def draw(rows: list[Row], axes: Axes) -> None:
    shares = [row["with an intruder"] / row["draws"] for row in rows]
    bars(
        axes,
        [f"{row['‖dW‖₂ / predicted']:.2f}, {row['update']}" for row in rows],
        [100 * s for s in shares],
        "{:.3g} %",
    )
    axes.set_xlabel("random updates with an intruder, %")
