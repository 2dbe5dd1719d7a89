"""One base weight after the other analysed with all its fine-tunes, and the reports made of that."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from spectra import __version__
from spectra.analysis.layer import Findings, LayerAnalysis
from spectra.analysis.study import Study
from spectra.pairing.pairs import LayerPair
from spectra.records.report import LayerReport, Report, module_type
from spectra.runs.cache import Spectra, SpectrumCache
from spectra.runs.jobs import Job, Problem, as_finished, jobs_of
from spectra.runs.options import Progress
from spectra.runs.run import Run, base_facts
from spectra.runs.settings import Settings
from spectra.svd import Spectrum, choose_engine
from spectra.updates.algebra import TunedWeight

REMARKS = {
    "krylov": ("decided by certificates: what they did not need is null",),
    "proved_small": ("proven by the size of the update alone: each vector's lower bound is the proof",),
}


def open_cache(cache: str | Path | Literal[False] | None) -> SpectrumCache | None:
    """The spectra that :func:`spectra.cache` kept, where they are wanted."""
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

        def analysed() -> Iterator[tuple[int, LayerReport]]:
            for results in as_finished(jobs_of(runs), self.settings, self.of, progress):
                yield from ((runs.index(result.run), result.report) for result in results)
                if also is not None:
                    also(results)

        return self.assembled(runs, analysed(), started)

    def assembled(self, runs: Sequence[Run], layers: Iterable[tuple[int, LayerReport]], started: float) -> list[Report]:
        """One report a run out of (place of the run, layer), which may come in any order; ``started`` as above."""
        by_run: list[dict[str, LayerReport]] = [{} for _ in runs]
        for number, layer in layers:
            by_run[number][layer.name] = layer
        seconds = time.perf_counter() - started
        return [self.report(run, own, seconds) for run, own in zip(runs, by_run, strict=True)]

    def of(self, job: Job) -> list[Result]:
        """Every fine-tune of one base weight."""
        started = time.perf_counter()  # the first fine-tune's time has the base's reading in it

        def prepared(W0: Tensor) -> LayerAnalysis:
            return LayerAnalysis(
                W0,
                self.settings.question,
                choose_engine(self.settings.engine),
                fine_tunes=len(job.parts),
                stored=lambda: self._stored(job, W0),
                study=self.study,
            )

        def analysed(analysis: LayerAnalysis, run: Run, pair: LayerPair, tuned: TunedWeight, differs: bool) -> Result:
            findings = analysis.of(tuned, seed=zlib.crc32(pair.name.encode()))
            seconds = time.perf_counter() - started
            result = Result(run, layer_report(run, pair, findings, differs, seconds), findings)
            if self.visit is not None:
                self.visit(pair, tuned, analysis, result)
            return result

        results = []
        for run, pair, outcome in job.each(prepared, analysed):
            results.append(Result(run, failure(run, pair, outcome)) if isinstance(outcome, Problem) else outcome)
            started = time.perf_counter()
        return results

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


def failure(run: Run, pair: LayerPair, problem: Problem) -> LayerReport:
    """What a report says of a layer that could not be analysed."""
    return LayerReport(**_describe(run, pair), status=problem.status, error=problem.message)


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
