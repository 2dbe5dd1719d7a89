"""A written repair held against the fine-tune it was made from, tensor by tensor and weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectra.adapters.writing import STORED
from spectra.analysis import checked_question, ieee_arithmetic
from spectra.checkpoint import Checkpoint
from spectra.errors import LAYER_ERRORS, MissingFileError, UsageError, in_short
from spectra.layers import LayerPair, pair_layers
from spectra.merging import Carried, carried_tensors
from spectra.mitigation import LayerCheck, LayerRepair, Mitigation, Verification, load_mitigation
from spectra.repair import Change, edited_update, scaled
from spectra.runs import Job, Progress, SingleRun, checked_settings, fingerprint, in_order
from spectra.svd import Base
from spectra.svd.triplets import leading_triplets
from spectra.updates import ALL, FactoredWeight, TunedWeight, slabs

TOLERANCE = 1e-5  # of a weight, relative to its norm, where float32 is stored; else what the dtype rounds to
CHOSEN = ("rank_pattern", "alpha_pattern")  # what a repair changes of an adapter's config


def verify_mitigation(
    folder: str | Path,
    source: str | Path | None = None,
    base: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks a folder that :func:`spectra.mitigate` wrote against the fine-tune it was made from.

    Every changed weight is computed anew, from the source, by the formula and with the vectors and scales of the
    folder's record, and compared; every other tensor must be the source's, bit by bit, and so must the config.

    Parameters
    ----------
    folder : the repaired adapter or checkpoint, with its record.
    source, base : where the fine-tune and its base lie; by default where the record says.

    Raises
    ------
    SpectraError : no such record, or something that cannot be read.
    """
    folder = Path(folder)
    record = load_mitigation(folder)
    settings = checked_settings(device=device, threads=threads)
    before = SingleRun(_place(source, record.source, "source"), _place(base, record.base, "base"), settings)
    after = SingleRun(folder, before.base.path, settings)
    check = _Check(record, before, after)
    problems = [*_identity(before.tuned, record.source, "the source"), *_identity(before.base, record.base, "the base")]
    layers = list(in_order(check.jobs, settings, check.layer, progress))
    problems += check.problems()
    return Verification(str(folder), str(before.tuned.path), tuple(layers), tuple(problems))


def _place(given: str | Path | None, facts: Mapping[str, Any], what: str) -> str | Path:
    path = given or facts.get("path")
    if path is None or (given is None and not Path(str(path)).exists()):
        raise MissingFileError(str(path), f"the {what} that the record names is not there; name where it lies now")
    return str(path)


def _identity(found: Checkpoint, facts: Mapping[str, Any], what: str) -> Iterator[str]:
    """Whether a checkpoint is the one that the record was made with, as far as its fingerprint tells."""
    now = fingerprint(found, facts.get("fingerprint_covers") == "contents")
    if now["fingerprint_headers"] != facts.get("fingerprint_headers"):
        yield f"{found.path}: {what} holds other tensors than the record was made with"
    elif now["fingerprint_covers"] == facts.get("fingerprint_covers") and now["fingerprint"] != facts["fingerprint"]:
        yield f"{found.path}: {what} holds other values than the record was made with"


# What a weight should be: an operator and what comes on top of it.
Meant: TypeAlias = tuple[TunedWeight, Change | None]


