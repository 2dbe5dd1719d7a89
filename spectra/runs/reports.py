"""One base weight after the other analysed with all its fine-tunes, and the reports made of that."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from spectra import __version__
from spectra.analysis.chance import RandomUpdates
from spectra.analysis.layer import Findings, LayerAnalysis
from spectra.analysis.study import Study
from spectra.pairing.pairs import LayerPair
from spectra.records.report import LayerReport, Report, module_type
from spectra.runs.cache import Spectra, SpectrumCache
from spectra.runs.chance import facts_of, with_chance
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

    @property
    def open(self) -> RandomUpdates | None:
        """What to draw random updates from, where they can have intruders."""
        chance = None if self.findings is None else self.findings.chance
        return None if chance is None else chance.open


# Called with each tuned weight while it and its analysis are in memory.
Visit: TypeAlias = Callable[[LayerPair, TunedWeight, LayerAnalysis, Result], None]


@dataclass(frozen=True)
class Analysis:
    """Base weights analysed with all their fine-tunes, and the reports made of that.

    What ``visit`` raises of ``LAYER_ERRORS`` becomes that layer's status.  ``chance`` : whether random updates are
    drawn at the end (:mod:`spectra.runs.chance`), where no ``study`` does.
    """

    settings: Settings
    cache: Spectra | None
    study: Study | None = None
    visit: Visit | None = None
    chance: bool = True

    def reports(
        self,
        runs: Sequence[Run],
        started: float,
        progress: Progress | None = None,
        also: Callable[[list[Result]], None] | None = None,
    ) -> list[Report]:
        """One report a run; ``also`` is called with the results of each base weight while they are in memory."""

        def analysed() -> Iterator[tuple[int, LayerReport, RandomUpdates | None]]:
            for results in as_finished(jobs_of(runs), self.settings, self.of, progress):
                yield from ((runs.index(result.run), result.report, result.open) for result in results)
                if also is not None:
                    also(results)

        return self.assembled(runs, analysed(), started)

    def assembled(
        self,
        runs: Sequence[Run],
        layers: Iterable[tuple[int, LayerReport, RandomUpdates | None]],
        started: float,
    ) -> list[Report]:
        """One report a run out of (place of the run, layer, what to draw random updates from), which may come in any
        order; ``started`` as above."""
        by_run: list[dict[str, LayerReport]] = [{} for _ in runs]
        to_draw: list[dict[str, RandomUpdates]] = [{} for _ in runs]
        for number, layer, updates in layers:
            by_run[number][layer.name] = layer
            if updates is not None:
                to_draw[number][layer.name] = updates
        reports = []
        for run, own, updates_of in zip(runs, by_run, to_draw, strict=True):
            in_order = {pair.name: own[pair.name] for pair in run.pairs}
            if self.chance and self.draws_later:
                in_order = with_chance(in_order, updates_of, self.settings)
            reports.append(self.report(run, in_order))
        seconds = round(time.perf_counter() - started, 3)
        return [replace(report, seconds=seconds) for report in reports]

    @property
    def draws_later(self) -> bool:
        """Whether random updates are drawn after all layers are analysed, rather than with each."""
        return self.study is None or not self.study.draws

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

    def report(self, run: Run, layers: dict[str, LayerReport]) -> Report:
        """The report on one fine-tune, with its layers in order."""
        return Report(
            base={
                **base_facts(run),
                "changed_since_cached": self.cache is not None and bool(self.cache.stale_for(run.base)),
            },
            tuned=run.facts(),
            settings=self.settings.record(),
            layers=tuple(layers.values()),
            skipped=tuple(asdict(item) for item in run.skipped),
            spectra_version=__version__,
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
        expected_by_chance=facts_of(findings.chance, findings.extras.null),
        seconds=round(seconds, 4),
    )
