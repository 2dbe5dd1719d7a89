"""Ranks from paths: what rank each layer's update uses, and the suggested adapter written out of a full fine-tune."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Unpack

import numpy as np

from spectra import __version__
from spectra.adapters import rescales_base
from spectra.adapters.peft.replication import copies, ranges_of
from spectra.analysis.measures import update_singular_values
from spectra.analysis.ranks import ENERGY, layer_rank, own_rank, suggest, why_not
from spectra.analysis.truncation import Factors, low_rank_factors
from spectra.files.derived import Alternative, Derived
from spectra.pairing.pairs import LayerPair
from spectra.records.ranks import LayerRank, RankReport
from spectra.runs.jobs import Job, Problem, as_finished, jobs_of, read_weight
from spectra.runs.options import Progress, RankOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.run import Run, SingleRun, base_facts, check_initial, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import Source
from spectra.updates.algebra import TunedWeight
from spectra.updates.products import frobenius_norm

# Ends of transformers' class names, and PEFT's names of their tasks.
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Why no config names a layer whose weight is not one of the base's modules.
CUT = "a part of a weight that the base holds whole (experts, projections): no module that a config could name"
PARAMETER = "a parameter that is no module's weight: PEFT takes it by target_parameters"
OTHER_FORM = "a weight that the base has under another name, or with others: no module that a config could name"


@takes_options(RankOptions)
def ranks(
    tuned: Source,
    base: Source | None = None,
    *,
    energy: float = ENERGY,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    **options: Unpack[RankOptions],
) -> RankReport:
    """What rank each layer of a fine-tune really uses, and the LoRA config that would hold its change.

    The base is read, not decomposed.

    Parameters
    ----------
    tuned, base : an adapter or a full fine-tune and the model it was made from, as for :func:`spectra.audit`.
    energy : the share of each layer's ‖dW‖_F² that its rank is to hold, in (0, 1].
    max_rank : no rank above this; None leaves the break-even rank as the limit.
    by : which layers get the same rank, the highest that one of them needs: none ("layer"), those of a module "type",
        or all ("model").
    use_rslora : scale by alpha/√r (Kalajdzievski 2023, arXiv 2312.03732).
    alpha : a number, or a multiple of each layer's rank such as "2r".  None stands for "2r"; with rsLoRA, for the whole
        number, one for all layers, that brings the most common rank's scaling closest to 2.
    {options}

    Raises
    ------
    SpectraError : as for :func:`spectra.audit`.

    Examples
    --------
    >>> import spectra
    >>> report = spectra.ranks("fixtures/full", "fixtures/base", by="type")
    >>> report.suggestion.peft_config()["use_rslora"]
    False
    """
    run = open_run(tuned, base, checked_settings(**options))
    check_initial([run])
    choice = {"energy": energy, "max_rank": max_rank, "by": by, "use_rslora": use_rslora, "alpha": alpha}
    with shown(options["progress"]) as progress:
        return Ranking(run, choice).report(progress)


class Ranking:
    """The layers of one fine-tune gone through, with the factors of each where an adapter is to be written of them.

    Parameters
    ----------
    options : of :func:`spectra.analysis.ranks.suggest`; raises UsageError for bad ones before any work.
    """

    def __init__(self, run: SingleRun, options: dict[str, Any], *, factors: bool = False):
        self.run, self.options, self.wanted = run, options, factors
        suggest([], **options)
        self.factors: dict[str, Factors] = {}

    def report(self, progress: Progress | None) -> RankReport:
        run, started = self.run, time.perf_counter()
        layers: dict[str, LayerRank] = {}
        failed: dict[str, dict[str, Any]] = {}
        for outcomes in as_finished(jobs_of([run]), run.settings, self._of_job, progress):
            for pair, outcome in outcomes:
                if isinstance(outcome, LayerRank):
                    layers[pair.name] = outcome
                else:
                    failed[pair.name] = {
                        "name": pair.name, "status": outcome.status, "error": outcome.message,
                        "parameters": pair.update.parameters,
                    }  # fmt: skip
        ordered = [layers[pair.name] for pair in run.pairs if pair.name in layers]
        others = {*run.base.tensors} | {item.name for item in run.skipped} | set(failed)
        if run.plan.format == "full":  # an adapter's tensors are not the model's
            others |= set(run.tuned.tensors)
        ranges = ranges_of(run.tuned)
        suggestion = suggest(ordered, **self.options, other_modules=sorted(others | copies(others, ranges)))
        if suggestion is not None:  # the ranges are those whose layers the names are
            suggestion = replace(suggestion, layer_replication=ranges, task_type=_task_type(run))
        settings = run.settings.record()
        kept = ("dtype", "device", "threads", "workers", "include", "exclude", "hash_contents")
        return RankReport(
            base=base_facts(run),
            tuned=run.facts(),
            settings={**self.options, **{name: settings[name] for name in kept}},
            layers=tuple(ordered),
            suggestion=suggestion,
            skipped=tuple(asdict(item) for item in run.skipped),
            failed=tuple(failed[pair.name] for pair in run.pairs if pair.name in failed),
            spectra_version=__version__,
            seconds=round(time.perf_counter() - started, 3),
        )

    def chosen(self, report: RankReport) -> Iterator[tuple[str, Factors]]:
        """The factors of the suggested ranks; those of a layer whose rank others raised are computed anew."""
        assert report.suggestion is not None
        pairs = {pair.name: pair for pair in self.run.pairs}
        for choice in report.suggestion.choices:
            factors = self.factors.pop(choice.name)
            if factors.rank != choice.rank:
                factors = low_rank_factors(read_weight(self.run, pairs[choice.name]), choice.rank)
            yield choice.name, factors.rescaled(choice.scaling)

    def _of_job(self, job: Job) -> list[tuple[LayerPair, LayerRank | Problem]]:
        return [(pair, outcome) for _, pair, outcome in job.each(frobenius_norm, self._layer)]

    def _layer(self, base_norm: float, run: Run, pair: LayerPair, tuned: TunedWeight, _: bool) -> LayerRank:
        def made(singular_values: np.ndarray) -> LayerRank:
            layer = layer_rank(
                singular_values, pair.shape, name=pair.name, role=pair.role, kind=pair.update.kind,
                trained_rank=pair.update.rank, parameters=pair.update.parameters, base_norm_fro=base_norm,
            )  # fmt: skip
            return replace(layer, unnamed=_unnamed(pair), rescaled=rescales_base(pair.update))

        if tuned.is_unchanged():
            return made(np.zeros(1))
        if not self.wanted or pair.role != "linear":
            return made(update_singular_values(tuned))

        def rank(singular_values: np.ndarray) -> int:
            layer = made(singular_values)
            needed = own_rank(layer, self.options["energy"], self.options["max_rank"])
            return 1 if why_not(layer) else needed

        factors = low_rank_factors(tuned, rank)
        layer = made(factors.singular_values)
        if not why_not(layer):
            self.factors[pair.name] = factors
        return layer


def _task_type(run: SingleRun) -> str | None:
    """PEFT's name of the task: an adapter's own, or what the class of a whole model says."""
    named = (run.tuned.adapter_config or {}).get("task_type")
    if named is not None:
        return named if isinstance(named, str) else None
    classes = [str(name) for name in run.tuned.config.get("architectures") or () if run.plan.format == "full"]
    return next((task for name in classes for ending, task in TASK_TYPES.items() if name.endswith(ending)), None)


def _unnamed(pair: LayerPair) -> str | None:
    """Why a layer's weight is no module of the base's own, or None."""
    if isinstance(pair.base, Alternative):
        return OTHER_FORM
    if isinstance(pair.base, Derived) and pair.base.part_of is not None:
        return CUT
    return None if pair.base.name.endswith(".weight") else PARAMETER
