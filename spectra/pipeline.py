"""The one composition: paths in, reports out.

Everything is matched and checked from headers before the first weight is read.  Then the run goes
base weight by base weight: each is read, upcast and decomposed once, however many fine-tunes it
has, and let go before the next one.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from spectra import __version__
from spectra.adapters import Plan, plan_updates
from spectra.analysis import DTYPES, Findings, LayerAnalysis, check_device, checked_question, using_threads
from spectra.cache import SpectrumCache
from spectra.checkpoint import Checkpoint
from spectra.errors import LAYER_ERRORS, ConvergenceError, NonFiniteError, SpectraError, UsageError, in_short
from spectra.layers import LayerPair, Pairing, pair_layers
from spectra.report import LayerReport, Report, module_type
from spectra.resolve import named_base, open_base, open_base_of, open_tuned
from spectra.svd import Question, Spectrum, choose_engine

# Called with (work done, work in all, layer just finished); work is in units of m·n·min(m, n).
Progress = Callable[[float, float, str], None]

REMARKS = {
    "krylov": ("decided by certificates: what they did not need is null",),
    "proved_small": ("proven by the size of the update alone: each vector's lower bound is the proof",),
}


@dataclass(frozen=True)
class Settings:
    """How to analyse; what the report records under ``settings``."""

    question: Question
    engine: str
    dtype: str
    device: str
    threads: int
    workers: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    verify: bool

    def record(self) -> dict[str, Any]:
        record = {**asdict(self.question), **{f.name: getattr(self, f.name) for f in fields(self)}}
        del record["question"]
        return {key: list(item) if isinstance(item, tuple) else item for key, item in record.items()}


def audit(
    tuned: str | Path,
    base: str | Path | None = None,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    side: str = "left",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    engine: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    verify: bool = False,
    cache: str | Path | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Flags the intruder dimensions of one fine-tune, layer by layer.

    ``tuned`` is an adapter folder, a checkpoint folder or a file; everything else is as for
    :func:`audit_many`.
    """
    return audit_many(
        [tuned], base, top_k=top_k, epsilon=epsilon, side=side, include=include, exclude=exclude, engine=engine,
        dtype=dtype, device=device, workers=workers, threads=threads, verify=verify, cache=cache, progress=progress,
    )[0]  # fmt: skip


def audit_many(
    tuned: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    side: str = "left",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    engine: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    verify: bool = False,
    cache: str | Path | Literal[False] | None = None,
    progress: Progress | None = None,
    on_unreadable: Callable[[SpectraError], None] | None = None,
) -> list[Report]:
    """Flags the intruder dimensions of fine-tunes, layer by layer.

    Parameters
    ----------
    tuned : adapter folders, checkpoints or files.
    base : the base checkpoint of all of them; None takes each adapter's from its config.
    top_k, epsilon, side : the definition; see :func:`spectra.find_intruders`.
    include, exclude : shell patterns over module names.
    engine : "auto", "exact", "krylov" or "cached"; the verdicts are the same.  Krylov decides large weights
        without decomposing the base, and gives bounds where the others give cosines; cached decomposes
        the base once for all fine-tunes, or takes what :func:`spectra.cache_base` kept.
    dtype : "float32" or "float64", the precision of the decompositions; weights that are stored in
        float64 are decomposed in float64 either way, since rounding them could hide the update.
    device : "cpu" or "cuda", with an index if need be.
    workers : how many base weights are worked on at a time (memory grows with it).
    threads : threads for one weight; part of the settings, since it may change last digits.
        By default torch's own number (which heeds OMP_NUM_THREADS), shared out among the workers.
    verify : hash every byte of all files into the fingerprints.
    cache : the folder where :func:`spectra.cache_base` kept the bases' spectra; None for the usual one,
        False to use none.
    progress : called after each layer.
    on_unreadable : called with the error of a fine-tune that cannot be read or matched, and the
        others are audited; without it the error is raised.

    Returns
    -------
    list of Report : in the order of ``tuned``, without those that could not be read.

    Raises
    ------
    SpectraError : bad options, unreadable or mismatched files.  What goes wrong with one layer's
        values is no exception but that layer's status.
    """
    settings = _settings(top_k, epsilon, side, include, exclude, engine, dtype, device, workers, threads, verify)
    spectra = None if cache is False else SpectrumCache(cache)
    runs = []
    for path in tuned:
        try:
            runs.append(_Run(path, base, settings))
        except SpectraError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    jobs = _jobs(runs, spectra)
    work = sum(job.work for job in jobs)
    done = 0.0
    for job, results in _in_order(jobs, settings):
        for run, pair, report in results:
            run.results[pair.name] = report
            done += job.work / len(results)
            if progress is not None:
                progress(done, work, pair.name)
    return [run.report(spectra) for run in runs]


