"""One base weight after the other analysed with all its fine-tunes, and the reports made of that."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from spectra import __version__
from spectra.analysis.layer import Findings, LayerAnalysis
from spectra.analysis.study import Study
from spectra.errors import LAYER_ERRORS
from spectra.pairing.pairs import LayerPair
from spectra.records.report import LayerReport, Report, module_type
from spectra.runs.cache import Spectra, SpectrumCache
from spectra.runs.runs import (
    Job,
    Progress,
    Run,
    Settings,
    base_facts,
    in_order,
    jobs_of,
)
from spectra.svd import Spectrum, choose_engine
from spectra.updates.algebra import TunedWeight

REMARKS = {
    "krylov": ("decided by certificates: what they did not need is null",),
    "proved_small": ("proven by the size of the update alone: each vector's lower bound is the proof",),
}


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
    cache: Spectra | None
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
        return [self.report(run, found, seconds) for run, found in zip(runs, layers, strict=True)]

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
            return [Result(run, failure(run, pair, *problem)) for run, pair in job.parts]
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
            return Result(run, failure(run, pair, *run.explain(pair, error)))
        return result

    def report(self, run: Run, layers: dict[str, LayerReport], seconds: float) -> Report:
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


def failure(run: Run, pair: LayerPair, status: str, message: str) -> LayerReport:
    """What a report says of a layer that could not be analysed."""
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
