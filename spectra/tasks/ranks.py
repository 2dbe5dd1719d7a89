"""Ranks from paths: what rank each layer's update uses, and the suggested adapter written out of a full fine-tune."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectra import __version__
from spectra.adapters import WholeTensor, rescales_base
from spectra.adapters.peft.replication import copies, ranges_of
from spectra.adapters.peft.writing import (
    Whole,
    adapter_config,
    check_folder,
    factor_tensors,
    tied_head,
    whole_modules,
    write_adapter,
)
from spectra.analysis.layer import ieee_arithmetic
from spectra.analysis.measures import update_singular_values
from spectra.analysis.truncation import Factors, low_rank_factors
from spectra.errors import LAYER_ERRORS, UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Alternative, Derived
from spectra.files.folders import check_apart
from spectra.pairing.pairs import LEFT_OUT, LayerPair
from spectra.records.ranks import LayerRank, RankReport, layer_rank, own_rank, suggest, why_not
from spectra.runs.runs import Job, Progress, SingleRun, base_facts, check_initial, checked_settings, in_order, jobs_of
from spectra.sources.hub import URL
from spectra.sources.live import LiveCheckpoint, Source
from spectra.updates.algebra import TunedWeight

if TYPE_CHECKING:
    from torch import Tensor

# Ends of transformers' class names, PEFT's names of their tasks, and the heads that PEFT then wants in the adapter.
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
# Why no config names a layer whose weight is none of the base's modules.
CUT = "a part of a weight that the base holds whole (experts, projections): no module that a config could name"
PARAMETER = "a parameter that is no module's weight: PEFT takes it by target_parameters"
OTHER_FORM = "a weight that the base has under another name, or with others: no module that a config could name"


@dataclass(frozen=True)
class Extraction:
    """An adapter made out of a full fine-tune.

    Attributes
    ----------
    folder : where it lies.
    report : the ranks, with the suggestion that it follows.
    relative_errors : layer → ‖dW − dW_r‖_F / ‖dW‖_F of its factors as written.
    whole : the modules that go along whole, in ``modules_to_save``.
    left_out : tensor → why the adapter does not carry its change.
    remarks : what whoever loads it must know.
    """

    folder: Path
    report: RankReport
    relative_errors: Mapping[str, float]
    whole: tuple[str, ...]
    left_out: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def suggest_ranks(
    tuned: Source,
    base: Source | None = None,
    *,
    energy: float = 0.9,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    verify: bool = False,
    split_fused: bool = False,
    allow_pickle: bool = False,
    local_files_only: bool = False,
    initial_adapter: Source | None = None,
    progress: Progress | None = None,
) -> RankReport:
    """What rank each layer of a fine-tune really uses, and the LoRA config that would hold its change.

    Parameters
    ----------
    tuned : an adapter or a full fine-tune, a path or in memory.
    energy, max_rank, by, use_rslora, alpha : how ranks and alphas are chosen; see
        :func:`spectra.records.ranks.suggest`.

    The rest is as for :func:`spectra.audit_many`, and so are the errors.  The base is read, not decomposed.

    Examples
    --------
    >>> import spectra
    >>> report = spectra.suggest_ranks("fixtures/full", "fixtures/base", by="type")
    >>> report.suggestion.peft_config()["use_rslora"]
    False
    """
    settings = checked_settings(
        include=include, exclude=exclude, dtype=dtype, device=device, workers=workers, threads=threads, verify=verify,
        allow_pickle=allow_pickle, local_files_only=local_files_only, initial_adapter=initial_adapter,
        split_fused=split_fused,
    )  # fmt: skip
    run = SingleRun(tuned, base, settings)
    check_initial([run])
    options = {"energy": energy, "max_rank": max_rank, "by": by, "use_rslora": use_rslora, "alpha": alpha}
    return _Work(run, options).report(progress)


def extract_adapter(
    tuned: Source,
    output: str | Path,
    base: Source | None = None,
    *,
    energy: float = 0.9,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    whole: bool = True,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Writes the suggested low-rank adapter of a full fine-tune, in PEFT's format.

    Each layer's change is truncated by its singular value decomposition, the best approximation of that rank.

    Parameters
    ----------
    tuned, base : a full fine-tune and the model it was made from, paths or in memory.
    output : the folder to write; it appears whole or not at all.
    energy, max_rank, by, use_rslora, alpha : as for :func:`suggest_ranks`.
    whole : carry what factors cannot (norms, biases, embeddings, new heads) in ``modules_to_save``; else it
        stays as in the base, and is listed in ``left_out``.
    force : replace an adapter folder that is there already.

    Raises
    ------
    UsageError : ``tuned`` is an adapter already, nothing would be in the result, or the folder is there.
    SpectraError : as for :func:`spectra.audit_many`; also where a layer's values are not finite.
    """
    check_folder(output, force=force)
    settings = checked_settings(
        include=include,
        exclude=exclude,
        device=device,
        threads=threads,
        allow_pickle=allow_pickle,
        local_files_only=local_files_only,
    )
    run = SingleRun(tuned, base, settings)
    if run.plan.format != "full":
        raise UsageError(f"{run.tuned.path}: this is an adapter already ({run.plan.format})")
    check_apart(output, run.tuned, run.base)
    for pair in run.pairs:
        if isinstance(pair.update, WholeTensor) and isinstance(pair.update.info, Derived) and pair.update.info.part_of:
            raise UsageError(
                f"{run.tuned.path}: {pair.name!r} is {pair.update.info.how}, of which no adapter is written; leave it "
                "out with --exclude"
            )
    work = _Work(
        run, {"energy": energy, "max_rank": max_rank, "by": by, "use_rslora": use_rslora, "alpha": alpha}, factors=True
    )
    report = work.report(progress)
    for item in report.failed:
        raise UsageError(f"{item['error']}; an adapter without this layer would not be the fine-tune's")
    if report.suggestion is None:
        raise UsageError(f"{run.tuned.path}: no linear layer changed, so there is nothing to extract")
    choices = {choice.name: choice for choice in report.suggestion.choices}
    factors = dict(work.chosen(report))
    along, left_out = _whole(run, set(choices), whole)
    errors = {name: item.relative_error for name, item in factors.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, item in factors.items():
            yield from factor_tensors(name, item.B, item.A).items()
        for key, name in along.keys.items():
            yield key, run.tuned.read(name)

    name, revision = _name_of(base, run.base)
    config = adapter_config(
        report.suggestion.peft_config(),
        base=name,
        task_type=_task(run, along),
        fan_in_fan_out=any(pair.layout == "conv1d" for pair in run.pairs if pair.name in choices),
        whole=along,
    )
    overall = report.suggestion.relative_error
    if revision:
        config["revision"] = revision
    about = f"Over all layers with factors it differs from the fine-tune's change by {overall:.1%} (Frobenius norm)."
    remarks = _resized(run, along)
    folder = write_adapter(output, config=config, tensors=tensors(), remarks=[about, *remarks], force=force)
    return Extraction(folder, report, errors, along.modules, left_out, remarks)


def _name_of(named: Source | None, base: Checkpoint) -> tuple[str, str]:
    """What the written config calls its base, and the revision: a name on the hub as it was given, else the path."""
    if isinstance(base, LiveCheckpoint):
        return base.origin or "", ""
    if not isinstance(named, str) or URL.match(named) or Path(named).exists():
        return str(base.path.resolve()), ""
    name, _, revision = named.partition("@")
    return name, revision


def _resized(run: SingleRun, along: Whole) -> tuple[str, ...]:
    """That the base must be resized before the adapter fits it."""
    carried = set(along.keys.values())
    rows = {
        (pair.stored_shape[0], run.tuned.tensors[pair.update.tensors[0]].shape[0])
        for pair in run.pairs
        if pair.rows is not None and pair.update.tensors[0] in carried
    }
    return tuple(
        f"The fine-tune's vocabulary has {after} rows, the base's {before}: call resize_token_embeddings({after}) on "
        "the base before loading this."
        for before, after in sorted(rows)
    )


class _Work:
    """The layers of one fine-tune gone through, with the factors of each where they are wanted."""

    def __init__(self, run: SingleRun, options: dict[str, Any], *, factors: bool = False):
        self.run, self.options, self.wanted = run, options, factors
        suggest([], **options)  # complains of the options before any work
        self.factors: dict[str, Factors] = {}

    def report(self, progress: Progress | None) -> RankReport:
        run, started = self.run, time.perf_counter()
        layers: dict[str, LayerRank] = {}
        failed: dict[str, dict[str, str]] = {}
        for found in in_order(jobs_of([run]), run.settings, self._layers, progress):
            for pair, item in found:
                if isinstance(item, LayerRank):
                    layers[pair.name] = item
                else:
                    failed[pair.name] = {"name": pair.name, "status": item[0], "error": item[1]}
        ordered = [layers[pair.name] for pair in run.pairs if pair.name in layers]
        others = {*run.base.tensors} | {item.name for item in run.skipped} | set(failed)
        if run.plan.format == "full":  # an adapter's tensors are none of the model's
            others |= set(run.tuned.tensors)
        ranges = ranges_of(run.tuned)
        suggestion = suggest(ordered, **self.options, other_modules=sorted(others | copies(others, ranges)))
        if suggestion is not None and ranges:  # whose layers the names are
            suggestion = replace(suggestion, layer_replication=ranges)
        settings = run.settings.record()
        kept = ("dtype", "device", "threads", "workers", "include", "exclude", "verify")
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
            found = self.factors.pop(choice.name)
            if found.rank != choice.rank:
                pair = pairs[choice.name]
                W0 = Job(((self.run, pair),)).read_base()
                found = low_rank_factors(self.run.weight(pair, W0)[0], choice.rank)
            yield choice.name, found.rescaled(choice.scaling)

    def _layers(self, job: Job) -> list[tuple[LayerPair, LayerRank | tuple[str, str]]]:
        try:
            W0 = job.read_base()
        except LAYER_ERRORS as error:
            problem = job.explain(error)
            return [(pair, problem) for _, pair in job.parts]
        found: list[tuple[LayerPair, LayerRank | tuple[str, str]]] = []
        for run, pair in job.parts:
            try:
                tuned, _ = run.weight(pair, W0)
                with ieee_arithmetic():
                    found.append((pair, self._layer(pair, tuned)))
            except LAYER_ERRORS as error:
                found.append((pair, run.explain(pair, error)))
        return found

    def _layer(self, pair: LayerPair, tuned: TunedWeight) -> LayerRank:
        size = float(torch.linalg.vector_norm(tuned.W0, dtype=torch.float64))

        def made(singular_values: np.ndarray) -> LayerRank:
            found = layer_rank(
                singular_values, pair.shape, name=pair.name, role=pair.role, kind=pair.update.kind,
                trained_rank=pair.update.rank, parameters=pair.update.parameters, base_norm_fro=size,
            )  # fmt: skip
            return replace(found, unnamed=_unnamed(pair), rescaled=rescales_base(pair.update))

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


def _unnamed(pair: LayerPair) -> str | None:
    """Why a layer's weight is no module of the base's own, or None."""
    if isinstance(pair.base, Alternative):
        return OTHER_FORM
    if isinstance(pair.base, Derived) and pair.base.part_of is not None:
        return CUT
    return None if pair.base.name.endswith(".weight") else PARAMETER


def _whole(run: SingleRun, targets: set[str], wanted: bool) -> tuple[Whole, dict[str, str]]:
    """What goes along whole, and tensor → why of what does not."""
    changed: list[str] = []
    chosen_out = {item.name for item in run.skipped if item.reason == LEFT_OUT}
    left_out: dict[str, str] = {}
    for name in run.tuned.tensors:
        if name.removesuffix(".weight") in targets:
            continue
        if name.removesuffix(".weight") in chosen_out:
            left_out[name] = LEFT_OUT
            continue
        base = run.counterpart(name)
        unchanged = (
            base is not None
            and run.tuned.tensors[name].shape == run.base.tensors[base].shape
            and torch.equal(run.tuned.read(name).float(), run.base.read(base).float())
        )
        if not unchanged:
            changed.append(name)
    if not wanted:
        reason = "stays as in the base: factors alone were asked for"
        return Whole((), {}, False, {}), left_out | dict.fromkeys(changed, reason)
    along = whole_modules(changed, run.tuned.tensors, targets, tied_head(run.tuned.config, run.tuned.tensors))
    return along, left_out | dict(along.refused)


def _task(run: SingleRun, along: Whole) -> str | None:
    """PEFT's name of the task, where the head that it then asks for goes along."""
    for name in run.tuned.config.get("architectures") or ():
        for ending, (task, heads) in TASKS.items():
            if str(name).endswith(ending) and any(module.split(".")[-1] in heads for module in along.modules):
                return task
    return None
