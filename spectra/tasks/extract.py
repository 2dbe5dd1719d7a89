"""``extract``: the suggested low-rank adapter written out of a full fine-tune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from spectra.adapters.full import WholeTensor
from spectra.adapters.peft.writing import (
    Whole,
    adapter_config,
    check_folder,
    factor_tensors,
    tied_head,
    whole_modules,
    write_adapter,
)
from spectra.analysis.ranks import ENERGY
from spectra.errors import UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived
from spectra.files.folders import check_apart
from spectra.pairing.pairs import LEFT_OUT
from spectra.records.ranks import RankReport
from spectra.runs.options import ExtractOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.run import SingleRun, check_whole, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.hub import URL
from spectra.sources.live import Source
from spectra.sources.live.memory import LiveCheckpoint
from spectra.tasks.ranks import Ranking

# The heads that PEFT wants in an adapter of a task.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        rank = self.report.suggestion.r if self.report.suggestion else 0
        return f"<Extraction to {self.folder}: rank {rank}, {len(self.relative_errors)} layers>"


@takes_options(ExtractOptions)
def extract(
    tuned: Source,
    base: Source | None = None,
    *,
    to: str | Path,
    energy: float = ENERGY,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    whole: bool = True,
    force: bool = False,
    **options: Unpack[ExtractOptions],
) -> Extraction:
    """Writes the suggested low-rank adapter of a full fine-tune, in PEFT's format.

    Each layer's change is truncated by its singular value decomposition, the best approximation of that rank.

    Parameters
    ----------
    tuned, base : a full fine-tune and the model it was made from, paths or in memory.
    to : the folder to write; it appears whole or not at all.
    energy, max_rank, by, use_rslora, alpha : as for :func:`spectra.ranks`.
    whole : carry what factors cannot (norms, biases, embeddings, new heads) in ``modules_to_save``; else it stays as in
        the base, and is listed in ``left_out``.
    force : replace an adapter folder that is there already.
    {options}

    Raises
    ------
    UsageError : ``tuned`` is an adapter already, nothing would be in the result, or the folder is there.
    SpectraError : as for :func:`spectra.audit`; also where a layer's values are not finite.
    """
    check_folder(to, force=force)
    settings = checked_settings(**options)
    run = open_run(tuned, base, settings)
    check_whole(run, "an adapter")
    if run.plan.format != "full":
        raise UsageError(f"{run.tuned.path}: this is an adapter already ({run.plan.format})")
    check_apart(to, run.tuned, run.base)
    for pair in run.pairs:
        if isinstance(pair.update, WholeTensor) and isinstance(pair.update.info, Derived) and pair.update.info.part_of:
            raise UsageError(
                f"{run.tuned.path}: {pair.name!r} is {pair.update.info.how}, of which no adapter is written; leave it "
                "out with --exclude"
            )
    ranking = Ranking(
        run, {"energy": energy, "max_rank": max_rank, "by": by, "use_rslora": use_rslora, "alpha": alpha}, factors=True
    )
    with shown(options["progress"]) as progress:
        report = ranking.report(progress)
    for item in report.failed:
        raise UsageError(f"{item['error']}; an adapter without this layer would not be the fine-tune's")
    if report.suggestion is None:
        raise UsageError(f"{run.tuned.path}: no linear layer changed, so there is nothing to extract")
    choices = {choice.name: choice for choice in report.suggestion.choices}
    factors = dict(ranking.chosen(report))
    along, left_out = _whole(run, set(choices), whole)
    errors = {name: item.relative_error for name, item in factors.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, item in factors.items():
            yield from factor_tensors(name, item.B, item.A).items()
        for key, name in along.keys.items():
            yield key, run.tuned.read(name)

    name, revision = _name_of(base, run.base)
    config = adapter_config(
        replace(report.suggestion, task_type=None).peft_config(),
        base=name,
        task_type=_task(report.suggestion.task_type, along),
        fan_in_fan_out=any(pair.layout == "conv1d" for pair in run.pairs if pair.name in choices),
        whole=along,
    )
    overall = report.suggestion.relative_error
    if revision:
        config["revision"] = revision
    about = f"Over all layers with factors it differs from the fine-tune's change by {overall:.1%} (Frobenius norm)."
    remarks = _resized(run, along)
    folder = write_adapter(to, config=config, tensors=tensors(), remarks=[about, *remarks], force=force)
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


def _task(task_type: str | None, along: Whole) -> str | None:
    """PEFT's name of the task, where the head that it then asks for goes along."""
    heads = HEADS.get(task_type or "", ())
    return task_type if any(module.split(".")[-1] in heads for module in along.modules) else None
