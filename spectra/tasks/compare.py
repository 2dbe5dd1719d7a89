"""Fine-tunes of one base side by side: paths in, a Comparison or a layer's arrays out.

Layers outside, fine-tunes inside, so that each base weight is read and decomposed once for all of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from spectra import __version__
from spectra.analysis.measures import subspace_overlap
from spectra.analysis.study import Study, layer_spectra_of
from spectra.errors import SpectraError, UsageError
from spectra.pairing.pairs import LayerPair
from spectra.records.comparison import Comparison, short_names
from spectra.records.layer import LayerSpectra
from spectra.records.report import Report, module_type
from spectra.runs.jobs import Job, Problem, as_finished, jobs_of
from spectra.runs.options import AuditOptions, LayerOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.reports import Analysis, Result, open_cache
from spectra.runs.run import MergedRun, Run, check_one_base, open_run, opened
from spectra.runs.settings import Settings, checked_settings
from spectra.sources.live import Source, several
from spectra.sources.resolve import checkpoints_of
from spectra.sources.saved import load_report
from spectra.svd import Base, check_finite
from spectra.updates.algebra import TunedWeight

Merge = Sequence[tuple[float, Source]]
SIZE = 256  # singular vectors of a similarity matrix, where no number is given


@takes_options(AuditOptions, engine="cached")
def compare(
    tuned: Source | Sequence[Source],
    base: Source | None = None,
    *,
    merge: Sequence[Merge] = (),
    draws: int = 20,
    quick: bool = False,
    on_unreadable: Callable[[SpectraError], None] | None = None,
    **options: Unpack[AuditOptions],
) -> Comparison:
    """Compares fine-tunes of one base.  Each base weight is decomposed only once.

    Parameters
    ----------
    tuned : adapter folders, checkpoints, files, or models in memory (:data:`spectra.Source`).  A folder that holds
        nothing but a training run's ``checkpoint-N`` folders stands for these, in the order of their steps.  Or
        reports, or the JSON files that they were saved in: these are put side by side as they are, without the
        overlaps, random updates and counts by weight that only a comparison of the fine-tunes themselves has.
    base : the base of all of them; None takes the one that the adapters' configs name.
    merge : further fine-tunes to compare, each a list of (weight, path): W0 + Σ weight·dW.
    draws : random updates with dW's singular values, per layer, to compare the count of intruders with; the
        smallest p-value is 1/(1 + draws).
    quick : leave out what takes many more decompositions: random updates, the count as a function of the adapter's
        weight, and the shift of the spectrum.
    on_unreadable : called with the error of each fine-tune that cannot be read; the others are compared.  None
        raises it.
    {options}

    With the engines "krylov" and "auto", cosines and whatever needs them are left out.

    Returns
    -------
    Comparison : a report on each fine-tune, and the overlap of each pair of updates.

    Raises
    ------
    UsageError : fine-tunes of different bases; bad options.
    SpectraError : as for :func:`spectra.audit`.

    Examples
    --------
    >>> import spectra
    >>> comparison = spectra.compare(["fixtures/lora-r4", "fixtures/full"], "fixtures/base", quick=True)
    >>> [(row["label"], row["intruders"]) for row in comparison.rows()]
    [('lora-r4', 35), ('full', 5)]
    """
    if not isinstance(draws, int) or draws < 0:
        raise UsageError(f"draws = {draws!r}; expected a whole number, at least 0")
    settings = checked_settings(**options)
    sources = several(tuned)
    if saved := [one for one in sources if isinstance(one, Report) or is_saved(one)]:
        if len(saved) < len(sources) or merge:
            raise UsageError("saved reports are compared with saved reports alone; name these, or the fine-tunes")
        return compared_reports([one if isinstance(one, Report) else load_report(str(one)) for one in saved])
    started = time.perf_counter()
    runs = _open_all(sources, base, merge, settings, on_unreadable)
    study = Study(draws=0 if quick else draws, weights=not quick, shift=not quick)
    overlaps: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)

    def overlapping(results: list[Result]) -> None:
        for pair, overlap in _overlaps(runs, results):
            overlaps[pair].append(overlap)

    with shown(options["progress"]) as progress:
        reports = Analysis(settings, open_cache(options["cache"]), study).reports(runs, started, progress, overlapping)
    return Comparison(
        reports=tuple(reports),
        overlaps=tuple(_mean_overlap(*pair, reports[pair[0]], overlaps[pair]) for pair in sorted(overlaps)),
        spectra_version=__version__,
        seconds=reports[0].seconds,
    )


def is_saved(source: object) -> bool:
    """Whether this names a record in JSON rather than a model."""
    return isinstance(source, str | Path) and str(source).endswith(".json") and not str(source).endswith(".index.json")


def compared_reports(reports: Sequence[Report]) -> Comparison:
    """Reports that were made before, side by side.

    Raises
    ------
    UsageError : they are not about fine-tunes of one base, or do not count the same; what differs is said.
    """
    first = reports[0]
    for report in reports[1:]:
        if report.base["fingerprint_headers"] != first.base["fingerprint_headers"]:
            raise UsageError(
                f"{report.tuned.get('path')}: its report is on another base ({report.base.get('path')}) than that of "
                f"{first.tuned.get('path')} ({first.base.get('path')})"
            )
        for name in ("top_k", "epsilon", "side"):
            mine, other = report.settings[name], first.settings[name]
            if mine != other:
                raise UsageError(
                    f"{report.tuned.get('path')}: its report was made with {name} = {mine}, that of "
                    f"{first.tuned.get('path')} with {other}; audit one of them again"
                )
    return Comparison(tuple(reports), (), __version__)


@takes_options(LayerOptions)
def layer_spectra(
    tuned: Source | Sequence[Source], base: Source | None = None, *, size: int = SIZE, **options: Unpack[LayerOptions]
) -> list[LayerSpectra]:
    """All singular values of W0, W1 and dW of each chosen layer, and how W1's singular vectors relate to W0's.

    Both weights are decomposed in float64.

    Parameters
    ----------
    tuned, base : as for :func:`spectra.compare`.
    size : how many leading vectors of W0 and of W1 the similarity matrices have.
    {options}

    Returns
    -------
    list of LayerSpectra : layer by layer, each for every fine-tune that changes it.

    Raises
    ------
    SpectraError : unreadable or mismatched files, values that are not finite.
    """
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"size = {size!r}; expected a whole number, at least 1")
    settings = checked_settings(**options)
    runs = _open_all(tuned, base, (), settings, None)
    labels = dict(zip(map(id, runs), short_names([run.facts()["path"] for run in runs]), strict=True))

    def arrays(base: Base, run: Run, pair: LayerPair, weight: TunedWeight, _: bool) -> LayerSpectra:
        return layer_spectra_of(
            base, weight, settings.question, size,
            name=pair.name, module_type=module_type(pair.name), label=labels[id(run)], kind=run.update(pair)["kind"],
        )  # fmt: skip

    def of_job(job: Job) -> list[LayerSpectra]:
        def prepared(W0: Tensor) -> Base:
            check_finite(W0)
            return Base(W0, settings.question.side, fine_tunes=len(job.parts))

        layers = []
        for _, _, outcome in job.each(prepared, arrays):
            if isinstance(outcome, Problem):
                raise UsageError(outcome.message)
            layers.append(outcome)
        return layers

    with shown(options["progress"]) as progress:
        return [layer for layers in as_finished(jobs_of(runs), settings, of_job, progress) for layer in layers]


def _open_all(
    tuned: Source | Sequence[Source],
    base: Source | None,
    merge: Sequence[Merge],
    settings: Settings,
    on_unreadable: Callable[[SpectraError], None] | None,
) -> list[Run]:
    paths: list[Source] = []
    for item in several(tuned):
        paths += checkpoints_of(item) if isinstance(item, str | Path) else [item]
    singles = [partial(open_run, path, base, settings) for path in paths]
    merges = [partial(_merge, parts, base, settings) for parts in merge]
    openings: list[Callable[[], Run]] = [*singles, *merges]
    runs = opened(openings, on_unreadable if len(openings) > 1 else None)  # the error of a single one says it all
    if not runs:
        raise UsageError("nothing to compare: none of the fine-tunes could be read")
    check_one_base(runs)
    return runs


def _merge(parts: Merge, base: Source | None, settings: Settings) -> MergedRun:
    return MergedRun([(float(weight), open_run(path, base, settings)) for weight, path in parts])


def _overlaps(runs: Sequence[Run], results: Sequence[Result]) -> Iterable[tuple[tuple[int, int], dict[str, Any]]]:
    """The overlap of the leading directions of each two updates of one base weight."""
    known = [
        (runs.index(result.run), result.report, result.findings.extras.directions)
        for result in results
        if result.findings is not None
    ]
    for (a, report, X), (b, _, Y) in combinations(known, 2):
        if a == b:  # copies of a layer in one fine-tune (layer_replication)
            continue
        if X is None or Y is None or not X.shape[1] or not Y.shape[1]:
            continue
        yield (
            (a, b),
            {
                "name": report.name,
                "overlap": subspace_overlap(X, Y),
                "random": max(X.shape[1], Y.shape[1]) / X.shape[0],
                "directions": [X.shape[1], Y.shape[1]],
            },
        )


def _mean_overlap(a: int, b: int, report: Report, layers: list[dict[str, Any]]) -> dict[str, Any]:
    order = {layer.name: place for place, layer in enumerate(report.layers)}
    layers = sorted(layers, key=lambda layer: order[layer["name"]])
    means = {key: sum(layer[key] for layer in layers) / len(layers) for key in ("overlap", "random")}
    return {"a": a, "b": b, **means, "layers": layers}
