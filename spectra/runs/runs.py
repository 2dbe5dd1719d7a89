"""Fine-tunes opened, matched and checked before any work; then one base weight at a time with all of them.

What is to be found out about each pair is the caller's: audits, comparisons and rank reports share this.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from spectra.adapters import Skipped, plan_updates, uses_initial
from spectra.analysis.layer import DTYPES, check_device, checked_question, using_threads
from spectra.errors import ConvergenceError, NonFiniteError, SpectraError, UsageError, in_short
from spectra.files.checkpoint import Checkpoint
from spectra.pairing.fused import split_apart
from spectra.pairing.pairs import LayerPair, pair_layers, why_not_merged
from spectra.pairing.precision import caveat, quantised_as
from spectra.sources.live import Source, said_of
from spectra.sources.resolve import ANYWHERE, Access, Bases, named_base, open_tuned
from spectra.svd import Question, choose_engine
from spectra.updates.algebra import TunedWeight, merged

# Called with (work done, work in all, layer just finished); work is in units of m·n·min(m, n).
Progress = Callable[[float, float, str], None]
T = TypeVar("T")

# min(m, n) from which a second thread is worth it: below, it saves a fifth at most, and costs many times that where
# something else runs beside it, since threads spin while they wait (measured).
WORTH_THREADS = 512


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
    split_fused: bool = False  # recorded where it is asked for
    access: Access = ANYWHERE  # no part of the record: it changes no result
    initial_adapter: Source | None = None  # nor is this: the layers' notes say where it was used

    def record(self) -> dict[str, Any]:
        record = {**asdict(self.question), **{f.name: getattr(self, f.name) for f in fields(self)}}
        if not self.split_fused:
            del record["split_fused"]
        del record["question"], record["access"], record["initial_adapter"]
        return {key: list(item) if isinstance(item, tuple) else item for key, item in record.items()}


def checked_settings(
    *, top_k: int = 10, epsilon: float = 0.5, side: str = "left", include: Iterable[str] = (),
    exclude: Iterable[str] = (), engine: str = "auto", dtype: str = "float32", device: str = "cpu",
    workers: int = 1, threads: int | None = None, verify: bool = False, split_fused: bool = False,
    allow_pickle: bool = False, local_files_only: bool = False, initial_adapter: Source | None = None,
) -> Settings:  # fmt: skip
    """The options of :func:`spectra.audit_many`, checked; raises UsageError."""
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
        split_fused=split_fused,
        access=Access(allow_pickle, local_files_only),
        initial_adapter=initial_adapter,
    )


class Run(Protocol):
    """One fine-tune: which base weights it changes, and how each is read."""

    base: Checkpoint
    pairs: tuple[LayerPair, ...]
    skipped: tuple[Skipped, ...]
    settings: Settings

    def facts(self) -> dict[str, Any]:
        """What the report says under ``tuned``."""
        ...

    def update(self, pair: LayerPair) -> dict[str, Any]:
        """What the report says of one layer's update."""
        ...

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        """W1, and whether a copy of the base that came with it is another weight than W0."""
        ...

    def prefetch(self, pair: LayerPair) -> None:
        """Has the disk work ahead."""
        ...

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        """(status, message) of a layer that could not be analysed."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


class SingleRun:
    """One fine-tune, from a path or from memory.

    Raises
    ------
    SpectraError : it cannot be read, does not fit the base, or changes none of its weights.
    """

    def __init__(self, path: Source, base: Source | None, settings: Settings, bases: Bases | None = None):
        self.settings = settings
        self.tuned: Checkpoint = open_tuned(path, settings.access)
        self.base = (bases or Bases(settings.access)).of(self.tuned, base)
        if settings.split_fused:
            self.base, self.tuned = split_apart(self.base, self.tuned)
        before = settings.initial_adapter
        initial = open_tuned(before, settings.access) if before is not None else None
        self.plan = plan_updates(self.tuned, initial)
        pairing = pair_layers(self.base, self.tuned, self.plan, include=settings.include, exclude=settings.exclude)
        self.pairs, self.skipped, self.counterpart = pairing.pairs, pairing.skipped, pairing.counterpart
        if not self.pairs:
            raise UsageError(f"{self.tuned.path}: nothing to analyse ({pairing.why_empty})")

    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.tuned.path),
            "format": self.plan.format,
            **fingerprint(self.tuned, self.settings.verify),
            **self.plan.facts,
        }

    def update(self, pair: LayerPair) -> dict[str, Any]:
        return {
            "kind": pair.update.kind,
            "rank": pair.update.rank,
            "alpha": pair.update.alpha,
            "scaling": pair.update.scaling,
            "parameters": pair.update.parameters,
            "dense_parameters": pair.shape[0] * pair.shape[1],
        }

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        update = pair.read_update(self.tuned, W0.dtype, self.settings.device)
        return update.tuned(W0), pair.base_copy_differs(self.tuned, W0)

    def prefetch(self, pair: LayerPair) -> None:
        self.tuned.prefetch([pair.made] if pair.made else pair.update.tensors)

    def non_finite(self, pair: LayerPair) -> tuple[str, ...]:
        """The tensors of an update that hold NaN or infinity; of what follows from stored ones, the weight itself."""
        if pair.made:
            return () if is_finite(self.tuned.load(pair.made)) else (pair.made.name,)
        values = ((name, self.tuned.read(name)) for name in pair.update.tensors)
        return tuple(name for name, value in values if value.is_floating_point() and not is_finite(value))

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        names = pair.update.tensors
        if isinstance(error, NonFiniteError):  # say which of them
            names = self.non_finite(pair)
            scaled = pair.made is not None and pair.made.quantised is not None
            why = "its stored scales give NaN or infinity" if scaled else "holds NaN or infinity"
            error = NonFiniteError(why if names else "too large for this precision; try --dtype float64")
        return explain(error, f"{self.tuned.path}: {', '.join(names or pair.update.tensors)}")


class MergedRun:
    """Several fine-tunes of one base merged with weights: W0 + Σ weight·dW.

    Raises
    ------
    UsageError : nothing to merge, a weight that is no finite number, not one base, vocabularies that were
        resized to different lengths, or a base weight that one of them has in another form or layout than another.
    """

    def __init__(self, parts: Sequence[tuple[float, SingleRun]]):
        if not parts:
            raise UsageError("a merge of nothing")
        for weight, run in parts:
            if not math.isfinite(weight):
                raise UsageError(f"{run.tuned.path}: weight = {weight}; expected a finite number")
            if run.plan.sharing:
                raise UsageError(f"{run.tuned.path}: its layers are copies (layer_replication), so it is not merged")
        self.parts = tuple(parts)
        self.base, self.settings = parts[0][1].base, parts[0][1].settings
        self.skipped = tuple({item: None for _, run in parts for item in run.skipped})
        check_one_base([run for _, run in parts])
        self._sources: dict[Hashable, list[tuple[float, SingleRun, LayerPair]]] = defaultdict(list)
        for weight, run in parts:
            for pair in run.pairs:
                self._sources[pair.base_key].append((weight, run, pair))
        self.pairs = tuple(
            replace(sources[0][2], float64=any(pair.float64 for _, _, pair in sources))
            for sources in self._sources.values()
        )
        how = why_not_merged(self.pairs)
        if how:
            raise UsageError(f"{self.name}: {how}, so they cannot be merged")

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g}*{run.tuned.path}" for weight, run in self.parts)

    def facts(self) -> dict[str, Any]:
        parts = []
        for weight, run in self.parts:
            facts = run.facts()
            parts.append({"weight": weight, **{key: value for key, value in facts.items() if key != "path"}})
        covers = {part["fingerprint_covers"] for part in parts}
        value: dict[str, Any] = {"path": self.name, "format": "merged"}
        for key in ("fingerprint", "fingerprint_headers"):
            text = "\n".join(f"{part['weight']!r} {part[key]}" for part in parts)
            value[key] = f"sha256:{sha256(text.encode()).hexdigest()}"
        value["fingerprint_covers"] = covers.pop() if len(covers) == 1 else "headers"
        return {**value, "rank": None, "alpha": None, "scaling": None, "parts": parts}

    def update(self, pair: LayerPair) -> dict[str, Any]:
        parts = [run.update(own) for _, run, own in self._sources[pair.base_key]]
        ranks = [part["rank"] for part in parts]
        return {
            **parts[0],
            "kind": "merged",
            "rank": None if None in ranks else sum(ranks),
            "alpha": None,
            "scaling": None,
            "parameters": sum(part["parameters"] for part in parts),
        }

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        differing = []

        def parts() -> Iterator[tuple[float, TunedWeight]]:  # one at a time in memory
            for weight, run, own in self._sources[pair.base_key]:
                tuned, differs = run.weight(own, W0)
                differing.append(differs)
                yield weight, tuned

        return merged(W0, parts()), any(differing)

    def prefetch(self, pair: LayerPair) -> None:
        for _, run, own in self._sources[pair.base_key]:
            run.prefetch(own)

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        sources = [(run, own) for _, run, own in self._sources[pair.base_key]]
        if isinstance(error, NonFiniteError):  # of the parts whose values these are, if any
            sources = [(run, own) for run, own in sources if run.non_finite(own)] or sources
        explained = [run.explain(own, error) for run, own in sources]
        return explained[0][0], "; ".join(message for _, message in explained)


def check_one_base(runs: Sequence[Run]) -> None:
    """Raises UsageError where fine-tunes of different bases were given."""
    paths = {run.base.place: run.base.path for run in runs}
    if len(paths) > 1:
        raise UsageError(
            f"these are fine-tunes of different bases ({', '.join(map(str, paths.values()))}); name one with --base"
        )


def fingerprint(checkpoint: Checkpoint, verify: bool) -> dict[str, Any]:
    """The report's fields for what identifies a checkpoint."""
    made = checkpoint.fingerprint(verify=verify)
    where = {"in_memory": True} if checkpoint.in_memory else {}
    return {**where, "fingerprint": made.value, "fingerprint_covers": made.covers, "fingerprint_headers": made.headers}


