"""Audits: paths in, reports out; here or on other machines, in one go or in several.

Everything is matched and checked from headers before the first weight is read.  Then the run goes
base weight by base weight: each is read, upcast and decomposed once, however many fine-tunes it
has, and let go before the next one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Unpack

from spectra import __version__
from spectra.analysis.chance import RandomUpdates
from spectra.errors import SpectraError, UsageError, WrongBaseError
from spectra.files.checkpoint import Checkpoint
from spectra.records.report import LayerReport, Report
from spectra.runs.jobs import Job, Problem, as_finished, jobs_of
from spectra.runs.journal import Finished, Journal, open_journal
from spectra.runs.neighbours import let_others_work
from spectra.runs.options import AuditOptions, CacheFolder, Progress, takes_options
from spectra.runs.progress import shown
from spectra.runs.reports import Analysis, failure, open_cache
from spectra.runs.run import SingleRun, open_run, opened
from spectra.runs.settings import Settings, checked_settings
from spectra.runs.workers import spread
from spectra.sources.live import Source, several
from spectra.sources.resolve import Bases
from spectra.svd.threads import using_threads


@takes_options(AuditOptions)
def audit(
    tuned: Source,
    base: Source | None = None,
    *,
    resume: str | Path | None = None,
    executor: Executor | None = None,
    **options: Unpack[AuditOptions],
) -> Report:
    """Flags the intruder dimensions of one fine-tune, layer by layer.

    Parameters
    ----------
    tuned : an adapter folder, a checkpoint folder, a file, or a model in memory: whatever is a :data:`spectra.Source`.
    base : its base, likewise; None takes the one that an adapter's config names, or the model that it is in.
    resume : a file to which each base weight's results are appended as soon as they are there, and from which a run
        that was ended continues.  The report is that of an uninterrupted run.
    executor : works on the base weights instead of this process: anything with the interface of
        ``concurrent.futures``, such as a Dask client's.  Its workers read the files themselves, by the same paths.
    {options}

    Returns
    -------
    Report : what was found.

    Raises
    ------
    SpectraError : bad options, unreadable or mismatched files.  A layer whose values cannot be analysed raises nothing;
        its status says so.
    """
    if isinstance(tuned, list | tuple):
        raise UsageError("audit takes one fine-tune; for several there is audit_many")
    return audit_many([tuned], base, resume=resume, executor=executor, **options)[0]


@takes_options(AuditOptions)
def audit_many(
    tuned: Source | Sequence[Source],
    base: Source | None = None,
    *,
    on_unreadable: Callable[[SpectraError], None] | None = None,
    resume: str | Path | None = None,
    executor: Executor | None = None,
    **options: Unpack[AuditOptions],
) -> list[Report]:
    """Flags the intruder dimensions of several fine-tunes of one base or of many, layer by layer.

    Each base weight is read and decomposed once, however many fine-tunes change it.

    Parameters
    ----------
    tuned : adapter folders, checkpoints or files, or models in memory: whatever is a :data:`spectra.Source`.
    base : the base of all of them, likewise; None takes each adapter's from its config, or the model that it is in.
    on_unreadable : called with the error of a fine-tune that cannot be read or matched, and the others are audited;
        without it the error is raised.
    resume, executor : as for :func:`spectra.audit`.
    {options}

    Returns
    -------
    list of Report : in the order of ``tuned``, without those that could not be read.

    Raises
    ------
    SpectraError : as for :func:`spectra.audit`.
    """
    settings = checked_settings(**options)
    started = time.perf_counter()
    bases = Bases(settings.access)
    runs = opened((partial(open_run, path, base, settings, bases) for path in several(tuned)), on_unreadable)
    cache = options["cache"]
    analysis = Analysis(settings, open_cache(cache))
    for option, given in (("resume", resume), ("executor", executor)):
        if given is not None:
            _check_on_disk(runs, option)
    journaling = nullcontext() if resume is None else open_journal(resume, identity_of(runs, settings))
    with shown(options["progress"]) as progress, journaling as journal:
        steps = _Steps(analysis, runs, cache, journal, executor)
        return analysis.assembled(runs, steps.layers(progress), started)


def _check_on_disk(runs: Sequence[SingleRun], option: str) -> None:
    """Raises UsageError where a run that goes on elsewhere or another time reads models of this process's memory."""
    read = [checkpoint for run in runs for checkpoint in (run.tuned, run.base)]
    in_memory = next((checkpoint for checkpoint in read if checkpoint.in_memory), None)
    if in_memory is not None:
        raise UsageError(f"{in_memory.path}: {option} is for models on a disk, not for one in memory; save it first")


def identity_of(runs: Sequence[SingleRun], settings: Settings) -> dict[str, Any]:
    """What a journal or a worker must agree on with a run: version, settings, inputs as the system sees them."""
    record = {key: item for key, item in settings.record().items() if key != "workers"}
    bases = {id(run.base): run.base for run in runs}
    return {
        "spectra": __version__,
        "settings": record,
        "bases": [_identity(base) for base in bases.values()],
        "tuned": [_identity(run.tuned) for run in runs],
    }


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    files = sorted(checkpoint.files)
    stats = [file.stat() for file in files]
    configs = json.dumps([checkpoint.config, checkpoint.adapter_config], sort_keys=True, default=str)
    return {
        "path": str(checkpoint.path.absolute()),
        "fingerprint_headers": checkpoint.fingerprint().headers,
        "configs": hashlib.sha256(configs.encode()).hexdigest(),
        "files": [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)],
    }


