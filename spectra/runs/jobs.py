"""One base weight at a time with all its fine-tunes: in this thread, or several at a time.

What is asked about each pair is the caller's: audits, comparisons, ranks, pictures, repairs and checks all go through
:meth:`Job.each`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from spectra.analysis.layer import DTYPES, ieee_arithmetic
from spectra.errors import LAYER_ERRORS
from spectra.files.checkpoint import Checkpoint
from spectra.pairing.pairs import LayerPair
from spectra.runs.neighbours import let_others_work
from spectra.runs.options import Progress
from spectra.runs.run import Run, explain
from spectra.runs.settings import Settings
from spectra.svd.threads import using_threads
from spectra.updates.algebra import TunedWeight

T = TypeVar("T")
Prepared = TypeVar("Prepared")
Found = TypeVar("Found")
# min(m, n) from which a second thread is worth it: below, it saves a fifth at most, and costs many times that where
# something else runs beside it, since threads spin while they wait (measured).
WORTH_THREADS = 512


@dataclass(frozen=True)
class Problem:
    """Why a layer could not be analysed: its status in a report, and what is wrong, in words."""

    status: str
    message: str


@dataclass(frozen=True)
class Job:
    """One base weight and every pair that starts from it."""

    parts: tuple[tuple[Run, LayerPair], ...]

    @property
    def first(self) -> LayerPair:
        return self.parts[0][1]

    @property
    def base(self) -> Checkpoint:
        return self.parts[0][0].base

    @property
    def work(self) -> float:
        m, n = self.first.shape
        return float(m) * n * min(m, n) * (1 + len(self.parts))

    def read_base(self) -> Tensor:
        """W0 as analysed, in the working dtype."""
        settings = self.parts[0][0].settings
        wide = any(pair.float64 for _, pair in self.parts)
        dtype = torch.float64 if wide else DTYPES[settings.dtype]
        return self.first.read_base(self.base, dtype, settings.device)

    def each(
        self,
        prepare: Callable[[Tensor], Prepared],
        look: Callable[[Prepared, Run, LayerPair, TunedWeight, bool], Found],
    ) -> Iterator[tuple[Run, LayerPair, Found | Problem]]:
        """What ``look`` finds of each pair, or the problem that kept it from that.

        The base weight is read once, and each tuned weight let go before the next is made.

        Parameters
        ----------
        prepare : given W0, what is computed of it once for all pairs.
        look : given that, the run, the pair, W1, and whether a copy of the base that came with it is another weight.
        """
        try:
            W0 = self.read_base()
            prepared = prepare(W0)
        except LAYER_ERRORS as error:
            problem = Problem(*explain(error, f"{self.first.base.file}: {self.first.base.name}"))
            yield from ((run, pair, problem) for run, pair in self.parts)
            return
        for run, pair in self.parts:
            outcome: Found | Problem
            try:
                tuned, differs = run.weight(pair, W0)
                with ieee_arithmetic():
                    outcome = look(prepared, run, pair, tuned, differs)
                del tuned
            except LAYER_ERRORS as error:
                outcome = Problem(*run.explain(pair, error))
            yield run, pair, outcome

    @property
    def threads(self) -> int:
        """As many as the settings say; one for a small weight."""
        return 1 if min(self.first.shape) < WORTH_THREADS else self.parts[0][0].settings.threads

    def prefetch(self) -> None:
        """Has the disk work ahead; nothing of it is kept here."""
        self.base.prefetch([self.first.base])
        for run, pair in self.parts:
            run.prefetch(pair)


def jobs_of(runs: Sequence[Run]) -> list[Job]:
    """The base weights of all runs, each with every fine-tune of it."""
    groups: dict[Any, list[tuple[Run, LayerPair]]] = defaultdict(list)
    for run in runs:
        for pair in run.pairs:
            groups[(run.base.place, pair.base_key)].append((run, pair))
    return [Job(tuple(parts)) for parts in groups.values()]


def read_weight(run: Run, pair: LayerPair) -> TunedWeight:
    """W1 of one pair alone, with its W0; raises what reading it raises."""
    return run.weight(pair, Job(((run, pair),)).read_base())[0]


def as_finished(
    jobs: Sequence[Job], settings: Settings, do: Callable[[Job], T], progress: Progress | None = None
) -> Iterator[T]:
    """What ``do`` made of each job; ``workers`` of them at a time, none kept waiting in memory."""
    whole, done = sum(job.work for job in jobs), 0.0
    for job, result in _done(jobs, settings, do):
        yield result
        done += job.work
        if progress is not None:
            progress(done, whole, job.first.name)


def _done(jobs: Sequence[Job], settings: Settings, do: Callable[[Job], T]) -> Iterator[tuple[Job, T]]:
    let_others_work()

    def alone(job: Job) -> T:
        with using_threads(job.threads):  # a setting of this very thread
            return do(job)

    if settings.workers == 1:
        for job, following in itertools.zip_longest(jobs, jobs[1:]):
            if following is not None:
                following.prefetch()
            yield job, alone(job)
        return
    before = torch.get_num_threads()
    with ThreadPoolExecutor(settings.workers) as pool:
        waiting = iter(jobs)
        running: dict[Future[T], Job] = {}
        try:
            while True:
                for job in waiting:
                    running[pool.submit(alone, job)] = job
                    if len(running) == settings.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
