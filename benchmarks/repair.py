"""One layer's intruders scaled: spectra.repair against peft's reduce_intruder_dimension, seconds and error.

``spectra`` reads base and adapter from disk, finds the intruders, writes the repaired adapter and audits it; ``peft``
is the call on a model in memory, which does none of that but find and change.  ``factors`` is the step from the
singular triplets to the new factors alone.  The error is that of the written weight, relative to the update that it
should have: ‖W − W'‖_F/‖W' − W0‖_F, with W' by a float64 SVD of the tuned weight (up to 2048, or with --full).
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectra
from benchmarks.methods import EPSILON, TOP_K, peft_model
from benchmarks.options import Options, Row
from benchmarks.plots import dots
from benchmarks.problems import Problem, prescribed_base, tuned, write_adapter
from spectra.analysis.scaling import edited_update, scaled
from spectra.svd import Base
from spectra.svd.triplets import leading_triplets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Seconds to scale one layer's intruders, float32"
SCALE, NAME, LARGEST = 0.7, "layer.0.q", 2048


def run(options: Options) -> Iterator[Row]:
    """A row for each size and method."""
    for n in options.sizes or options.scale(quick=(192, 256), default=(1024, 2048, 4096)):
        problem = tuned(prescribed_base(n, n), "lora", options.rank)
        wanted = _formula(problem) if n <= LARGEST or options.full else None
        seconds, weight, intruders = _theirs(problem, options.repeat)
        yield {
            "shape": problem.shape, "method": "peft", "seconds": seconds, "× peft": 1.0, "intruders": intruders,
            "rank": options.rank, "error": _error(weight, wanted, problem), "agrees": True,
        }  # fmt: skip
        with tempfile.TemporaryDirectory(dir=options.scratch) as home:
            yield from _ours(problem, Path(home), options, seconds, intruders, wanted)


def _ours(
    problem: Problem, home: Path, options: Options, theirs: float, intruders: int, wanted: Tensor | None
) -> Iterator[Row]:
    assert problem.B is not None
    assert problem.A is not None
    (home / "base").mkdir()
    save_file({f"{NAME}.weight": problem.W0.contiguous()}, home / "base" / "model.safetensors")
    write_adapter(home / "adapter", {NAME: (problem.B, problem.A)}, options.rank, options.rank)
    times = []
    for i in range(options.repeat + 1):
        started = time.perf_counter()
        repaired = spectra.repair(
            home / "adapter", home / "base", to=home / f"out{i}", scale=SCALE, top_k=TOP_K, epsilon=EPSILON, cache=False
        )
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:] or times)
    written = load_file(home / "out0" / "adapter_model.safetensors")
    B, A = (written[f"base_model.model.{NAME}.lora_{which}.weight"].double() for which in "BA")
    error = _error(problem.W0.double() + B @ A, wanted, problem)  # alpha / r is 1, and stays so
    yield {
        "shape": problem.shape, "method": "spectra", "seconds": seconds, "× peft": theirs / seconds,
        "intruders": len(repaired.scaled), "rank": A.shape[0], "error": error,
        "agrees": len(repaired.scaled) == intruders and (error is None or error <= 1e-5),
    }  # fmt: skip
    weight = problem.update.tuned(problem.W0)
    indices = [vector.index for vector in repaired.scaled]
    triplets = leading_triplets(Base(problem.W0), weight, max(indices, default=0) + 1).take(indices)
    change, times = scaled(triplets, np.full(len(indices), SCALE)), []
    for _ in range(10):
        started = time.perf_counter()
        edited_update(weight, change, 1.0, dtype=torch.float32)  # type: ignore[arg-type]  # it is one in factors
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    yield {
        "shape": problem.shape, "method": "factors", "seconds": seconds, "× peft": theirs / seconds,
        "intruders": len(indices), "rank": A.shape[0], "error": None, "agrees": True,
    }  # fmt: skip


def _formula(problem: Problem) -> Tensor:
    """W' with the intruders found as the paper finds them, all in float64."""
    assert problem.B is not None
    assert problem.A is not None
    W0 = problem.W0.double()
    W1 = W0 + problem.B.double() @ problem.A.double()
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    U, s, Vh = torch.linalg.svd(W1, full_matrices=False)
    chosen = torch.nonzero((U0.T @ U[:, :TOP_K]).abs().amax(0) < EPSILON).flatten()
    result: Tensor = W1 + (SCALE - 1) * (U[:, chosen] * s[chosen]) @ Vh[chosen]
    return result


def _error(weight: Tensor, wanted: Tensor | None, problem: Problem) -> float | None:
    if wanted is None:
        return None
    return float(torch.linalg.norm(weight.double() - wanted) / torch.linalg.norm(wanted - problem.W0.double()))


def _theirs(problem: Problem, repeat: int) -> tuple[float, Tensor, int]:
    """Median seconds of the whole call, the weight that it leaves, and how many intruders it found."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model: Any = peft_model(problem)
    times: list[float] = []
    said: list[str] = []
    while len(times) < max(1, repeat if sum(times) < 60 else 1):
        if times:
            model.set_adapter("default")
            model.delete_adapter("intruder_reduced")
        said.clear()
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reduce_intruder_dimension(  # type: ignore[no-untyped-call]
                model, top_k=TOP_K, threshold_epsilon=EPSILON, mitigation_lambda=SCALE, logging_sink=said.append
            )
        times.append(time.perf_counter() - started)
    layer = model.base_model.model.q
    weight = layer.get_base_layer().weight.data + layer.get_delta_weight("intruder_reduced").detach()
    counts = [int(line.rpartition(":")[2]) for line in said if "Intruders:" in line]
    return statistics.median(times), weight, sum(counts)


def notes(rows: list[Row]) -> list[str]:
    said = [
        f"Medians; scale {SCALE:g}; ratios within this run. spectra reads, finds, writes and audits; peft finds and "
        "changes a model in memory."
    ]
    lost = [row["error"] for row in rows if row["method"] == "peft" and row["error"] is not None]
    if lost:
        said.append(
            f"peft cuts the repaired update back to the old rank, and so is off by {min(lost):.0%} to {max(lost):.0%}."
        )
    return said


def draw(rows: list[Row], axes: Axes) -> None:
    dots(axes, rows, lambda row: str(row["shape"]), "seconds")
    axes.set_xlabel("seconds, logarithmic")
