"""A model in training audited every so many steps, within a share of the training's own time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from spectra.analysis.study import Study
from spectra.errors import SpectraError, UsageError, in_one_line, in_short
from spectra.files.headers import TensorInfo
from spectra.records.history import PREFIX, Record, metrics_of
from spectra.records.report import SCOPES, Report
from spectra.runs.cache import SpectrumCache
from spectra.runs.reports import Analysis
from spectra.runs.run import SingleRun, open_run
from spectra.runs.settings import Settings, checked_settings
from spectra.sources.live import ADAPTER_IN_MEMORY, LiveCheckpoint, Source, checkpoint_of
from spectra.sources.live.memory import LiveTensor
from spectra.sources.resolve import Bases
from spectra.svd import KRYLOV_PAYS
from spectra.training.history import append_line, begin_history
from spectra.training.kept import KeptSpectra

logger = logging.getLogger("spectra.training")

# What an audit is taken to cost before one was measured, in seconds: for a layer whatever its size, for each value of
# its weight, and to decompose a base weight, for each p³.  From one core of an AMD EPYC (benchmarks/training.py).
PER_LAYER, PER_VALUE, PER_DECOMPOSITION = 0.01, 2e-8, 4e-10
AUDIT_OPTIONS = (
    "top_k", "epsilon", "side", "include", "exclude", "dtype", "threads", "split_fused", "initial_adapter",
    "allow_pickle", "local_files_only",
)  # fmt: skip
COUNTS = 20  # of intruders, to find the size at which the first appears
REPORTS = 20  # that stay in memory, of the latest audits; one of 224 layers takes some 2 MB


@dataclass(frozen=True)
class Plan:
    """When a monitor audits, and what it does then; see :class:`Monitor`."""

    every: int | None = 100
    at: tuple[int, ...] = ()
    at_end: bool = True
    max_share: float | None = 0.02
    warn_above: int | None = None
    stop_above: int | None = None
    limit_on: str = "judged"
    exact_threshold: bool = False
    history_file: Path | None = None
    on_error: Literal["warn", "raise"] = "warn"
    memory: float = 4e9
    cache: str | Path | None = None
    engine: str = "auto"
    device: str = "cpu"
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in ("every", "warn_above", "stop_above"):
            value, least = getattr(self, name), int(name == "every")
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"{name} = {value!r}; expected a whole number, at least {least}, or None")
        if any(type(step) is not int for step in self.at):
            raise UsageError(f"at = {self.at!r}; expected steps, whole numbers")
        if self.max_share is not None and not (_is_number(self.max_share) and 0 < self.max_share <= 1):
            raise UsageError(f"max_share = {self.max_share!r}; expected a share above 0, at most 1, or None")
        if not (_is_number(self.memory) and self.memory >= 0):
            raise UsageError(f"memory = {self.memory!r}; expected a number of bytes")
        if self.limit_on not in SCOPES[:-1]:
            raise UsageError(f"limit_on = {self.limit_on!r}; expected one of {', '.join(SCOPES[:-1])}")
        if self.on_error not in ("warn", "raise"):
            raise UsageError(f"on_error = {self.on_error!r}; expected warn or raise")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


OPTIONS = (*Plan.__dataclass_fields__, *AUDIT_OPTIONS)


def checked(options: Mapping[str, Any]) -> tuple[Plan, Settings]:
    """When to audit and how, out of the options of a monitor; raises UsageError."""
    for name in options:
        if name not in OPTIONS:
            raise UsageError(f"{name!r} is no option of a monitor; there are {', '.join(sorted(OPTIONS))}")
    mine: dict[str, Any] = {name: value for name, value in options.items() if name in Plan.__dataclass_fields__}
    at = mine.get("at", ())
    if not isinstance(at, Iterable) or isinstance(at, str):
        raise UsageError(f"at = {at!r}; expected steps, whole numbers")
    mine["at"] = tuple(at)
    if mine.get("history_file") is not None:
        mine["history_file"] = Path(mine["history_file"])
    plan = Plan(**mine)
    audit = {name: value for name, value in options.items() if name in AUDIT_OPTIONS}
    engine = plan.engine if plan.engine != "cached" else "auto"  # which takes it where there is a spectrum
    return plan, checked_settings(engine=engine, device=plan.device, **audit)


class Monitor:
    """Audits a model while it is trained.

    Call :meth:`step` after each step of the optimiser.  The model, its gradients and modes and the states of random
    numbers are what they were; the training goes on as if nothing had been there.

    Parameters
    ----------
    model : a ``torch.nn.Module`` or ``peft.PeftModel``, in whatever wraps it to be compiled or to run on several
        devices.  Weights that are shared out among processes (FSDP, ZeRO-3) are refused.
    base : what it is trained from: a path, a name in this machine's hub cache, a model or a state dict.  None is, of a
        PeftModel, the model without its adapter, and else a copy, made now in main memory and in the precision it is
        stored in, of the matrices that are trained.
    every : audit every so many steps; None only ``at`` some and at the end.
    at : steps to audit at whatever it costs.
    at_end : audit at the last step, where :meth:`step` is told, whatever it costs.
    max_share : audits may take this share of the training's own time: one that is due waits until it fits, with room
        left for the last one.  None for no such limit.
    warn_above, stop_above : more intruders than that are logged as a warning, or make ``record.should_stop`` true.
    limit_on : the total that these look at: "judged", "all" or "paper", as ``spectra audit --fail-on``.
    resumed : the training goes on from a checkpoint, so that the model is no base any more.
    exact_threshold : also find the factor by which each update may grow before its first intruder appears, by counting
        the intruders at other sizes of it: some 20 times the work of an audit.
    engine : "auto" decomposes base weights with min(m, n) < 1024 at the first audit, keeps their spectra and has the
        cached engine work with these; larger ones, unless ``cache`` has them, are audited by krylov.  "cached"
        decomposes and keeps them all; "krylov" and "exact" none.
    memory : bytes of main memory that spectra may take, 4·p² each, with p = min(m, n).  Weights that find no room are
        audited without.
    cache : a folder to keep the spectra in instead, from one training to the next; they are mapped, not loaded.  With
        ``base`` a path, what ``spectra cache`` put there is used.
    history_file : a file of JSON lines to append each record with its report to, of one training, resumed or not; see
        :func:`load_history`.
    on_error : "warn" logs what goes wrong in an audit, "raise" has it end the training.
    adapter : which of a PeftModel's adapters; None the active one.
    device : where to compute, whatever device the model is on.
    top_k, epsilon, side, include, exclude, dtype, threads, split_fused, initial_adapter, allow_pickle,
    local_files_only : as for :func:`spectra.audit`.

    Attributes
    ----------
    history : the records so far.  Those before the latest 20 have no report any more; the file has them all.
    seconds : that everything here has taken so far.

    Raises
    ------
    SpectraError : bad options, nothing to audit, or a model that cannot be read.  What comes later is for ``on_error``.
    """

    def __init__(self, model: torch.nn.Module, base: Source | None = None, *, resumed: bool = False, **options: Any):
        self._created = started = time.perf_counter()
        self._ended: float | None = None
        self.plan, self._settings = checked(options)
        self.history: list[Record] = []
        self.seconds = 0.0
        self._model: torch.nn.Module | None = model
        self._mark: int | None = None
        self._waiting = self._said_waiting = False
        check_whole(model)
        if self.plan.history_file is not None:
            begin_history(self.plan.history_file)
        disk = None if self.plan.cache is None else SpectrumCache(self.plan.cache)
        below = {"auto": KRYLOV_PAYS, "cached": None}.get(self.plan.engine, 0)
        self._spectra = KeptSpectra(self._settings.question, self.plan.device, self.plan.memory, below, disk)
        self._study = Study(draws=0, weights=True, shift=False) if self.plan.exact_threshold else None
        # Counts by chance are not logged, and would take their share of the training.
        self._analysis = Analysis(self._settings, self._spectra, self._study, chance=False)
        with undisturbed():
            tuned = self._tuned()
            if base is None and not _is_adapter(tuned):
                if resumed:
                    raise UsageError("a full fine-tune that is resumed: its base is no longer there; give it (base=)")
                base = _copied(tuned)
            named = base is None and tuned.around is None  # by the adapter's config: it is not what is in memory
            if named or isinstance(base, str | Path):
                base = Bases(self._settings.access).of(tuned, base)
            self._base = base
            self._expected = self._estimate(self._open())
        self.seconds += time.perf_counter() - started

    @property
    def report(self) -> Report | None:
        """That of the latest audit."""
        return self.history[-1].report if self.history else None

    @property
    def share(self) -> float:
        """What everything here took, relative to the time of the training without it."""
        return self._share(self.seconds)

    def _share(self, seconds: float) -> float:
        own = self._own(seconds)
        return seconds / own if own > 0 else math.inf

    def _own(self, seconds: float) -> float:
        """The training's time without these seconds of ours."""
        return (self._ended or time.perf_counter()) - self._created - seconds

    def release(self) -> None:
        """Lets go of the model, the base and the spectra when the training is over; the history stays."""
        self._ended = time.perf_counter()
        self._model = self._base = None
        self._spectra.clear()

    def step(self, step: int, *, last: bool = False) -> Record | None:
        """Audits the model if it is time to; ``last`` says that no further step comes."""
        if self._mark is None:
            self._mark = step - 1
        if not self._is_due(step, last):
            return None
        self._mark, self._waiting = step, False
        try:
            return self.audit(step)
        except Exception as error:  # an audit is no reason to lose a training
            if self.plan.on_error == "raise":
                raise
            what = str(error) if isinstance(error, SpectraError) else f"{type(error).__name__}: {in_short(error)}"
            logger.warning("step %d was not audited: %s", step, in_one_line(what))
            return None

    def audit(self, step: int) -> Record:
        """Audits the model now.

        Raises
        ------
        SpectraError : it cannot be read any more.
        """
        started, decomposing = time.perf_counter(), self._spectra.seconds
        try:
            with undisturbed():
                run = self._open()
                report = self._analysis.reports([run], started)[0]
                metrics = metrics_of(report)
            seconds = time.perf_counter() - started
            metrics |= {f"{PREFIX}seconds": seconds, f"{PREFIX}share": self._share(self.seconds + seconds)}
            record = Record(step, metrics, report, self._limit(report, step))
            self.history.append(record)
            if len(self.history) > REPORTS:
                self.history[-REPORTS - 1] = replace(self.history[-REPORTS - 1], report=None)
            self._write(record)
        finally:
            seconds = time.perf_counter() - started
            self.seconds += seconds
            self._expected = seconds - (self._spectra.seconds - decomposing)
        return record

    def _is_due(self, step: int, last: bool) -> bool:
        assert self._mark is not None
        if step <= self._mark:
            return False
        if step in self.plan.at or (last and self.plan.at_end):
            return True
        every = self.plan.every
        if every is None or step // every == self._mark // every:
            return False
        limit = self.plan.max_share
        if limit is None:
            return True
        coming = 2 if self.plan.at_end else 1  # room is left for the last
        fits = self.seconds + coming * self._expected <= limit * self._own(self.seconds)
        if not fits and not self._waiting:  # said once in a training, and again only to who asked for details
            logger.log(
                logging.DEBUG if self._said_waiting else logging.WARNING,
                "step %d: an audit is due and takes about %.2g s; it waits until audits take no more than %.3g %% of "
                "the training\'s time (max_share; None never waits)",
                step, self._expected, 100 * limit,
            )  # fmt: skip
            self._waiting = self._said_waiting = True
        return fits

    def _write(self, record: Record) -> None:
        if self.plan.history_file is None:
            return
        try:
            append_line(self.plan.history_file, record)
        except UsageError as error:  # the record is there all the same
            if self.plan.on_error == "raise":
                raise
            logger.warning("step %d: %s", record.step, error)

    def _tuned(self) -> LiveCheckpoint:
        """The adapter, or of a model without one the matrices that are trained."""
        if self._model is None:
            raise UsageError("the monitor has let go of its model")
        checkpoint = checkpoint_of(self._model, adapter=self.plan.adapter)
        assert isinstance(checkpoint, LiveCheckpoint)
        if _is_adapter(checkpoint):
            return checkpoint
        trained = {value.data_ptr() for value in self._model.parameters() if value.requires_grad and value.ndim >= 2}
        tensors = {
            name: info
            for name, info in checkpoint.tensors.items()
            if isinstance(info, LiveTensor) and info.tensor.data_ptr() in trained
        }
        if not tensors:
            raise UsageError(f"{checkpoint.path}: nothing to audit: no matrix of it is trained")
        return replace(checkpoint, tensors=tensors)

    def _open(self) -> SingleRun:
        # Anew each time: whoever trains may have put other tensors in the place of these, or another adapter.
        return open_run(self._tuned(), self._base, self._settings)

    def _estimate(self, run: SingleRun) -> float:
        """Seconds that the first audit may take."""
        seconds = 0.0
        for pair in run.pairs:
            m, n = pair.shape
            p, below = min(m, n), self._spectra.below
            seconds += PER_LAYER + PER_VALUE * m * n + PER_DECOMPOSITION * p**3 * (below is None or p < below)
        return seconds * (COUNTS if self.plan.exact_threshold else 1)

    def _limit(self, report: Report, step: int) -> Literal["warn", "stop"] | None:
        count, plan = report.total(self.plan.limit_on), self.plan
        stop = plan.stop_above is not None and count > plan.stop_above
        if not stop and (plan.warn_above is None or count <= plan.warn_above):
            return None
        limit = plan.stop_above if stop else plan.warn_above
        logger.warning(
            "step %d: %d intruder dimensions, above the limit of %d%s", step, count, limit,
            ": the training should stop" if stop else "",
        )  # fmt: skip
        return "stop" if stop else "warn"


