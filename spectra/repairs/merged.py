"""Whole checkpoints with some tensors edited in place, and what an adapter carries that merging must not forget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectra.adapters import MethodUpdate, Plan
from spectra.adapters.peft.repaired import why_no_adapter, why_not_writable
from spectra.adapters.peft.tokens import TokensUpdate
from spectra.adapters.peft.writing import CONFIG, STORED, tied_head
from spectra.errors import CorruptFileError, UsageError
from spectra.files.checkpoint import Checkpoint, TensorInfo, read_header
from spectra.files.derived import Derived
from spectra.files.folders import CARD, Companions, check_room, companions, copy_file, is_tokenizer, write_card
from spectra.files.orientation import TIED
from spectra.files.wrapped import by_own_names
from spectra.pairing.carried import Carried, carried_by
from spectra.pairing.pairs import LayerPair, Pairing

SLAB_ELEMENTS = 1 << 22  # converted at once


def beside(source: Checkpoint, adapter: Checkpoint | None = None) -> Companions:
    """What goes along with an edited copy of a checkpoint; with an adapter's tokenizer where one is merged in.

    Neither's model card describes a merge, so that it gets one of its own.
    """
    of_source = companions(source)
    along, left_behind = {path.name: path for path in of_source.files}, dict(of_source.left_behind)
    if along.pop(CONFIG, None) is not None:  # with which the copy would pass for an adapter
        left_behind[CONFIG] = "an adapter's, which lies in the model's folder"
    if adapter is not None:
        if along.pop(CARD, None) is not None:
            left_behind[CARD] = "the base's model card, not the result's"
        own = companions(adapter)
        home = (adapter.files or source.files)[0].absolute().parent
        along |= {path.name: path for path in own.files if is_tokenizer(path)}
        if home != source.files[0].absolute().parent:
            others = {path.name: "the adapter's, not the model's" for path in own.files if not is_tokenizer(path)}
            others = {**own.left_behind, **others}
            others.pop(CONFIG, None)
            left_behind |= {f"{home.name}/{name}": why for name, why in others.items()}
    return Companions(tuple(along.values()), left_behind)


def copy_checkpoint(home: Path, source: Checkpoint, *, adapter: Checkpoint | None = None) -> EditedCheckpoint:
    """Copies a checkpoint, its shards and what goes along (:func:`beside`), so that its tensors can be edited.

    Parameters
    ----------
    home : an empty folder, as :func:`spectra.files.folders.whole_folder` gives it.
    adapter : the one that is merged in.

    Raises
    ------
    UsageError : no room on the disk.
    CorruptFileError : the source changed meanwhile.
    """
    files = (*source.files, *beside(source, adapter).files)
    check_room(home, files)
    for file in files:
        copy_file(file, home / file.name)
    return EditedCheckpoint(home, source, _opened(home, source), adapter)


def _opened(home: Path, source: Checkpoint) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    for file in source.files:
        tensors |= by_own_names(read_header(home / file.name).values())
    for name, info in source.tensors.items():
        if name not in tensors or replace(tensors[name], file=info.file) != info:
            raise CorruptFileError(info.file, "the file changed while it was being read", name)
    path = home if source.path.is_dir() else home / source.path.name
    # Without the time of their files' last change: it is the editing that changes them.
    ordered = {name: replace(tensors[name], stamp=None) for name in source.tensors}
    return Checkpoint(path, source.layout, ordered, source.config)


@dataclass(frozen=True, eq=False)
class EditedCheckpoint:
    """A copy of a checkpoint in which single tensors get new values; layout, dtypes and all other bytes stay.

    Attributes
    ----------
    home : the folder of the copy.
    source : the checkpoint that it is a copy of.
    checkpoint : the copy, opened.  It is read as it is at that moment.
    adapter : the one that is merged in.
    """

    home: Path
    source: Checkpoint
    checkpoint: Checkpoint
    adapter: Checkpoint | None = None

    def put(self, name: str, value: Tensor, *, rows: int | None = None) -> None:
        """Writes a tensor's new values, in the stored orientation, rounded once to the stored dtype.

        ``rows`` are the leading ones that ``value`` has, the others stay.  May be called from several threads.

        Raises
        ------
        UsageError : the shape does not fit, or a finite value is beyond what the dtype can hold.
        """
        info = self.checkpoint.tensors[name]
        shape = info.shape if rows is None else (rows, *info.shape[1:])
        if tuple(value.shape) != shape or (rows is not None and rows > info.shape[0]):
            raise UsageError(f"{self.source.path}: tensor {name!r}: values of {list(value.shape)} for {list(shape)}")
        if not info.is_float:
            raise UsageError(f"{self.source.path}: tensor {name!r} is stored as {info.dtype}, which holds no weights")
        dtype = STORED[info.dtype]
        step = max(1, SLAB_ELEMENTS // max(1, value[:1].numel())) if value.ndim else 1
        slabs = [value[at : at + step] for at in range(0, value.shape[0], step)] if value.ndim else [value]
        with info.file.open("r+b") as file:
            file.seek(info.span[0])
            for slab in slabs:
                stored = slab.to(dtype).contiguous()
                if not bool(stored.isfinite().all()) and bool(slab.isfinite().all()):
                    raise UsageError(
                        f"{self.source.path}: tensor {name!r}: its new values are too large for {info.dtype}"
                    )
                file.write(_bytes(stored))

    def carry(self, tuned: Checkpoint, items: Iterable[Carried]) -> None:
        """Writes what an adapter carries beside its matrices; see :func:`carried_tensors`."""
        for item in items:
            assert item.base is not None
            value, info = item.read(self.source, tuned), self.checkpoint.tensors[item.base]
            if info.is_float:
                self.put(item.base, value)
            else:  # counters and the like, which :func:`carried_tensors` found to be stored alike
                with info.file.open("r+b") as file:
                    file.seek(info.span[0])
                    file.write(_bytes(value))

    def finish(self, *, remarks: Sequence[str] = ()) -> None:
        """Adds ``remarks``, paragraphs, to the model card."""
        base = (self.adapter.adapter_config or {}).get("base_model_name_or_path") if self.adapter else None
        named = [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if isinstance(base, str) and base else []
        write_card(self.home, self.home / CARD, remarks, [*named, "tags:", "- spectra"])


def _bytes(value: Tensor) -> bytes:
    return bytes(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data) if value.numel() else b""


def carried_tensors(base: Checkpoint, tuned: Checkpoint, plan: Plan, pairing: Pairing) -> tuple[Carried, ...]:
    """What merging an adapter must write besides the pairs' own weights: norms and biases, from headers alone.

    ``pairing`` is that of all updates, without ``include`` or ``exclude``; its pairs, matrices of ``modules_to_save``
    among them, are the caller's to write.

    Raises
    ------
    UsageError : the base has no place for something (a new head, a resized vocabulary, a quantised weight, a head that
        shares its embedding's weight); it is named.
    """

    writable = why_no_adapter(plan) is None and any(  # the others stay as they are with --exclude
        why_not_writable(tuned, pair.update, pair.rows) is None for pair in pairing.pairs
    )
    instead = "; write the adapter instead, and merge that with peft" if writable else ""

    def refuse(tensor: str, why: str) -> UsageError:
        return UsageError(f"{tuned.path}: tensor {tensor!r} cannot be merged into {base.path}: {why}{instead}")

    carried = carried_by(base, tuned, plan, pairing, refuse)
    written = {name for pair in pairing.pairs for name in pair.update.tensors}
    reasons = {item.name: item.reason for item in pairing.skipped}
    for pair in pairing.pairs:
        why = _why_not_merged(base, tuned, pair, pairing)
        if why is not None:
            raise refuse(pair.update.tensors[0], why)
    for update in plan.updates:
        if update.tensors[0] not in written:
            raise refuse(update.tensors[0], reasons.get(update.module, "it matches no weight there"))
    for item in carried:
        if item.base is None:
            raise refuse(item.tensors[0], f"there is no {item.name!r}")
        theirs, computed = base.tensors[item.base], bool(item.scaled or item.added)
        for tensor in item.tensors:
            mine = tuned.tensors[tensor]
            if mine.shape != theirs.shape and not (tensor in item.scaled and mine.size == theirs.size):
                raise refuse(tensor, f"its shape is {list(mine.shape)}, that of {item.base!r} {list(theirs.shape)}")
            if (not theirs.is_float or not mine.is_float) and (computed or mine.dtype != theirs.dtype):
                raise refuse(tensor, f"it is stored as {mine.dtype}, {item.base!r} as {theirs.dtype}")
    return tuple(carried)


def _why_not_merged(base: Checkpoint, tuned: Checkpoint, pair: LayerPair, pairing: Pairing) -> str | None:
    if pair.rows is not None:
        return next((note for note in pair.notes if "resized" in note), "its vocabulary was resized")
    if isinstance(pair.base, Derived):
        return f"the base has {pair.base.name!r} as {pair.base.how}"
    why = pair.update.why_not_merged(pair.stored_shape) if isinstance(pair.update, MethodUpdate) else None
    if why is not None:
        return why
    if _are_tied_tokens(tuned, pair, pairing):
        return None
    if pair.tied:
        return f"the head shares {pair.base.name!r} with the embedding, which would change, too"
    heads = tied_head(base.config, base.tensors)
    shared = pair.base.name in heads.values()
    if base.config.get("tie_word_embeddings") is True:
        shared |= pair.role == "head" or pair.base.name.endswith(TIED)
    if shared and not (tuned.adapter_config or {}).get("ensure_weight_tying"):
        return "the base's head and embedding share one weight, so both would change"
    return None


def _are_tied_tokens(tuned: Checkpoint, pair: LayerPair, pairing: Pairing) -> bool:
    """Whether these are the trainable tokens of a shared weight, which peft lets head and embedding have in common."""
    if not isinstance(pair.update, TokensUpdate):
        return False
    for other in pairing.pairs:
        if other is pair or other.base.name != pair.base.name:
            continue
        if not isinstance(other.update, TokensUpdate) or other.update.indices != pair.update.indices:
            return False
        if not torch.equal(tuned.read(other.update.tensors[0]), tuned.read(pair.update.tensors[0])):
            return False
    return True
