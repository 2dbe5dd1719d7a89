"""The methods that are compared, each from the same stored inputs to the indices of the intruders."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.options import Row
from benchmarks.problems import Problem
from spectra.analysis.detect import detect
from spectra.files.checkpoint import open_checkpoint
from spectra.runs.cache import SpectrumCache
from spectra.svd import ENGINES, Base, Question, Spectrum
from spectra.tasks.cache import cache as cache_base

TOP_K, EPSILON = 10, 0.5
PATIENCE = 60.0  # seconds after which no further repetition is begun
LEAST = 0.3  # seconds that short runs are repeated for


@dataclass(frozen=True)
class Answer:
    """What a method found: ``indices`` where it says which, and its own idea of its ``seconds``, if any."""

    count: int
    indices: tuple[int, ...] | None = None
    by: str | None = None
    seconds: float | None = None

    def agrees(self, other: Answer) -> bool:
        return self.count == other.count and (None in (self.indices, other.indices) or self.indices == other.indices)


Method = Callable[[], Answer]


@dataclass(frozen=True)
class Timing:
    """Median seconds of ``runs`` runs; ``whole`` is all of the call where the method timed a part of it."""

    seconds: float
    whole: float
    runs: int
    answer: Answer


def timed(run: Method, repeat: int, patience: float = PATIENCE) -> Timing:
    """The median after a warm-up; one that takes longer than ``patience`` seconds is the measurement itself."""

    def once() -> tuple[float, float]:
        started = time.perf_counter()
        answer = run()
        whole = time.perf_counter() - started
        return (whole if answer.seconds is None else answer.seconds), whole

    begun = time.perf_counter()
    answer = run()
    first = time.perf_counter() - begun
    if first > patience:
        return Timing(first if answer.seconds is None else answer.seconds, first, 1, answer)
    begun, runs = time.perf_counter(), [once()]
    while (spent := time.perf_counter() - begun) < patience and (len(runs) < repeat or (repeat > 1 and spent < LEAST)):
        runs.append(once())
    return Timing(statistics.median(part for part, _ in runs), statistics.median(w for _, w in runs), len(runs), answer)


def plain(problem: Problem) -> Method:
    """The definition as the paper computes it: two full SVDs and the cosines of the top k."""

    def run() -> Answer:
        U0 = torch.linalg.svd(problem.W0, full_matrices=False).U
        U1 = torch.linalg.svd(problem.merged(), full_matrices=False).U
        cosines = (U0.T @ U1[:, :TOP_K]).abs().amax(0)
        return _answer(torch.nonzero(cosines < EPSILON).flatten().tolist(), "plain")

    return run


def peft_model(problem: Problem) -> Any:
    """A model of one layer, ``q``, with the problem's LoRA of scaling 1 on it."""
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(problem.W0.shape[1], problem.W0.shape[0], bias=False)

    assert problem.B is not None
    assert problem.A is not None
    rank = problem.B.shape[1]
    net = Net()
    net.q.weight.data = problem.W0.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=["q"]))
    layer: Any = model.base_model.model.q
    layer.lora_B["default"].weight.data = problem.B.clone()
    layer.lora_A["default"].weight.data = problem.A.clone()
    return model


def peft(problem: Problem) -> Method:
    """``reduce_intruder_dimension`` on a model of this one layer; its seconds are those until it names the intruders.

    What follows is the repair, with a third SVD, which no other method here makes.
    """
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = peft_model(problem)

    def run() -> Answer:
        said: list[tuple[float, str]] = []
        started = time.perf_counter()
        reduce_intruder_dimension(  # type: ignore[no-untyped-call]
            model,
            top_k=TOP_K,
            threshold_epsilon=EPSILON,
            logging_sink=lambda line: said.append((time.perf_counter() - started, line)),
        )
        model.set_adapter("default")
        model.delete_adapter("intruder_reduced")
        seconds, line = said[0]
        match = re.search(r"Intruders: (\d+)", line)
        return Answer(int(match[1]) if match else 0, by="peft", seconds=seconds)

    return run


def engine(name: str, problem: Problem, stored: Callable[[], Spectrum | None] | None = None) -> Method:
    """One of the package's engines, with nothing known of the base but what ``stored`` returns."""

    def run() -> Answer:
        base, question = Base(problem.W0, "left", stored=stored), Question(TOP_K, EPSILON, "left")
        comparison = ENGINES[name]().compare(base, problem.update.tuned(problem.W0), question)
        indices = [vector.index for vector in detect(comparison, question) if vector.intruder]
        return _answer(indices, comparison.engine)

    return run


@contextmanager
def stored_spectrum(W0: torch.Tensor, folder: Path | None = None) -> Iterator[Callable[[], Spectrum | None]]:
    """The spectrum of W0 as ``spectra cache`` keeps it, in a file and so in the page cache; called, it is read."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        root = Path(home) / "cache"
        save_file({"layer.0.q.weight": W0.contiguous()}, Path(home) / "model.safetensors")
        layer = cache_base(home, cache=root).layers[0]
        cache, base = SpectrumCache(root), open_checkpoint(Path(home))
        yield lambda: cache.load(base, layer.name, layer.pair.layout, W0.dtype)


def compared(what: Row, methods: dict[str, Method], repeat: int, patience: float = PATIENCE) -> Iterator[Row]:
    """A row per method: seconds, ratios to the slow ones, and whether the answer is the first one's."""
    timings = {}
    for method, run in methods.items():
        timings[method] = timing = timed(run, repeat, patience)
        answer = timing.answer
        expected = next(iter(timings.values())).answer
        yield {
            **what,
            "method": method,
            "seconds": timing.seconds,
            "whole": timing.whole if answer.seconds is not None else None,
            "runs": timing.runs,
            **{
                f"× {slow}": timings[slow].seconds / timing.seconds if slow in timings else None
                for slow in ("plain", "peft", "exact")
            },
            "answered by": answer.by,
            "intruders": answer.count,
            "indices": None if answer.indices is None else " ".join(map(str, answer.indices)),
            "agrees": answer.agrees(expected),
        }


def _answer(indices: list[int], by: str) -> Answer:
    return Answer(len(indices), tuple(indices), by)
