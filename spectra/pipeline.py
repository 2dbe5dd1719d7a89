"""The one composition: paths in, reports out.

Everything is matched and checked from headers before the first weight is read.  Then the run goes
base weight by base weight: each is read, upcast and decomposed once, however many fine-tunes it
has, and let go before the next one.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from spectra import __version__
from spectra.analysis import Findings, LayerAnalysis
from spectra.cache import SpectrumCache
from spectra.errors import LAYER_ERRORS, SpectraError
from spectra.layers import LayerPair
from spectra.report import LayerReport, Report, module_type
from spectra.runs import (
    Job,
    Progress,
    Run,
    Settings,
    SingleRun,
    base_facts,
    checked_settings,
    in_order,
    jobs_of,
    opened,
)
from spectra.study import Study
from spectra.svd import Spectrum, choose_engine
from spectra.updates import TunedWeight

REMARKS = {
    "krylov": ("decided by certificates: what they did not need is null",),
    "proved_small": ("proven by the size of the update alone: each vector's lower bound is the proof",),
}


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
    split_fused: bool = False,
    allow_pickle: bool = False,
    initial_adapter: str | Path | None = None,
    cache: str | Path | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Flags the intruder dimensions of one fine-tune, layer by layer.

    ``tuned`` is an adapter folder, a checkpoint folder or a file; everything else is as for
    :func:`audit_many`.
    """
    return audit_many(
        [tuned], base, top_k=top_k, epsilon=epsilon, side=side, include=include, exclude=exclude, engine=engine,
        dtype=dtype, device=device, workers=workers, threads=threads, verify=verify, allow_pickle=allow_pickle,
        initial_adapter=initial_adapter, split_fused=split_fused, cache=cache, progress=progress,
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
    split_fused: bool = False,
    allow_pickle: bool = False,
    initial_adapter: str | Path | None = None,
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
    split_fused : split matrices that hold several projections (qkv_proj, gate_up_proj, c_attn and others) into these,
        as config.json says; on both sides, since a split weight is never compared with a fused one.
    allow_pickle : also read weights that are pickled, where a folder has no others; nothing that a pickle would run
        is run, and one that is more than a dictionary of tensors is refused.
    initial_adapter : the adapter as it was saved before training, for one whose initialisation changed the base in a
        way that cannot be computed from it (``pissa_niter_*``, ``corda``, ``lora_ga``).
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
    settings = checked_settings(
        top_k=top_k, epsilon=epsilon, side=side, include=include, exclude=exclude, engine=engine, dtype=dtype,
        device=device, workers=workers, threads=threads, verify=verify, allow_pickle=allow_pickle,
        initial_adapter=initial_adapter, split_fused=split_fused,
    )  # fmt: skip
    started = time.perf_counter()
    runs = opened((partial(SingleRun, path, base, settings) for path in tuned), on_unreadable)
    return Analysis(settings, open_cache(cache)).reports(runs, started, progress)


def open_cache(cache: str | Path | Literal[False] | None) -> SpectrumCache | None:
    """The spectra that :func:`spectra.cache_base` kept, where they are wanted."""
    return None if cache is False else SpectrumCache(cache)


@dataclass(frozen=True, eq=False)
class Result:
    """What was found of one layer of one fine-tune."""

    run: Run
    report: LayerReport
    findings: Findings | None = None


# Called with each tuned weight while it and its analysis are in memory.
Visit: TypeAlias = Callable[[LayerPair, TunedWeight, LayerAnalysis, Result], None]


@dataclass(frozen=True)
class Analysis:
    """Base weights analysed with all their fine-tunes, and the reports made of that.

    What ``visit`` raises of ``LAYER_ERRORS`` becomes that layer's status.
    """

    settings: Settings
    cache: SpectrumCache | None
    study: Study | None = None
    visit: Visit | None = None

    def reports(
        self,
        runs: Sequence[Run],
        started: float,
        progress: Progress | None = None,
        also: Callable[[list[Result]], None] | None = None,
    ) -> list[Report]:
        """One report a run; ``also`` is called with the results of each base weight while they are in memory."""
        layers: list[dict[str, LayerReport]] = [{} for _ in runs]
        for results in in_order(jobs_of(runs), self.settings, self.of, progress):
            for result in results:
                layers[runs.index(result.run)][result.report.name] = result.report
            if also is not None:
                also(results)
        seconds = time.perf_counter() - started
        return [self._report(run, found, seconds) for run, found in zip(runs, layers, strict=True)]

    def of(self, job: Job) -> list[Result]:
        """Every fine-tune of one base weight."""
        started = time.perf_counter()
        try:
            W0 = job.read_base()
            analysis = LayerAnalysis(
                W0,
                self.settings.question,
                choose_engine(self.settings.engine),
                fine_tunes=len(job.parts),
                stored=lambda: self._stored(job, W0),
                study=self.study,
            )
        except LAYER_ERRORS as error:
            problem = job.explain(error)
            return [Result(run, _failure(run, pair, *problem)) for run, pair in job.parts]
        results = []
        for run, pair in job.parts:
            results.append(self._analyse(run, pair, W0, analysis, started))
            started = time.perf_counter()
        return results

    def _analyse(self, run: Run, pair: LayerPair, W0: Tensor, analysis: LayerAnalysis, started: float) -> Result:
        try:
            tuned, differs = run.weight(pair, W0)
            findings = analysis.of(tuned, seed=zlib.crc32(pair.name.encode()))
            seconds = time.perf_counter() - started
            result = Result(run, layer_report(run, pair, findings, differs, seconds), findings)
            if self.visit is not None:
                self.visit(pair, tuned, analysis, result)
        except LAYER_ERRORS as error:
            return Result(run, _failure(run, pair, *run.explain(pair, error)))
        return result

    def _report(self, run: Run, layers: dict[str, LayerReport], seconds: float) -> Report:
        """The report on one fine-tune, its layers in the order they were matched in."""
        return Report(
            base={
                **base_facts(run),
                "changed_since_cached": self.cache is not None and bool(self.cache.stale_for(run.base)),
            },
            tuned=run.facts(),
            settings=self.settings.record(),
            layers=tuple(layers[pair.name] for pair in run.pairs),
            skipped=tuple(asdict(item) for item in run.skipped),
            spectra_version=__version__,
            seconds=round(seconds, 3),
        )

    def _stored(self, job: Job, W0: Tensor) -> Spectrum | None:
        """What an earlier run kept of this weight's spectrum."""
        if self.cache is None or job.first.rows is not None:
            return None
        return self.cache.load(job.base, job.first.base_key[0], job.first.layout, W0.dtype)


def _describe(run: Run, pair: LayerPair) -> dict[str, Any]:
    return {
        "name": pair.name,
        "module_type": module_type(pair.name),
        "role": pair.role,
        "shape": pair.shape,
        "stored_shape": pair.stored_shape,
        "notes": pair.notes,
        "update": run.update(pair),
    }


def _failure(run: Run, pair: LayerPair, status: str, message: str) -> LayerReport:
    return LayerReport(**_describe(run, pair), status=status, error=message)


def layer_report(run: Run, pair: LayerPair, findings: Findings, base_differs: bool, seconds: float) -> LayerReport:
    """What a report says of one layer; ``base_differs`` is what :meth:`Run.weight` found."""
    flags, describe = findings.flags, _describe(run, pair)
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
        principal_cosines=findings.extras.principal_cosines,
        weights=findings.extras.weights,
        null=findings.extras.null,
        seconds=round(seconds, 4),
    )
