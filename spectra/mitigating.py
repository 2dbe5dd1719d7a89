"""Repairs from paths: intruder dimensions scaled down, the adapter or checkpoint written, and the result checked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from spectra import __version__
from spectra.adapters.repaired import replaceable, stored_ranks, why_not_writable, write_repaired
from spectra.adapters.writing import STORED
from spectra.analysis import LayerAnalysis
from spectra.editing import Choice, Edited, Scale, Which, edit, parameters_of, subject_of
from spectra.errors import UsageError
from spectra.folders import RECORD, check_apart, check_folder, companions, files_in, whole_folder, write_record
from spectra.layers import LayerPair, pair_layers
from spectra.merging import EditedCheckpoint, carried_tensors
from spectra.mitigation import LayerRepair, Mitigation
from spectra.orientation import as_stored
from spectra.pipeline import Analysis, Result, layer_report, open_cache
from spectra.repair import edited_dense
from spectra.report import LayerReport, Report
from spectra.runs import Job, Progress, SingleRun, checked_settings, fingerprint
from spectra.updates import LowRank, RowScaled, TunedWeight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def mitigate(
    tuned: str | Path,
    output: str | Path | None,
    base: str | Path | None = None,
    *,
    scale: Scale,
    which: Which = "all",
    keep_rank: bool = False,
    merged: bool = False,
    dtype: str | None = None,
    force: bool = False,
    top_k: int = 10,
    epsilon: float = 0.5,
    side: str = "left",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    engine: str = "auto",
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    cache: str | Path | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Mitigation:
    """Scales a fine-tune's intruder dimensions and writes the result, as an adapter or a checkpoint of its own.

    In each weight W1 = W0 + dW the chosen singular values σ become scale·σ; all others, and all singular vectors, stay
    (Shuttleworth et al., arXiv 2410.21228v3, section 5).  The inputs stay as they are.

    Parameters
    ----------
    tuned, base : a fine-tune and the model it was made from, as for :func:`spectra.audit`.
    output : the folder to write; it appears whole or not at all.  None writes nothing.
    scale : 1 changes nothing, 0 removes; or {pattern over module names: scale}, of which the last that matches
        counts.
    which : "all" intruders among the top ``top_k`` vectors, the "top" one of each weight (as in the paper), or
        {pattern: indices} for vectors by name, intruders or not.
    keep_rank : keep the adapter's rank r, by the best approximation of that rank; else a changed layer with q chosen
        vectors has rank r + q, and is exact.
    merged : write an adapter's result into a copy of the base, laid out and stored as the base is.
    dtype : of the factors of changed layers: "float32" (default; "float64" where the adapter is stored so),
        "bfloat16", "float16".  Checkpoints keep theirs.
    force : replace an adapter folder, or an earlier result, that is there already.
    include, exclude : layers left out are carried over as they are.
    top_k, epsilon, side, engine, device, workers, threads, cache, progress : as for :func:`spectra.audit_many`.

    Returns
    -------
    Mitigation : what was scaled, what that changed and how exactly, and the audit of the result.

    Raises
    ------
    UsageError : bad options, a folder that is there already, an output that cannot hold the result.
    SpectraError : as for :func:`spectra.audit_many`; also where a layer could not be analysed.

    Examples
    --------
    >>> import spectra
    >>> planned = spectra.mitigate("fixtures/lora-r4", None, "fixtures/base", scale=0.5)
    >>> planned.intruders_before, len(planned.scaled)
    (35, 35)
    """
    started = time.perf_counter()
    if output is not None:
        check_folder(output, force=force, ours=replaceable)
    choice = Choice(scale, which)
    settings = checked_settings(
        top_k=top_k, epsilon=epsilon, side=side, include=include, exclude=exclude, engine=engine, device=device,
        workers=workers, threads=threads,
    )  # fmt: skip
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r}; expected one of {', '.join(DTYPES)}")
    run = SingleRun(tuned, base, settings)
    choice.check(pair.name for pair in run.pairs)
    with ExitStack() as stack:
        home = None
        if output is not None:
            check_apart(output, run.tuned, run.base)
            home = stack.enter_context(whole_folder(output, force=force, ours=replaceable))
        form: _Form
        if run.plan.format == "full" or merged:
            if keep_rank or dtype is not None:
                given = "keep_rank" if keep_rank else "dtype"
                raise UsageError(f"{given} is for adapters: a checkpoint has no rank, and each weight keeps its dtype")
            form = _CheckpointForm(run, home, merged=run.plan.format != "full")
        else:
            form = _AdapterForm(run, home, None if dtype is None else DTYPES[dtype])
        work = _Work(run, choice, form, keep_rank)
        analysis = Analysis(settings, open_cache(cache), visit=work.visit)
        before = analysis.reports([run], started, progress)[0]
        for layer in before.failed:
            raise UsageError(f"{layer.error}; --exclude {layer.name} carries this layer over as it is")
        repairs = form.records([work.repairs[layer.name] for layer in before.layers if layer.name in work.repairs])
        mitigation = Mitigation(
            base=before.base,
            source={**before.tuned, **fingerprint(run.tuned, verify=True)},
            output=None,
            settings={
                "scale": scale if isinstance(scale, int | float) else dict(scale),
                "which": which if isinstance(which, str) else {key: list(some) for key, some in which.items()},
                "keep_rank": keep_rank, "merged": merged, **settings.record(), "dtype": dtype,
            },
            layers=tuple(repairs),
            audit=None,
            intruders_before=before.total("all"),
            left_behind=form.left_behind,
            remarks=form.remarks,
            spectra_version=__version__,
        )  # fmt: skip
        if home is not None:
            assert output is not None
            mitigation = form.finished(mitigation, before, work.audited, Path(output), analysis)
        mitigation = replace(mitigation, seconds=round(time.perf_counter() - started, 3))
        if home is not None:
            write_record(home, mitigation.to_json())
    return mitigation


class _Work:
    """The layers of one fine-tune gone through: what is chosen is edited and handed to the form it is written in."""

    def __init__(self, run: SingleRun, choice: Choice, form: _Form, keep_rank: bool):
        self.run, self.choice, self.form, self.keep_rank = run, choice, form, keep_rank
        self.repairs: dict[str, LayerRepair] = {}
        self.audited: dict[str, LayerReport] = {}

    def visit(self, pair: LayerPair, tuned: TunedWeight, analysis: LayerAnalysis, result: Result) -> None:
        findings = result.findings
        assert findings is not None
        started = time.perf_counter()
        chosen = self.choice.of(pair.name, findings)
        if not chosen:
            self.form.take(pair, tuned, None)
            return
        self.form.check(pair)
        subject = subject_of(pair, tuned, analysis, findings, chosen)
        edited = edit(
            subject, analysis, dtype=self.form.dtype_of(pair), in_factors=self.form.in_factors(pair),
            keep_rank=self.keep_rank,
        )  # fmt: skip
        self.form.take(pair, tuned, edited)
        self.repairs[pair.name] = edited.record
        self.audited[pair.name] = layer_report(self.run, pair, edited.findings, False, time.perf_counter() - started)


class _Form(Protocol):
    """How a result is written; without a ``home`` nothing is."""

    left_behind: Mapping[str, str]
    remarks: tuple[str, ...]

    def in_factors(self, pair: LayerPair) -> bool: ...
    def dtype_of(self, pair: LayerPair) -> torch.dtype: ...
    def check(self, pair: LayerPair) -> None:
        """Raises UsageError where this layer's result could not be written."""
        ...

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> None:
        """Writes or keeps a layer; None: it stays as it is."""
        ...

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        """The records, with what storing changes of them."""
        ...

    def finished(
        self,
        mitigation: Mitigation,
        before: Report,
        audited: Mapping[str, LayerReport],
        output: Path,
        analysis: Analysis,
    ) -> Mitigation:
        """Writes the rest; the record with what was written, and its audit."""
        ...  # fmt: skip


