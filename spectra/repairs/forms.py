"""How a repair is written: as the adapter that it was, or as a checkpoint; and the audit of what was written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spectra.adapters import Skipped, WholeTensor
from spectra.adapters.peft.repaired import stored_ranks, why_no_adapter, why_not_writable, write_repaired
from spectra.adapters.peft.tokens import TokensUpdate
from spectra.adapters.peft.writing import STORED
from spectra.analysis.layer import Findings
from spectra.errors import UsageError
from spectra.files.derived import Derived
from spectra.files.folders import RECORD, companions, files_in
from spectra.files.headers import ForeignTensor
from spectra.files.orientation import as_stored
from spectra.pairing.pairs import LEFT_OUT, LayerPair, pair_layers
from spectra.records.repair import LayerRepair, Repair
from spectra.records.report import LayerReport, Report
from spectra.repairs.choice import Edited, parameters_of, whole_weight
from spectra.repairs.merged import EditedCheckpoint, beside, carried_tensors, copy_checkpoint
from spectra.runs.jobs import read_weight
from spectra.runs.reports import layer_report
from spectra.runs.run import SingleRun, open_run
from spectra.updates.algebra import DenseWeight, LowRank, RowScaled, TunedWeight


class Form(Protocol):
    """How a result is written; without a home nothing is."""

    merged: bool
    left_behind: Mapping[str, str]

    def in_factors(self, pair: LayerPair) -> bool: ...
    def dtype_of(self, pair: LayerPair) -> torch.dtype: ...
    def check(self, pair: LayerPair) -> None:
        """Raises UsageError where an edited layer could not be written."""
        ...

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> TunedWeight | None:
        """Writes or keeps a layer, which stays as it is where ``edited`` is None; the weight, if storing changes it."""
        ...

    def advice(self, failed: Sequence[LayerReport]) -> str:
        """What to do where layers could not be analysed."""
        ...

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        """The records, with what storing changes of them."""
        ...

    def finished(self, record: Repair, before: Report, audited: Mapping[str, LayerReport], output: Path) -> Repair:
        """Writes the rest; the record with what was written, and its audit.

        ``before`` is the source's audit, ``audited`` has the layers that are not as before, as they are stored.
        """
        ...


class AdapterForm:
    """A PEFT adapter as the source is one."""

    merged = False

    def __init__(self, run: SingleRun, home: Path | None, dtype: torch.dtype | None, keep_rank: bool):
        why = why_no_adapter(run.plan)
        if why is not None:
            raise UsageError(f"{run.tuned.path}: {why}{_or_merged(run)}")
        if run.tuned.rescaled:
            raise UsageError(
                f"{run.tuned.path}: it is scaled in the running model ({next(iter(run.tuned.rescaled))} and others), "
                "which an adapter's config cannot say; reset that (unscale_layer), or repair the saved adapter"
            )
        self.run, self.home, self.dtype, self.keep_rank = run, home, dtype, keep_rank
        self.changed: dict[str, LowRank | RowScaled] = {}
        self.whole: dict[str, Tensor] = {}
        self.left_behind = companions(run.tuned).left_behind

    def in_factors(self, pair: LayerPair) -> bool:
        return pair.update.kind != "dense"

    def dtype_of(self, pair: LayerPair) -> torch.dtype:
        stored = STORED[self.run.tuned.tensors[pair.update.tensors[0]].dtype]
        if not self.in_factors(pair):
            return stored
        return self.dtype or (torch.float64 if stored == torch.float64 else torch.float32)

    def check(self, pair: LayerPair) -> None:
        why = why_not_writable(self.run.tuned, pair.update, pair.rows)
        if isinstance(pair.update, TokensUpdate):
            why = "it is stored as the rows of some tokens, which a repair is not; exclude it"
            if pair.update.why_not_merged(pair.stored_shape) is None:
                why += ", or use --merged"
        if why is None and self.keep_rank and self.in_factors(pair) and pair.rows is not None:
            why = "at its old rank it could not keep what the adapter adds to the rows that the base does not have"
        if why is not None:
            raise UsageError(f"{self.run.tuned.path}: {pair.name}: {why}")

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> TunedWeight | None:
        if edited is not None and edited.update is not None:
            self.changed[pair.update.module] = edited.update
        elif edited is not None and edited.dense is not None and self.home is not None:
            self.whole[pair.update.tensors[0]] = as_stored(edited.dense, pair.layout, pair.analysed_shape)
        return None

    def advice(self, failed: Sequence[LayerReport]) -> str:
        return _carry(failed)

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        new = {module: update.A.shape[0] for module, update in self.changed.items()}
        stored = stored_ranks(self.run.tuned, self.run.plan, new)
        updates = {pair.name: pair.update for pair in self.run.pairs}
        records = []
        for repair in repairs:
            update = updates[repair.name]
            rank = stored.get(update.module, repair.rank_after)
            if rank is not None and rank != repair.rank_after:
                parameters = parameters_of(update, repair.shape[0], rank)
                repair = replace(repair, rank_after=rank, parameters_after=parameters)
            records.append(repair)
        return records

    def finished(self, record: Repair, before: Report, audited: Mapping[str, LayerReport], output: Path) -> Repair:
        assert self.home is not None
        remarks = card_section(record) if record.changed else ()
        write_repaired(self.home, self.run.tuned, self.run.plan, self.changed, whole=self.whole, remarks=remarks)
        # Adapters are small, so that every byte can enter the fingerprint.
        written = open_run(self.home, self.run.base, replace(self.run.settings, hash_contents=True))
        return _audited_by_name(record, self.run, written, before, audited, self.home, output)


def begin_checkpoint(run: SingleRun, home: Path | None, *, merged: bool) -> CheckpointForm:
    """The form of a checkpoint; where there is a home, the copy that is edited is made there."""
    form = CheckpointForm(run, home, merged=merged)
    if home is not None:
        form.copy = copy_checkpoint(home, form.source, adapter=run.tuned if merged else None)
    return form


class CheckpointForm:
    """A whole checkpoint: an edited copy of the fine-tune, or of the base with an adapter merged in.

    :func:`begin_checkpoint` makes the ``copy``; without a home there is none.
    """

    copy: EditedCheckpoint

    def __init__(self, run: SingleRun, home: Path | None, *, merged: bool):
        self.run, self.home, self.merged = run, home, merged
        self.source = run.base if merged else run.tuned
        self.pairing = pair_layers(run.base, run.tuned, run.plan) if merged else None
        if self.pairing is not None:
            self.carried = carried_tensors(run.base, run.tuned, run.plan, self.pairing)
        for pair in () if merged else run.pairs:
            if isinstance(pair.update, WholeTensor) and isinstance(pair.update.info, Derived):
                how = pair.update.info.how
                raise UsageError(f"{run.tuned.path}: tensor {pair.name!r} is stored as {how}, which is not written")
        if self.source.in_memory and home is not None:
            raise UsageError(
                f"{self.source.path}: a model in memory is not written as a checkpoint; save it with save_pretrained "
                "and name the folder, or write nothing (None)"
            )
        foreign = next((info for info in self.source.tensors.values() if isinstance(info, ForeignTensor)), None)
        if foreign is not None and not self.source.in_memory:
            raise UsageError(
                f"{foreign.file}: only single models in safetensors are written; of a pipeline, name the model, and of "
                "another format, convert it first"
            )
        adapter = run.tuned if merged else None
        self.left_behind = beside(self.source, adapter).left_behind

    def in_factors(self, pair: LayerPair) -> bool:
        return False

    def _name(self, pair: LayerPair) -> str:
        return pair.base.name if self.merged else pair.update.tensors[0]

    def dtype_of(self, pair: LayerPair) -> torch.dtype:
        return STORED[self.source.tensors[self._name(pair)].dtype]

    def check(self, pair: LayerPair) -> None:
        pass

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> TunedWeight | None:
        if edited is None and (not self.merged or self.home is None):
            return None
        dense = whole_weight(pair, tuned, None, self.dtype_of(pair)) if edited is None else edited.dense
        assert dense is not None
        if self.home is not None:
            self.copy.put(self._name(pair), as_stored(dense, pair.layout, pair.analysed_shape), rows=pair.rows)
        return DenseWeight(tuned.W0, dense.to(tuned.W0.dtype))

    def advice(self, failed: Sequence[LayerReport]) -> str:
        return "" if self.merged else _carry(failed)

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        return repairs

    def finished(self, record: Repair, before: Report, audited: Mapping[str, LayerReport], output: Path) -> Repair:
        assert self.home is not None
        if self.pairing is None:
            self.copy.finish(remarks=card_section(record) if record.changed else ())
            written = open_run(self.home, self.run.base, self.run.settings)
            return _audited_by_name(record, self.run, written, before, audited, self.home, output)
        analysed = {pair.name for pair in self.run.pairs}
        left_out = [pair for pair in self.pairing.pairs if pair.name not in analysed]
        for pair in left_out:
            self.take(pair, read_weight(self.run, pair), None)
        self.copy.carry(self.run.tuned, self.carried)
        self.copy.finish(remarks=card_section(record))
        written = open_run(self.home, self.run.base, self.run.settings)
        reports = {pair.base.name: audited[pair.name] for pair in self.run.pairs}
        layers, skipped = [], list(written.skipped)
        for pair in written.pairs:
            if pair.base.name in reports:
                mine = layer_report(written, pair, Findings("unchanged", pair.shape), False, 0.0)
                own = {name: getattr(mine, name) for name in ("name", "module_type", "role", "update")}
                layers.append(replace(reports[pair.base.name], **own))
            elif pair.base.name in {other.base.name for other in left_out}:
                skipped.append(Skipped(pair.name, LEFT_OUT, "left_out", pair.update.parameters))
            else:  # copied
                layers.append(layer_report(written, pair, Findings("unchanged", pair.shape), False, 0.0))
        return _with_audit(record, self.run, written, before, layers, skipped, self.home, output)


def _or_merged(run: SingleRun) -> str:
    """The advice to merge an adapter that is not written as one, or why it cannot be merged either."""
    try:
        CheckpointForm(run, None, merged=True)
    except UsageError as error:
        return f", and --merged does not work either: {error}"
    return "; use --merged"


def _carry(failed: Sequence[LayerReport]) -> str:
    return "; carried over as they are with " + " ".join(f"--exclude {layer.name}" for layer in failed)


def _audited_by_name(
    record: Repair, run: SingleRun, written: SingleRun, before: Report, audited: Mapping[str, LayerReport],
    home: Path, output: Path,
) -> Repair:  # fmt: skip
    """Changed layers were analysed as they are stored, the others are as before."""
    pairs = {pair.name: pair for pair in written.pairs}
    layers = [
        replace(audited.get(layer.name, layer), update=written.update(pairs[layer.name])) for layer in before.layers
    ]
    return _with_audit(record, run, written, before, layers, written.skipped, home, output)


def _with_audit(
    record: Repair, run: SingleRun, written: SingleRun, before: Report, layers: Sequence[LayerReport],
    skipped: Sequence[Skipped], home: Path, output: Path,
) -> Repair:  # fmt: skip
    tuned = {**written.facts(), "path": str(output)}
    audit = replace(before, tuned=tuned, layers=tuple(layers), skipped=tuple(asdict(item) for item in skipped))
    here = {"source_from_here": (record.source, run.tuned), "base_from_here": (record.base, run.base)}
    ways = {key: None if read.in_memory else _relative(facts["path"], output) for key, (facts, read) in here.items()}
    return replace(record, audit=audit, output={**tuned, **ways, "files": files_in(home)})


def _relative(path: str, home: Path) -> str | None:
    """The way from a folder to a path, which stays true where both are moved together."""
    try:
        return os.path.relpath(Path(path).resolve(), home.resolve())
    except ValueError:  # on another drive
        return None


def card_section(record: Repair) -> tuple[str, ...]:
    """What the model card says of the repair, in paragraphs."""
    summary, settings = record.summary, record.settings
    about = (
        f"`{RECORD}` has the details; made by Spectra {record.spectra_version}, and `spectra verify` "
        "checks it against what it was made from."
    )
    merged = ("## An adapter merged into its base",) if settings["merged"] else ()
    if not record.changed:
        return (*merged, about)
    scales = sorted({vector.scale for vector in record.scaled})
    by = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    change = summary["update_change"]
    what = (
        f"{summary['vectors_scaled']} singular vectors of the tuned weights ({summary['intruders_scaled']} intruder "
        f"dimensions: among the top {settings['top_k']} and with |cos| below {settings['epsilon']:g} to every singular "
        f"vector of the base) in {summary['layers_changed']} layers had their singular values multiplied by {by}: "
        "W' = W + (scale - 1) * sum(sigma * u * v^T), after Shuttleworth et al., arXiv 2410.21228."
    )
    lines = ["## Intruder dimensions scaled", what]
    if change is not None:
        lines.append(f"This changed the update of these layers by {change:.1%} (Frobenius norm).")
    if settings["keep_rank"]:
        lines.append("The rank was kept, by the best approximation of that rank.")
    return (*merged, *lines, f"Nothing was trained. {about}")