def base_facts(run: Run) -> dict[str, Any]:
    """What a report says under ``base``."""
    return {
        "path": str(run.base.path),
        "format": run.base.layout,
        **fingerprint(run.base, run.settings.verify),
        "named_by_adapter": named_base(run.tuned, run.base) if isinstance(run, SingleRun) else None,
        "quantised": quantised_as(run.base),
        "caveat": caveat(run.base, run.tuned, run.plan) if isinstance(run, SingleRun) else caveat(run.base),
    }


def is_finite(value: Tensor) -> bool:
    """Whether all values are finite; of eight bits, too, for which torch cannot tell."""
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())


def explain(error: Exception, what: str) -> tuple[str, str]:
    """(status, message) of a layer that could not be analysed."""
    if isinstance(error, NonFiniteError):
        return "non_finite", f"{what}: {error}"
    if isinstance(error, ConvergenceError):
        return "not_converged", f"{what}: {error}"
    if isinstance(error, SpectraError):
        return "failed", str(error)
    return "failed", f"{what}: {in_short(error)}"


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

    def explain(self, error: Exception) -> tuple[str, str]:
        """(status, message) of its pairs where the base weight itself could not be had."""
        return explain(error, f"{self.first.base.file}: {self.first.base.name}")

    @property
    def threads(self) -> int:
        """As many as the settings say; one for a small weight."""
        return 1 if min(self.first.shape) < WORTH_THREADS else self.parts[0][0].settings.threads

    def prefetch(self) -> None:
        """Has the disk work ahead; nothing of it is kept here."""
        self.base.prefetch([self.first.base])
        for run, pair in self.parts:
            run.prefetch(pair)