class _AdapterForm:
    """A PEFT adapter as the source is one."""

    remarks: tuple[str, ...] = ()

    def __init__(self, run: SingleRun, home: Path | None, dtype: torch.dtype | None):
        self.run, self.home, self.dtype = run, home, dtype
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
        if why is not None:
            raise UsageError(f"{self.run.tuned.path}: {pair.name}: {why}")

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> None:
        if edited is None:
            return
        if edited.update is not None:
            self.changed[pair.update.module] = edited.update
        elif edited.dense is not None and self.home is not None:
            self.whole[pair.update.tensors[0]] = as_stored(edited.dense, pair.layout, pair.analysed_shape)

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        new = {module: update.A.shape[0] for module, update in self.changed.items()}
        stored = stored_ranks(self.run.tuned, self.run.plan, new)
        modules = {pair.name: pair.update for pair in self.run.pairs}
        found = []
        for repair in repairs:
            rank = stored.get(modules[repair.name].module, repair.rank_after)
            if rank is not None and rank != repair.rank_after:
                repair = replace(
                    repair, rank_after=rank, parameters_after=parameters_of(modules[repair.name], repair.shape[0], rank)
                )
            found.append(repair)
        return found

    def finished(
        self, mitigation: Mitigation, before: Report, audited: Mapping[str, LayerReport], output: Path,
        analysis: Analysis,
    ) -> Mitigation:  # fmt: skip
        assert self.home is not None
        remarks = card_section(mitigation) if mitigation.changed else ()
        write_repaired(self.home, self.run.tuned, self.run.plan, self.changed, whole=self.whole, remarks=remarks)
        return _with_audit(mitigation, self.run, before, audited, self.home, output)