def check_whole(model: torch.nn.Module) -> None:
    """Raises UsageError where the weights are shared out among processes, so that none has them whole."""
    for module in model.modules():  # its state dict would wait for the other processes
        if type(module).__name__ in ("FullyShardedDataParallel", "XlaFullyShardedDataParallel"):
            raise UsageError("the model is sharded (FSDP): no process has its weights whole; audit its checkpoints")
    for name, value in model.named_parameters():
        how = "ZeRO-3" if hasattr(value, "ds_id") else "DTensor" if hasattr(value, "placements") else None
        if how is not None:
            raise UsageError(f"the model is sharded ({how}): no process has {name!r} whole; audit its checkpoints")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Neither gradients nor autocast within; no random number of torch's own is drawn by anything here."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _is_adapter(tuned: LiveCheckpoint) -> bool:
    return tuned.layout == ADAPTER_IN_MEMORY


def _copied(tuned: LiveCheckpoint) -> LiveCheckpoint:
    """What is to be trained, as it is now."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in tuned.tensors.items():
        assert isinstance(info, LiveTensor)
        tensors[name] = replace(info, tensor=info.tensor.detach().to("cpu", copy=True))
    return replace(tuned, path=Path(f"{tuned.path}, before the training"), tensors=tensors, source=tensors)