def opened(
    openings: Iterable[Callable[[], AnyRun]], on_unreadable: Callable[[SpectraError], None] | None
) -> list[AnyRun]:
    """The runs that could be opened; the errors of the others are handed over, or raised where nobody takes them."""
    runs = []
    for opening in openings:
        try:
            runs.append(opening())
        except SpectraError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    if runs:
        check_initial(runs)
    return runs


def check_initial(runs: Iterable[Run]) -> None:
    """Raises UsageError unless an initial adapter that was given is that of exactly one fine-tune."""
    singles: list[Run] = []
    for run in runs:
        singles += [own for _, own in run.parts] if isinstance(run, MergedRun) else [run]
    given = {said_of(item) for item in [run.settings.initial_adapter for run in singles] if item is not None}
    users = {
        run.tuned.place: run.tuned.path for run in singles if isinstance(run, SingleRun) and uses_initial(run.plan)
    }
    for path in given:
        if not users:
            raise UsageError(f"{path}: no fine-tune here has an initialisation that needs an initial adapter")
        if len(users) > 1:
            raise UsageError(
                f"{path}: it is the initial adapter of one fine-tune, but {len(users)} need one "
                f"({', '.join(sorted(map(str, users.values())))}); give them one at a time"
            )


def jobs_of(runs: Sequence[Run]) -> list[Job]:
    """The base weights of all runs, each with every fine-tune of it."""
    groups: dict[Any, list[tuple[Run, LayerPair]]] = defaultdict(list)
    for run in runs:
        for pair in run.pairs:
            groups[(run.base.place, pair.base_key)].append((run, pair))
    return [Job(tuple(parts)) for parts in groups.values()]


def in_order(
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