def key_of(job: Job, runs: Sequence[SingleRun]) -> str:
    """The name of a base weight within a run: which fine-tune has it first, and which weight it is."""
    run, pair = job.parts[0]
    name, layout, rows = pair.base_key
    return json.dumps([next(i for i, one in enumerate(runs) if one is run), name, layout, rows])


@dataclass(frozen=True)
class WorkOrder:
    """What a worker is told: paths and settings, no weights.

    ``identity`` is a digest of :func:`identity_of`, so that a worker that sees other files says so.
    """

    tuned: tuple[str, ...]
    bases: tuple[str, ...]
    settings: Settings
    cache: str | Literal[False] | None
    identity: str

    @classmethod
    def of(cls, runs: Sequence[SingleRun], settings: Settings, cache: CacheFolder) -> WorkOrder:
        """What the workers of an executor are told of a run."""
        return cls(
            tuple(str(run.tuned.path.absolute()) for run in runs),
            tuple(str(run.base.path.absolute()) for run in runs),
            settings,
            str(Path(cache).absolute()) if cache else False if cache is False else None,
            _digest(identity_of(runs, settings)),
        )


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()


@lru_cache(maxsize=1)
def _opened_there(order: WorkOrder) -> tuple[Analysis, list[SingleRun], dict[str, Job]]:
    """What a worker opens for the first of a run's weights and has for the others."""
    bases = Bases(order.settings.access)
    runs = [open_run(path, base, order.settings, bases) for path, base in zip(order.tuned, order.bases, strict=True)]
    if _digest(identity_of(runs, order.settings)) != order.identity:
        raise WrongBaseError(
            order.tuned[0], "this worker does not see the files that the run was begun with: is the storage shared?"
        )
    return Analysis(order.settings, open_cache(order.cache)), runs, {key_of(job, runs): job for job in jobs_of(runs)}


def finish(order: WorkOrder, key: str) -> Finished:
    """One base weight with all its fine-tunes, in a worker."""
    analysis, runs, jobs = _opened_there(order)
    let_others_work()
    with using_threads(jobs[key].threads):
        return _finished(analysis, runs, jobs[key])


def _finished(analysis: Analysis, runs: Sequence[SingleRun], job: Job) -> Finished:
    number = {id(run): position for position, run in enumerate(runs)}
    layers = tuple((number[id(result.run)], result.report, result.open) for result in analysis.of(job))
    digests = []
    for run, pair in job.parts:
        names = (*pair.update.tensors, *filter(None, [pair.update.base_copy]))
        assert isinstance(run, SingleRun)
        digests += [(number[id(run)], name, digest) for name, digest in run.tuned.digests(names).items()]
    return Finished(layers, tuple(digests))


@dataclass(frozen=True, eq=False)
class _Steps:
    """The base weights of a run: finished before, here, or by an executor's workers."""

    analysis: Analysis
    runs: Sequence[SingleRun]
    cache: CacheFolder
    journal: Journal | None
    executor: Executor | None

    def layers(self, progress: Progress | None) -> Iterator[tuple[int, LayerReport, RandomUpdates | None]]:
        """(place of the run, layer, what to draw random updates from) of every base weight; digests of what was read
        are kept for the fingerprints."""
        jobs = {key_of(job, self.runs): job for job in jobs_of(self.runs)}
        whole, done = sum(job.work for job in jobs.values()), 0.0
        for key, finished in self._results(jobs):
            yield from finished.layers
            for number, name, digest in finished.digests:
                self.runs[number].tuned.remember(name, digest)
            done += jobs[key].work
            if progress is not None:
                progress(done, whole, jobs[key].first.name)

    def _results(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Finished]]:
        """(key, what was found) of each, those of earlier runs first."""
        before = {} if self.journal is None else {k: v for k, v in self.journal.finished.items() if k in jobs}
        yield from before.items()
        for key, finished in self._anew({key: job for key, job in jobs.items() if key not in before}):
            if self.journal is not None:
                self.journal.add(key, finished)
            yield key, finished

    def _anew(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Finished]]:
        if self.executor is not None:
            order = WorkOrder.of(self.runs, self.analysis.settings, self.cache)
            yield from spread(self.executor, partial(finish, order), list(jobs), partial(self._lost, jobs))
            return
        keys = {id(job): key for key, job in jobs.items()}

        def here(job: Job) -> tuple[str, Finished]:
            return keys[id(job)], _finished(self.analysis, self.runs, job)

        yield from as_finished(list(jobs.values()), self.analysis.settings, here)

    def _lost(self, jobs: Mapping[str, Job], key: str, why: str) -> Finished:
        """What a report says of a weight that no worker survived."""
        number = {id(run): position for position, run in enumerate(self.runs)}
        problem = Problem("failed", why)
        return Finished(tuple((number[id(run)], failure(run, pair, problem), None) for run, pair in jobs[key].parts))