def _settings(
    top_k: int, epsilon: float, side: str, include: Iterable[str], exclude: Iterable[str],
    engine: str, dtype: str, device: str, workers: int, threads: int | None, verify: bool,
) -> Settings:  # fmt: skip
    choose_engine(engine)
    if dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r}; expected float32 or float64")
    check_device(device)
    if workers < 1 or (threads is not None and threads < 1):
        raise UsageError("workers and threads are at least 1")
    return Settings(
        question=checked_question(top_k, epsilon, side),
        engine=engine,
        dtype=dtype,
        device=device,
        threads=threads or max(1, torch.get_num_threads() // workers),
        workers=workers,
        include=tuple(include),
        exclude=tuple(exclude),
        verify=verify,
    )


class _Run:
    """One fine-tune of an audit: opened, matched and checked before any work."""

    def __init__(self, path: str | Path, base: str | Path | None, settings: Settings):
        self.settings = settings
        self.started = time.perf_counter()
        self.tuned: Checkpoint = open_tuned(path)
        self.base: Checkpoint = open_base_of(self.tuned) if base is None else open_base(base)
        self.plan: Plan = plan_updates(self.tuned)
        self.pairing: Pairing = pair_layers(
            self.base, self.tuned, self.plan, include=settings.include, exclude=settings.exclude
        )
        if not self.pairing.pairs:
            reasons = sorted({item.reason for item in self.pairing.skipped})
            raise UsageError(f"{self.tuned.path}: nothing to analyse ({'; '.join(reasons[:3]) or 'no tensors'})")
        self.results: dict[str, LayerReport] = {}

    def report(self, spectra: SpectrumCache | None) -> Report:
        return Report(
            base={
                "path": str(self.base.path),
                "format": self.base.layout,
                **_fingerprint(self.base, self.settings.verify),
                "named_by_adapter": named_base(self.tuned, self.base),
                "changed_since_cached": spectra is not None and bool(spectra.stale_for(self.base)),
            },
            tuned={
                "path": str(self.tuned.path),
                "format": self.plan.format,
                **_fingerprint(self.tuned, self.settings.verify),
                **self.plan.facts,
            },
            settings=self.settings.record(),
            layers=tuple(self.results[pair.name] for pair in self.pairing.pairs),
            skipped=tuple(asdict(item) for item in self.pairing.skipped),
            spectra_version=__version__,
            seconds=round(time.perf_counter() - self.started, 3),
        )


def _fingerprint(checkpoint: Checkpoint, verify: bool) -> dict[str, str]:
    made = checkpoint.fingerprint(verify=verify)
    return {"fingerprint": made.value, "fingerprint_covers": made.covers, "fingerprint_headers": made.headers}


@dataclass(frozen=True)
class _Job:
    """One base weight and every pair that starts from it."""

    parts: tuple[tuple[_Run, LayerPair], ...]
    cache: SpectrumCache | None

    @property
    def work(self) -> float:
        m, n = self.parts[0][1].shape
        return float(m) * n * min(m, n) * (1 + len(self.parts))

    def do(self) -> list[tuple[_Run, LayerPair, LayerReport]]:
        run, first = self.parts[0]
        settings = run.settings
        started = time.perf_counter()
        try:
            dtype = torch.float64 if first.float64 else DTYPES[settings.dtype]
            W0 = first.read_base(run.base, dtype, settings.device)
            analysis = LayerAnalysis(
                W0,
                settings.question,
                choose_engine(settings.engine),
                fine_tunes=len(self.parts),
                stored=lambda: self._stored(W0),
            )
        except LAYER_ERRORS as error:
            problem = _explain(error, f"{first.base.file}: {first.base.name}")
            return [(run, pair, _failure(pair, *problem)) for run, pair in self.parts]
        results = []
        for run, pair in self.parts:
            results.append((run, pair, _analyse(run, pair, W0, analysis, started)))
            started = time.perf_counter()
        return results

    def prefetch(self) -> None:
        """Has the disk work ahead; nothing of it is kept here."""
        run, first = self.parts[0]
        run.base.prefetch([first.base.name])
        for run, pair in self.parts:
            run.tuned.prefetch(pair.update.tensors)

    def _stored(self, W0: torch.Tensor) -> Spectrum | None:
        """What an earlier run kept of this weight's spectrum."""
        run, first = self.parts[0]
        if self.cache is None or first.rows is not None:
            return None
        return self.cache.load(run.base, first.base.name, first.layout, W0.dtype)


def _jobs(runs: Sequence[_Run], cache: SpectrumCache | None) -> list[_Job]:
    groups: dict[Any, list[tuple[_Run, LayerPair]]] = defaultdict(list)
    for run in runs:
        for pair in run.pairing.pairs:
            groups[(run.base.path.resolve(), pair.base_key)].append((run, pair))
    return [_Job(tuple(parts), cache) for parts in groups.values()]


def _in_order(
    jobs: Sequence[_Job], settings: Settings
) -> Iterator[tuple[_Job, list[tuple[_Run, LayerPair, LayerReport]]]]:
    """Each job with its results; ``workers`` of them at a time, none kept waiting in memory."""
    if settings.workers == 1:
        with using_threads(settings.threads):
            for job, following in itertools.zip_longest(jobs, jobs[1:]):
                if following is not None:
                    following.prefetch()
                yield job, job.do()
        return
    before = torch.get_num_threads()
    # The number of threads is each worker thread's own setting.
    with ThreadPoolExecutor(settings.workers, initializer=torch.set_num_threads, initargs=(settings.threads,)) as pool:
        waiting = iter(jobs)
        running: dict[Future[Any], _Job] = {}
        try:
            while True:
                for job in waiting:
                    running[pool.submit(job.do)] = job
                    if len(running) == settings.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)