class _CheckpointForm:
    """A whole checkpoint: an edited copy of the fine-tune, or of the base with an adapter merged in."""

    def __init__(self, run: SingleRun, home: Path | None, *, merged: bool):
        self.run, self.home, self.merged = run, home, merged
        self.source = run.base if merged else run.tuned
        self.remarks: tuple[str, ...] = ("An adapter's update, merged into its base.",) if merged else ()
        self.pairing = pair_layers(run.base, run.tuned, run.plan) if merged else None
        if self.pairing is not None:
            self.carried = carried_tensors(run.base, run.tuned, run.plan, self.pairing)
        if home is None:
            self.left_behind = companions(self.source).left_behind
            return
        self.copy = EditedCheckpoint(home, self.source, tokenizer=run.tuned if merged else None)
        self.left_behind = self.copy.left_behind

    def in_factors(self, pair: LayerPair) -> bool:
        return False

    def _name(self, pair: LayerPair) -> str:
        return pair.base.name if self.merged else pair.update.tensors[0]

    def dtype_of(self, pair: LayerPair) -> torch.dtype:
        return STORED[self.source.tensors[self._name(pair)].dtype]

    def check(self, pair: LayerPair) -> None:
        pass

    def take(self, pair: LayerPair, tuned: TunedWeight, edited: Edited | None) -> None:
        if self.home is None or (edited is None and not self.merged):
            return
        dense = edited_dense(tuned, None, self.dtype_of(pair)) if edited is None else edited.dense
        assert dense is not None
        self.copy.put(self._name(pair), as_stored(dense, pair.layout, pair.analysed_shape), rows=pair.rows)

    def records(self, repairs: list[LayerRepair]) -> list[LayerRepair]:
        return repairs

    def finished(
        self, mitigation: Mitigation, before: Report, audited: Mapping[str, LayerReport], output: Path,
        analysis: Analysis,
    ) -> Mitigation:  # fmt: skip
        assert self.home is not None
        if self.pairing is not None:
            analysed = {pair.name for pair in self.run.pairs}
            for pair in self.pairing.pairs:
                if pair.name not in analysed:
                    W0 = Job(((self.run, pair),)).read_base()
                    self.take(pair, self.run.weight(pair, W0)[0], None)
            self.copy.carry(self.run.tuned, self.carried)
        changed = mitigation.changed or self.merged
        self.copy.finish(remarks=card_section(mitigation) if changed else ())
        if not self.merged:
            return _with_audit(mitigation, self.run, before, audited, self.home, output)
        run = SingleRun(self.home, self.run.base.path, self.run.settings)
        audit = replace(analysis, visit=None).reports([run], time.perf_counter())[0]
        return _with_output(mitigation, replace(audit, tuned={**audit.tuned, "path": str(output)}), self.home)


def _with_audit(
    mitigation: Mitigation, run: SingleRun, before: Report, audited: Mapping[str, LayerReport], home: Path,
    output: Path,
) -> Mitigation:  # fmt: skip
    """With the audit of what was written: changed layers were analysed as they are stored, the others are as before."""
    # Adapters are small, so that every byte can enter the fingerprint.
    written = SingleRun(home, run.base.path, replace(run.settings, verify=run.plan.format != "full"))
    pairs = {pair.name: pair for pair in written.pairs}
    layers = [
        replace(audited.get(layer.name, layer), update=written.update(pairs[layer.name])) for layer in before.layers
    ]
    tuned = {**written.facts(), "path": str(output)}
    skipped = tuple(asdict(item) for item in written.skipped)
    return _with_output(mitigation, replace(before, tuned=tuned, layers=tuple(layers), skipped=skipped), home)


def _with_output(mitigation: Mitigation, audit: Report, home: Path) -> Mitigation:
    return replace(mitigation, audit=audit, output={**audit.tuned, "files": files_in(home)})


def card_section(mitigation: Mitigation) -> tuple[str, ...]:
    """What the model card says of the repair, in paragraphs."""
    summary, settings = mitigation.summary, mitigation.settings
    scales = sorted({vector.scale for vector in mitigation.scaled})
    by = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}" if scales else "1"
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
    lines.append(
        f"Nothing was trained. `{RECORD}` has the details; made by Spectra {mitigation.spectra_version}, and "
        "`spectra mitigate --verify` checks it against the adapter or checkpoint it was made from."
    )
    return (*lines, *mitigation.remarks)