class _Check:
    """The tensors of a written repair, and the weights made of them."""

    def __init__(self, record: Mitigation, before: SingleRun, after: SingleRun):
        self.record, self.before, self.after = record, before, after
        self.repairs = {layer.name: layer for layer in record.layers}
        self.merged = before.plan.format != "full" and after.plan.format == "full"
        self.source = before.base if self.merged else before.tuned
        places = {pair.name: pair for pair in after.pairs}
        at = {pair.base.name: pair for pair in after.pairs}
        self.places = {
            pair.name: at[pair.base.name] if self.merged else places[pair.name]
            for pair in before.pairs
            if (pair.base.name in at if self.merged else pair.name in places)
        }
        self.jobs = [Job(((before, pair),)) for pair in before.pairs]
        self.carried: tuple[Carried, ...] = ()
        if self.merged:
            pairing = pair_layers(before.base, before.tuned, before.plan)
            self.carried = carried_tensors(before.base, before.tuned, before.plan, pairing)

    def layer(self, job: Job) -> LayerCheck:
        """One weight: its tensors are the same, or its values are what the formula gives."""
        pair = job.first
        repair, mine = self.repairs.get(pair.name), self.places.get(pair.name)
        if mine is None:
            return LayerCheck(pair.name, None, TOLERANCE, False)
        tolerance = self._tolerance(mine)
        if repair is None and not self.merged and self._same(pair, mine):
            return LayerCheck(pair.name, 0.0, tolerance, True)
        try:
            W0 = job.read_base()
            old, new = self.before.weight(pair, W0)[0], self.after.weight(mine, W0)[0]
            with ieee_arithmetic():
                error = _distance(self._meant(old, pair, repair), new)
        except LAYER_ERRORS as problem:
            raise UsageError(f"{pair.name}: {in_short(problem)}") from None
        return LayerCheck(pair.name, error, tolerance, error <= tolerance)

    def _tolerance(self, pair: LayerPair) -> float:
        stored = STORED[self.after.tuned.tensors[pair.update.tensors[0]].dtype]
        half = stored in (torch.bfloat16, torch.float16)
        return float(torch.finfo(stored).eps) if half else TOLERANCE

    def _same(self, pair: LayerPair, mine: LayerPair) -> bool:
        return pair.update.tensors == mine.update.tensors and all(map(self._is_copied, pair.update.tensors))

    def _is_copied(self, name: str) -> bool:
        """Whether a tensor of the source is there with the same bytes."""
        old, new = self.source.tensors[name], self.after.tuned.tensors.get(name)
        if new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            return False
        return _bytes_equal(self.source.read(name), self.after.tuned.read(name))

    def _meant(self, old: TunedWeight, pair: LayerPair, repair: LayerRepair | None) -> Meant:
        if repair is None:
            return old, None
        indices = [vector.index for vector in repair.vectors]
        question = checked_question(1, 0.5, str(self.record.settings["side"]))
        triplets = leading_triplets(Base(old.W0, question.side), old, max(indices) + 1)
        if max(indices) >= triplets.s.size:
            raise UsageError(f"{pair.name}: the record scales vector {max(indices)}, which is in the null space")
        change = scaled(triplets.take(indices), np.array([vector.scale for vector in repair.vectors]))
        if not self.record.settings["keep_rank"] or not isinstance(old, FactoredWeight):
            return old, change
        assert pair.update.scaling is not None
        best = edited_update(old, change, pair.update.scaling, rank=pair.update.rank, dtype=torch.float64)
        return best.tuned(old.W0), None

    def problems(self) -> Iterator[str]:
        """What else is not as it should be."""
        copy, pairs = self.after.tuned, self.before.pairs
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
        configs = [
            {key: value for key, value in config.items() if key not in CHOSEN}
            for config in (self.source.adapter_config or self.source.config, copy.adapter_config or copy.config)
        ]
        differing = sorted(
            key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)
        )
        if differing:
            yield f"{copy.path}: the config differs in {', '.join(differing)}"
        home = copy.path if copy.path.is_dir() else copy.path.parent
        for name in (self.record.output or {}).get("files", ()):
            if not (home / str(name)).exists():
                yield f"{home}: {name} is missing"

    def _carried_problems(self) -> Iterator[str]:
        copy = self.after.tuned
        for item in self.carried:
            if item.base not in copy.tensors:
                continue  # said already
            value = self.before.tuned.read(item.tensor).double()
            if item.scaling is not None:
                value = self.source.read(item.base).double() + item.scaling * value
            there = copy.read(item.base)
            if there.shape != value.shape or not torch.equal(there, value.to(there.dtype)):
                yield f"{copy.path}: tensor {item.base!r} is not what {item.tensor!r} makes it"


def _bytes_equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, so that NaN equals itself."""
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _distance(meant: Meant, found: TunedWeight) -> float:
    """‖found − meant‖_F/‖meant‖_F, from exact entries in float64."""
    weight, change = meant
    lost = size = 0.0
    for rows in slabs(weight.shape[0]):
        block = weight.block(rows, ALL)
        if change is not None:
            block = torch.addmm(block, change.B[rows], change.A)
        lost += float((found.block(rows, ALL) - block).square().sum())
        size += float(block.square().sum())
    return float(np.sqrt(lost / size)) if size > 0 else float(np.sqrt(lost))