def _analyse(run: _Run, pair: LayerPair, W0: torch.Tensor, analysis: LayerAnalysis, started: float) -> LayerReport:
    try:
        update = pair.read_update(run.tuned, W0.dtype, run.settings.device)
        differs = pair.base_copy_differs(run.tuned, W0)
        findings = analysis.of(update.tuned(W0))
    except LAYER_ERRORS as error:
        names = pair.update.tensors
        if isinstance(error, NonFiniteError):  # say which of them
            names = tuple(name for name in names if not bool(run.tuned.read(name).isfinite().all()))
            error = NonFiniteError(
                "holds NaN or infinity" if names else "too large for this precision; try --dtype float64"
            )
        return _failure(pair, *_explain(error, f"{run.tuned.path}: {', '.join(names or pair.update.tensors)}"))
    return _layer_report(pair, findings, differs, time.perf_counter() - started)


def _explain(error: Exception, what: str) -> tuple[str, str]:
    """(status, message) of a layer that could not be analysed."""
    if isinstance(error, NonFiniteError):
        return "non_finite", f"{what}: {error}"
    if isinstance(error, ConvergenceError):
        return "not_converged", f"{what}: {error}"
    if isinstance(error, SpectraError):
        return "failed", str(error)
    return "failed", f"{what}: {in_short(error)}"


def _describe(pair: LayerPair) -> dict[str, Any]:
    return {
        "name": pair.name,
        "module_type": module_type(pair.name),
        "role": pair.role,
        "shape": pair.shape,
        "stored_shape": pair.stored_shape,
        "notes": pair.notes,
        "update": {
            "kind": pair.update.kind,
            "rank": pair.update.rank,
            "alpha": pair.update.alpha,
            "scaling": pair.update.scaling,
            "parameters": pair.update.parameters,
            "dense_parameters": pair.shape[0] * pair.shape[1],
        },
    }


def _failure(pair: LayerPair, status: str, message: str) -> LayerReport:
    return LayerReport(**_describe(pair), status=status, error=message)


def _layer_report(pair: LayerPair, findings: Findings, base_differs: bool, seconds: float) -> LayerReport:
    flags, describe = findings.flags, _describe(pair)
    describe["notes"] += REMARKS.get("proved_small" if findings.status == "proved_small" else findings.engine or "", ())
    if base_differs:
        flags += ("base_copy_differs",)
    if pair.float64:
        flags += ("float64_weights",)
    return LayerReport(
        **describe,
        status=findings.status,
        vectors=findings.vectors,
        intruders=len(findings.intruders),
        intruder_indices=findings.intruders,
        measures=findings.measures,
        random_floor=findings.random_floor,
        noise_like_base=findings.noise_like_base,
        flags=flags,
        engine=findings.engine,
        methods=findings.methods,
        residual=findings.residual,
        orthogonality=findings.orthogonality,
        seconds=round(seconds, 4),
    )
