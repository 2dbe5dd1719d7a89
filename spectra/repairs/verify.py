"""A written repair held against the fine-tune it was made from: tensor by tensor, weight by weight, file by file."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from spectra.adapters.peft.writing import CONFIG, STORED
from spectra.analysis.layer import checked_question
from spectra.analysis.scaling import edited_dense, edited_update, scaled, uncertainty
from spectra.errors import MissingFileError, UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.files.folders import CARD, RECORD, companions
from spectra.pairing.carried import Carried
from spectra.pairing.pairs import LayerPair, pair_layers
from spectra.records.repair import LayerCheck, LayerRepair, Repair, Verification
from spectra.repairs.choice import Choice
from spectra.repairs.merged import beside, carried_tensors
from spectra.runs.jobs import Job, Problem, as_finished
from spectra.runs.options import CheckOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.run import Run, SingleRun, fingerprint, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import Source
from spectra.sources.saved import load_repair
from spectra.svd import Base
from spectra.svd.triplets import Triplets, leading_triplets
from spectra.updates.algebra import ALL, DenseWeight, FactoredWeight, TunedWeight, slabs
from spectra.updates.products import frobenius_norm

# What storing may cost.  Of factors, relative to the update that they make.  Of whole weights, relative to the weight:
# they are compared with what is rounded likewise, but single values may fall on the other side of a step.
FACTORS = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-3, "BF16": 4e-3}
WHOLE = {"F64": 1e-6, "F32": 1e-6, "F16": 3e-5, "BF16": 3e-4}
RECORDED = 1e-3  # how far a record's singular values and scales may lie from those found
CHOSEN = ("rank_pattern", "alpha_pattern")  # what a repair changes of an adapter's config


@takes_options(CheckOptions)
def verify(
    tuned: str | Path, base: Source | None = None, *, source: Source | None = None, **options: Unpack[CheckOptions]
) -> Verification:
    """Checks a folder that :func:`spectra.repair` wrote against the fine-tune it was made from.

    Every changed weight is computed anew, from the source, by the formula and with the vectors and scales of the
    folder's record, and compared; every other tensor and file must be the source's, bit by bit, but for the model card,
    which is the user's to edit.  Of the record itself, vectors, scales, singular values and fingerprints are checked,
    not its audit.

    Parameters
    ----------
    tuned : the repaired adapter or checkpoint, with its record.
    base, source : where the base and the fine-tune lie; by default where the record says.  A base is told from another
        by the names and shapes of its tensors, and by what the changed weights come to.
    {options}

    Raises
    ------
    SpectraError : no such record, or something that cannot be read.
    """
    folder = Path(tuned)
    record = load_repair(folder)
    settings = checked_settings(**options)
    before = open_run(_place(source, record, folder, "source"), _place(base, record, folder, "base"), settings)
    after = open_run(folder, before.base, settings)
    check = _Check(record, before, after)
    problems = [
        *_identity(before.tuned, record.source, "the source"),
        *_identity(before.base, record.base, "the base"),
        *_identity(after.tuned, record.output or {}, "the result"),
    ]
    jobs = [Job(((before, pair),)) for pair in before.pairs]
    with shown(options["progress"]) as progress:
        layers = list(as_finished(jobs, settings, check.layer, progress))
    problems += check.problems()
    return Verification(str(folder), str(before.tuned.path), tuple(layers), tuple(problems))


def _place(given: Source | None, record: Repair, folder: Path, what: str) -> Source:
    """Where the source or the base lies: as the caller says, as the record says, or from the folder as it was then."""
    if given is not None:
        return given
    path = (record.source if what == "source" else record.base).get("path")
    from_here = (record.output or {}).get(f"{what}_from_here")
    places = [Path(str(path))] + ([folder.resolve() / str(from_here)] if from_here else [])
    for place in places:
        if place.exists():
            return place
    how = f"--{what}"
    raise MissingFileError(str(path), f"the {what} that the record names is not there; say where it is ({how})")


def _identity(checkpoint: Checkpoint, facts: Mapping[str, Any], what: str) -> Iterator[str]:
    """Whether a checkpoint is the one that the record was made with, as far as its fingerprint tells."""
    now = fingerprint(checkpoint, facts.get("fingerprint_covers") == "contents")
    if now["fingerprint_headers"] != facts.get("fingerprint_headers"):
        yield f"{checkpoint.path}: {what} holds other tensors than the record was made with"
    elif "contents" == facts.get("fingerprint_covers") == now["fingerprint_covers"] and now["fingerprint"] != facts.get(
        "fingerprint"
    ):
        yield f"{checkpoint.path}: {what} has other values than when the record was made"


@dataclass(frozen=True, eq=False)
class _Meant:
    """What a weight should be, as stored, and how far from it it may lie (Frobenius norm)."""

    weight: TunedWeight
    tolerance: float


class _Check:
    """The tensors of a written repair, and the weights made of them."""

    def __init__(self, record: Repair, before: SingleRun, after: SingleRun):
        self.record, self.before, self.after = record, before, after
        self.repairs = {layer.name: layer for layer in record.layers}
        self.merged = before.plan.format != "full" and after.plan.format == "full"
        self.source = before.base if self.merged else before.tuned
        by_name = {pair.name: pair for pair in after.pairs}
        by_base = {pair.base.name: pair for pair in after.pairs}
        counterparts = {
            pair.name: by_base.get(pair.base.name) if self.merged else by_name.get(pair.name) for pair in before.pairs
        }
        self.places = {name: pair for name, pair in counterparts.items() if pair is not None}
        if self.merged:  # the merged weight is compared in the orientation that the adapter's has
            own = {pair.name: pair for pair in before.pairs}
            self.places = {
                name: replace(pair, layout=own[name].layout, shape=own[name].shape)
                for name, pair in self.places.items()
            }
        self.carried: tuple[Carried, ...] = ()
        if self.merged:
            pairing = pair_layers(before.base, before.tuned, before.plan)
            self.carried = carried_tensors(before.base, before.tuned, before.plan, pairing)
        self.said: list[str] = []

    def layer(self, job: Job) -> LayerCheck:
        """One weight: its tensors are the same, or its values are what the formula gives."""
        pair = job.first
        repair, mine = self.repairs.get(pair.name), self.places.get(pair.name)
        if mine is None:
            return LayerCheck(pair.name, None, 0.0, False)
        if repair is None and not self.merged:
            same = self._is_same(pair, mine)
            return LayerCheck(pair.name, 0.0 if same else None, 0.0, same)
        there = mine

        def held(base_norm: float, _run: Run, pair: LayerPair, old: TunedWeight, _differs: bool) -> LayerCheck:
            new = self.after.weight(there, old.W0)[0]
            meant = self._meant(old, new, pair, there, repair)
            distance, size = _distance(meant.weight, new)
            size = max(size, base_norm) or 1.0
            error, tolerance = distance / size, meant.tolerance / size
            return LayerCheck(pair.name, error, tolerance, error <= tolerance and self._rows_kept(pair, there))

        ((_, _, outcome),) = job.each(frobenius_norm, held)
        if isinstance(outcome, Problem):
            raise UsageError(outcome.message)
        return outcome

    def _meant(
        self, old: TunedWeight, new: TunedWeight, pair: LayerPair, mine: LayerPair, repair: LayerRepair | None
    ) -> _Meant:
        stored = self.after.tuned.tensors[mine.update.tensors[0]].dtype
        change, off = None, 0.0
        if repair is not None:
            indices, scales = [v.index for v in repair.vectors], np.array([v.scale for v in repair.vectors])
            question = checked_question(1, 0.5, str(self.record.settings["side"]))
            triplets = leading_triplets(Base(old.W0, question.side), old, max(indices) + 1)
            if max(indices) >= triplets.s.size:
                raise UsageError(f"{pair.name}: the record scales vector {max(indices)}, which is in the null space")
            own = triplets.take(indices)
            change, off = scaled(own, scales), 2 * uncertainty(own, scales)
            self._recorded(repair, own, new)
        if self.merged or mine.update.kind == "dense":
            weight: TunedWeight = DenseWeight(old.W0, edited_dense(old, change, STORED[stored]).to(old.W0.dtype))
            return _Meant(weight, off + WHOLE[stored] * frobenius_norm(weight.dense()))
        assert change is not None
        assert isinstance(old, FactoredWeight)
        assert pair.update.scaling is not None
        rank = pair.update.rank if self.record.settings["keep_rank"] else None
        weight = edited_update(old, change, pair.update.scaling, rank=rank, dtype=torch.float64).tuned(old.W0)
        return _Meant(weight, off + FACTORS[stored] * max(weight.delta_norm(), old.delta_norm(), change.norm))

    def _recorded(self, repair: LayerRepair, own: Triplets, new: TunedWeight) -> None:
        """Notes what the record says otherwise of the scaled vectors."""
        image = torch.cat([new.block(rows, ALL) @ own.V for rows in slabs(new.shape[0])])
        got = (own.U * image).sum(0).cpu().numpy() / np.where(own.s > 0, own.s, np.inf)
        choice = Choice(self.record.settings["scale"])
        for vector, sigma, scale in zip(repair.vectors, own.s, got, strict=True):
            close = abs(vector.sigma - sigma) <= RECORDED * sigma and abs(vector.scale_achieved - scale) <= RECORDED
            if not close:
                self.said.append(f"{repair.name}: vector {vector.index} differs from the record")
            if vector.scale != choice.scale_of(repair.name):
                self.said.append(f"{repair.name}: vector {vector.index} has another scale than the record's settings")

    def _is_same(self, pair: LayerPair, mine: LayerPair) -> bool:
        """Whether a layer that was not repaired is stored as it was, but for factors filled up with zeros."""
        if pair.update.tensors != mine.update.tensors:
            return False
        return all(self._is_copied(name) or self._is_padded(name) for name in pair.update.tensors)

    def _is_copied(self, name: str) -> bool:
        """Whether a tensor of the source is there with the same bytes."""
        old, new = self.source.tensors[name], self.after.tuned.tensors.get(name)
        if new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            return False
        return _same_bytes(self.source.read(name), self.after.tuned.read(name))

    def _is_padded(self, name: str) -> bool:
        """Whether a factor has only got the zeros that modules with shared options need."""
        old, new = self.source.read(name), self.after.tuned.read(name)
        if (
            old.dtype != new.dtype
            or old.ndim != new.ndim
            or any(a > b for a, b in zip(old.shape, new.shape, strict=True))
        ):
            return False
        kept = new[tuple(slice(size) for size in old.shape)]
        return _same_bytes(old, kept) and int(new.count_nonzero()) == int(kept.count_nonzero())

    def _rows_kept(self, pair: LayerPair, mine: LayerPair) -> bool:
        """Whether a resized vocabulary's other rows are as they were."""
        if pair.rows is None:
            return True
        if pair.update.kind == "dense":
            name = pair.update.tensors[0]
            return _same_bytes(self.source.read(name)[pair.rows :], self.after.tuned.read(name)[pair.rows :])
        products = []
        for run, own in ((self.before, pair), (self.after, mine)):
            update: Any = own.update.read(run.tuned, own.layout, None, torch.float64, "cpu")
            products.append(update.scaling * update.B @ update.A[:, pair.rows :])
        stored = self.after.tuned.tensors[mine.update.tensors[0]].dtype
        return bool((products[1] - products[0]).norm() <= FACTORS[stored] * products[0].norm())

    def problems(self) -> Iterator[str]:
        """What else is not as it should be."""
        yield from self.said
        copy, pairs = self.after.tuned, self.before.pairs
        for name in self.repairs.keys() - {pair.name for pair in pairs}:
            yield f"{copy.path}: the record repairs {name!r}, which is no layer of the source"
        if bool(self.record.settings["merged"]) != self.merged:
            yield f"{copy.path}: the record's settings say otherwise of whether it is a merge"
        weights = {pair.base.name for pair in pairs} if self.merged else {n for p in pairs for n in p.update.tensors}
        changed = weights | {item.base for item in self.carried}
        for name in self.source.tensors:
            if name not in copy.tensors:
                yield f"{copy.path}: tensor {name!r} is missing"
            elif name not in changed and not self._is_copied(name):
                yield f"{copy.path}: tensor {name!r} is not as in {self.source.path}"
        for name in copy.tensors:
            if name not in self.source.tensors:
                yield f"{copy.path}: tensor {name!r} is not in {self.source.path}"
        yield from self._carried_problems()
        yield from self._file_problems(copy.path if copy.path.is_dir() else copy.path.parent)

    def _carried_problems(self) -> Iterator[str]:
        copy = self.after.tuned
        for item in self.carried:
            if item.base is None or item.base not in copy.tensors:
                continue  # said already
            value = item.read(self.source, self.before.tuned)
            there = copy.read(item.base)
            if there.shape != value.shape or not torch.equal(there, value.to(there.dtype)):
                made = " and ".join(map(repr, item.tensors))
                yield f"{copy.path}: tensor {item.base!r} is not what {made} makes it"

    def _file_problems(self, home: Path) -> Iterator[str]:
        """Files that are not the source's, or that nobody wrote."""
        adapter = self.before.tuned if self.merged else None
        along = (beside(self.source, adapter) if self.after.plan.format == "full" else companions(self.source)).files
        for path in along:
            there = home / path.name
            if not there.is_file():
                yield f"{home}: {path.name} is missing"
            elif path.name == CONFIG:
                yield from self._config_problems()
            elif path.name != CARD and not filecmp.cmp(path, there, shallow=False):
                yield f"{home}: {path.name} is not as in {path.parent}"
        if self.source.in_memory:  # whose config was written
            along = (home / CONFIG,)
            yield from self._config_problems()
        own = {path.name for path in along} | {path.name for path in self.after.tuned.files} | {CARD, RECORD}
        for name in sorted({path.name for path in home.iterdir()} - own):
            yield f"{home}: {name} is not what was written there"

    def _config_problems(self) -> Iterator[str]:
        old, new = self.source.adapter_config or {}, self.after.tuned.adapter_config or {}
        differing = sorted(key for key in old.keys() | new.keys() if key not in CHOSEN and old.get(key) != new.get(key))
        if differing:
            yield f"{self.after.tuned.path}: {CONFIG} differs in {', '.join(differing)}"


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, so that NaN equals itself."""
    parts = [part.contiguous().reshape(-1).view(torch.uint8) for part in (one, other)]
    return one.shape == other.shape and torch.equal(*parts)


def _distance(meant: TunedWeight, new: TunedWeight) -> tuple[float, float]:
    """‖new − meant‖_F and ‖meant‖_F, from exact entries in float64."""
    lost = size = 0.0
    for rows in slabs(meant.shape[0]):
        block = meant.block(rows, ALL)
        lost += float((new.block(rows, ALL) - block).square().sum())
        size += float(block.square().sum())
    return float(np.sqrt(lost)), float(np.sqrt(size))
