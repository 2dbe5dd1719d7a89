"""Base and fine-tune matched into layer pairs, and everything else accounted for.

Matching uses headers only, so every name, shape and dtype of a run is checked before the first
decomposition.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.adapters import InitialisedUpdate, MethodUpdate, Plan, PlannedUpdate, Skipped, WholeTensor
from spectra.adapters.full import BUFFERS
from spectra.adapters.peft.keys import BIAS_OF_B, plain_name
from spectra.adapters.peft.lora import LoraUpdate
from spectra.adapters.peft.vera import with_projections
from spectra.errors import AdapterError, WrongBaseError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Alternative, Derived, Unreadable, Weight
from spectra.files.gguf.names import keeps_ggufs_names
from spectra.files.orientation import Layout, Orientation, Role, as_matrix, matrix_shape, role_of
from spectra.files.stored.rows import Rows, footprint, overlap, own_name
from spectra.pairing.fused import against_split
from spectra.pairing.names import NameMatcher
from spectra.pairing.relatives import Relatives, is_new_head

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import Update

LEFT_OUT = "left out by --include or --exclude"
NEW_HEAD = "new module: the base has no such weight"
NO_SUCH_WEIGHT = "the base has no weight of this name"


@dataclass(frozen=True)
class LayerPair:
    """One base weight and the update that belongs to it.

    ``shape`` is (out, in) as analysed, ``stored_shape`` as on disk; ``rows`` limits both sides to
    the leading rows they share where a vocabulary was resized.  ``tied`` marks a head that has no
    tensor of its own, ``float64`` weights stored in float64, which float32 would round.
    """

    name: str
    base: Weight
    update: PlannedUpdate
    layout: Layout
    role: Role
    shape: tuple[int, int]
    rows: int | None = None
    tied: bool = False
    float64: bool = False
    notes: tuple[str, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def analysed_shape(self) -> tuple[int, ...]:
        """The stored shape, or that of the leading rows that are analysed."""
        return self.stored_shape if self.rows is None else (self.rows, *self.stored_shape[1:])

    @property
    def base_key(self) -> tuple[str, Layout, int | None]:
        """Pairs with the same key share the same W0."""
        return own_name(self.base), self.layout, self.rows

    @property
    def made(self) -> Derived | None:
        """The fine-tune's own weight where it is no stored tensor, but made of some."""
        info = self.update.info if isinstance(self.update, WholeTensor) else None
        return info if isinstance(info, Derived) else None

    def read_base(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Tensor:
        """W0 as analysed, upcast to ``dtype`` before any arithmetic."""
        stored = checkpoint.load(self.base, rows=self.rows)
        return as_matrix(stored.to(device=device, dtype=dtype), self.layout)

    def read_update(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Update:
        return self.update.read(checkpoint, self.layout, self.rows, dtype, device)

    def base_copy_differs(self, checkpoint: Checkpoint, W0: Tensor) -> bool:
        """Whether the copy of the base that came with the adapter is another weight than W0."""
        if self.update.base_copy is None:
            return False
        stored = checkpoint.read(self.update.base_copy, digest=True)[: self.rows]
        copy = as_matrix(stored.to(device=W0.device, dtype=W0.dtype), self.layout)
        # Copies are often kept in half precision; anything beyond that rounding is another base.
        return copy.shape != W0.shape or bool((copy - W0).norm() > 1e-2 * W0.norm())


@dataclass(frozen=True)
class Pairing:
    """Every pair to analyse and everything that is not, each with its reason.

    ``counterpart`` gives, for the name of any tensor of the fine-tuned model, the base's tensor that corresponds to it,
    by the names that the pairs were matched under; None where the base has none, or several could be meant.
    ``plan`` is what was matched: the fine-tune's updates as the base tells and splits them.
    """

    pairs: tuple[LayerPair, ...]
    skipped: tuple[Skipped, ...]
    counterpart: Callable[[str], str | None]
    plan: Plan

    @property
    def why_empty(self) -> str:
        """The reasons for which nothing is left to analyse, where nothing is."""
        first = {item.reason: item.name for item in reversed(self.skipped)}
        reasons = [f"{why}, such as {first[why]!r}" if why == LEFT_OUT else why for why in sorted(first)]
        return "; ".join(reasons[:3]) or "no tensors"


def pair_layers(
    base: Checkpoint,
    tuned: Checkpoint,
    plan: Plan,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Pairing:
    """Finds the base weight of every planned update, one to one.

    ``include`` and ``exclude`` are shell patterns over module names; a name that contains a
    pattern's match counts.

    Raises
    ------
    WrongBaseError : an adapter's factor has no base weight, or shapes do not fit.
    AdapterError : the orientation of a weight cannot be decided.
    """
    _check_same_names(base, tuned)
    plan = against_split(plan, base)
    matcher = NameMatcher(base, plan.updates, tuned.config)
    orientation = Orientation(base.weights, base.config)
    plan = with_projections(plan, lambda update: matcher.find(update)[0], orientation)
    skipped = [_chosen(item, include, exclude) for item in plan.skipped]
    pairs: list[LayerPair] = []
    used: set[str] = set()
    relatives: Relatives | None = None
    for update in plan.updates:
        tensor = update.tensors[0]
        info, tied = matcher.find(update)
        if info is not None:
            used.update(info.uses if isinstance(info, Alternative | Unreadable) and info.uses else (info.name,))
        if not _selected(update.module, include, exclude):
            skipped.append(Skipped(update.module, LEFT_OUT, "left_out", update.parameters))
            continue
        if info is None:
            relatives = relatives or Relatives(base)
            if update.may_be_new:
                skipped.append(_without_base(update, tuned, relatives))
                continue
            raise WrongBaseError(tuned.tensors[tensor].file, _not_there(update, base, relatives), tensor)
        if isinstance(info, Unreadable):
            skipped.append(Skipped(update.module, info.reason, "not_read", update.parameters))
            continue
        if not info.is_float:
            why = f"its base weight is stored as {info.dtype}: integers without scales are not read as weights"
            skipped.append(Skipped(update.module, why, "not_read", update.parameters))
            continue
        made = _make_pair(tuned, update, info, orientation)
        if isinstance(made, Skipped):
            skipped.append(made)
        else:
            notes = update.notes + made.notes
            if isinstance(info, Derived) and info.how:
                notes += (f"its base weight is read from {info.how}",)
            if tied:
                notes += (f"tied: the base stores this weight as {info.name!r}",)
            wide = info.dtype == "F64" or (update.kind == "dense" and tuned.tensors[tensor].dtype == "F64")
            pairs.append(replace(made, tied=tied, float64=wide, notes=notes))
    _check_one_to_one(tuned, pairs, plan.sharing)
    pairs.sort(key=lambda pair: _natural(pair.name))
    if plan.complete or plan.format.startswith(("peft-", "mlx-")):
        skipped = [_in_base(item, base, tuned, matcher) for item in skipped]
    if plan.complete:
        _check_overlap(base, tuned, plan, pairs, skipped)
        skipped += _only_in_base(base, used, skipped)
    return Pairing(tuple(pairs), tuple(_sized(item, tuned) for item in skipped), matcher.counterpart, plan)


def _check_same_names(base: Checkpoint, tuned: Checkpoint) -> None:
    mine, theirs = (keeps_ggufs_names(one.layout, one.config) for one in (tuned, base))
    if mine != theirs:
        named, other, architecture = (tuned, base, mine) if mine else (base, tuned, theirs)
        raise WrongBaseError(
            next(iter(named.files), named.path),
            f"what the tensors of the GGUF architecture {str(architecture)[:40]!r} are called elsewhere is not known "
            f"to this version: compare it with a GGUF file of that architecture, which {other.path} is not",
        )


def _without_base(update: PlannedUpdate, tuned: Checkpoint, relatives: Relatives) -> Skipped:
    """A tensor stored whole of which the base has none by its name: a new head, or what was not placed."""
    home = update.module.rpartition(".")[0]
    alike = relatives.of_another_number(update)
    if f"{home}.weight" in tuned.tensors:
        why: str | None = f"lies in {home}, beside its weight, and the base has no such tensor"
    elif alike is not None:
        why = f"the base has {alike!r} and others like it, but none of this number"
    else:
        why = relatives.fused(update) or relatives.otherwise(update)
    if why is None and is_new_head(update.module, tuned):
        return Skipped(update.module, NEW_HEAD, "new", update.parameters)
    return Skipped(update.module, why or NO_SUCH_WEIGHT, "not_placed", update.parameters)


def _not_there(update: PlannedUpdate, base: Checkpoint, relatives: Relatives) -> str:
    """What to say of factors whose base weight is not there."""
    why = relatives.fused(update)
    if why is not None:
        return why
    why = relatives.otherwise(update) or "is this the wrong base?"
    return f"its base weight is not in {base.path}: {why} (looked for {update.targets[0]!r})"


def _chosen(item: Skipped, include: Sequence[str], exclude: Sequence[str]) -> Skipped:
    """What is not analysed; where the user's patterns leave it out as well, that is the reason."""
    if item.kind not in ("not_placed", "not_read") or _selected(item.name, include, exclude):
        return item
    return replace(item, reason=LEFT_OUT, kind="left_out")


def _sized(item: Skipped, tuned: Checkpoint) -> Skipped:
    """What is not analysed, with its number of values where a tensor of the fine-tune has its name."""
    info = tuned.tensors.get(item.name) or tuned.tensors.get(f"{item.name}.weight")
    return item if item.parameters is not None or info is None else replace(item, parameters=info.size)


def _make_pair(tuned: Checkpoint, update: PlannedUpdate, info: Weight, orientation: Orientation) -> LayerPair | Skipped:
    role = role_of(update.module, len(info.shape))
    method = isinstance(update, MethodUpdate)
    if update.shape is None and not method:  # stored whole, as the base is
        return _pair_whole(tuned, update, info, orientation, role)
    file, stored, shape = tuned.tensors[update.tensors[0]].file, info.shape, update.shape or (0, 0)
    groups = _groups(update, stored, orientation)
    if groups > 1:
        return Skipped(
            update.module,
            f"convolution in {groups} groups: its factors are ungrouped, and peft cannot merge them either",
            "not_read",
            update.parameters,
        )
    rows = None
    notes: tuple[str, ...] = ()
    if update.layout == "embedding" and len(stored) == 2 and stored[1] == shape[0] and stored[0] != shape[1]:
        rows = min(stored[0], shape[1])
        why = update.why_not_cut(tuned, rows) if isinstance(update, LoraUpdate) else None
        if why is not None:
            return Skipped(update.module, why, "not_read", update.parameters)
        notes = (_resized(stored[0], shape[1], rows),)
        stored, shape = (rows, stored[1]), (shape[0], rows)
    if isinstance(update, MethodUpdate):
        layout = update.layout_in(stored, orientation)
        notes = update.notes_in(stored)
    else:
        layout = orientation.layout_of_update(update.module, shape, update.layout, stored)
    if layout is None or (layout == "conv" and update.kernel != stored[2:] and not method):
        of_shape = f" of shape {list(update.shape)}" if update.shape else ""
        raise WrongBaseError(
            file,
            f"an update{of_shape} does not fit the base weight {info.name!r} of shape "
            f"{list(info.shape)} in {info.file}: is this the wrong base?",
            update.tensors[0],
        )
    square_linear = layout == "linear" and update.layout is None and stored[0] == stored[1]
    if square_linear and _claims_transposed(tuned) and not orientation.is_known(update.module):
        raise AdapterError(
            file,
            "fan_in_fan_out is set and the weight is square, so its orientation cannot be told; put the base's "
            "config.json beside its weights",
            update.tensors[0],
        )
    if isinstance(update, MethodUpdate):
        update = update.on(info)
    if isinstance(update, InitialisedUpdate):
        initialised = update.on(info)
        if isinstance(initialised, Skipped):
            return initialised
        notes += initialised.notes[len(update.notes) :]
        update = initialised
    return LayerPair(update.module, info, update, layout, role, matrix_shape(stored, layout), rows, notes=notes)


def _resized(before: int, after: int, rows: int) -> str:
    return f"vocabulary resized from {before} to {after} rows: the {rows} shared ones are compared"


def _groups(update: PlannedUpdate, stored: tuple[int, ...], orientation: Orientation) -> int:
    """How many groups the base's convolution has; 1 where it is none or does not fit."""
    if isinstance(update, MethodUpdate):
        return update.groups_in(stored, orientation)
    if update.layout != "conv" or update.shape is None or len(stored) < 3 or stored[0] != update.shape[0]:
        return 1
    columns = matrix_shape(stored, "conv")[1]
    return update.shape[1] // columns if columns and update.shape[1] % columns == 0 else 1


def _claims_transposed(tuned: Checkpoint) -> bool:
    return bool((tuned.adapter_config or {}).get("fan_in_fan_out"))


def _pair_whole(
    tuned: Checkpoint, update: PlannedUpdate, info: Weight, orientation: Orientation, role: Role
) -> LayerPair | Skipped:
    mine = update.info if isinstance(update, WholeTensor) else tuned.tensors[update.tensors[0]]
    layout = orientation.layout_of(update.module, info.shape)
    if mine.shape == info.shape:
        return LayerPair(update.module, info, update, layout, role, matrix_shape(info.shape, layout))
    resizable = role == "embedding" or update.module.split(".")[-1] in ("lm_head", "embed_out", "decoder")
    if resizable and len(mine.shape) == len(info.shape) == 2 and mine.shape[1] == info.shape[1]:
        rows = min(mine.shape[0], info.shape[0])
        shape = matrix_shape((rows, info.shape[1]), layout)
        notes = (_resized(info.shape[0], mine.shape[0], rows),)
        return LayerPair(update.module, info, update, layout, role, shape, rows, notes=notes)
    if role == "head":
        why = f"replaced head: shape {list(mine.shape)} here, {list(info.shape)} in the base"
        return Skipped(update.module, why, "new", update.parameters)
    raise WrongBaseError(
        mine.file,
        f"its shape is {list(mine.shape)}, but {info.name!r} in {info.file} has {list(info.shape)}: "
        "is this the wrong base?",
        mine.name,
    )


def _check_overlap(
    base: Checkpoint, tuned: Checkpoint, plan: Plan, pairs: Sequence[LayerPair], skipped: Sequence[Skipped]
) -> None:
    """A whole model of which less than half is in the base was not tuned from it."""
    wanted = len(plan.updates) - sum(item.reason == LEFT_OUT for item in skipped)
    if 2 * len(pairs) >= wanted:
        return
    unpaired = {update.module for update in plan.updates} - {pair.update.module for pair in pairs}
    missing = next(item for item in skipped if item.name in unpaired and item.reason != LEFT_OUT)
    why = "is not" if missing.reason in (NEW_HEAD, NO_SUCH_WEIGHT) else f"is not: {missing.reason}"
    raise WrongBaseError(
        tuned.path,
        f"only {len(pairs)} of its {wanted} matrices are in {base.path} ({missing.name!r} {why}): is this the wrong "
        "base?",
    )


def _in_base(item: Skipped, base: Checkpoint, tuned: Checkpoint, matcher: NameMatcher) -> Skipped:
    """A tensor without spectrum that is stored whole: not placed where the base has none of its name."""
    info = tuned.tensors.get(item.name)
    name = plain_name(item.name, tuned)
    if item.kind != "without_spectrum" or item.reason == BIAS_OF_B or info is None or name is None:
        return item
    if not info.is_float or (_is_ggufs_own(name) and "gguf" in (base.layout, tuned.layout)):
        return item  # norms, which it has under names of its own
    if name.rpartition(".")[2] in BUFFERS - {"bias"}:
        return item
    if any(matcher.counterpart(spelled) is not None for spelled in _spellings(name)):
        return item
    if is_new_head(name, tuned):
        return replace(item, kind="new")
    return replace(item, reason="the base has no tensor of this name", kind="not_placed")


def _is_ggufs_own(name: str) -> bool:
    """Whether a vector is one that GGUF names otherwise than transformers do, or has computed."""
    return "norm" in name or name.startswith("rope_freqs")


def _spellings(name: str) -> Iterator[str]:
    """A norm's name, and as TensorFlow's checkpoints have it."""
    yield name
    module, _, own = name.rpartition(".")
    for pair in (("weight", "gamma"), ("bias", "beta")):
        if own in pair:
            yield f"{module}.{pair[1 - pair.index(own)]}"


def _only_in_base(base: Checkpoint, used: Container[str], skipped: Sequence[Skipped]) -> Iterator[Skipped]:
    named = {item.name for item in skipped}
    for name, info in base.weights.items():
        module = name.removesuffix(".weight")
        if len(info.shape) >= 2 and name not in used and module not in named and name not in named:
            yield Skipped(module, "only in the base: the fine-tune has no such weight", "no_update")


def _check_one_to_one(tuned: Checkpoint, pairs: Sequence[LayerPair], sharing: Container[str]) -> None:
    for name, other, pair in meeting(pairs):
        if not (pair.tied or other.tied) and pair.update.module not in sharing:
            raise WrongBaseError(
                tuned.path,
                f"{other.update.tensors[0]!r} and {pair.update.tensors[0]!r} both match the base weight {name!r}",
            )


def why_not_merged(pairs: Iterable[LayerPair]) -> str | None:
    """Why pairs of different base keys cannot be merged: they are one base weight after all, but not in one form."""
    pairs = tuple(pairs)
    seen: dict[tuple[str, bool], LayerPair] = {}
    for pair in pairs:
        other = seen.setdefault((pair.base_key[0], pair.tied), pair)
        if other.layout != pair.layout:
            return f"one takes {pair.base.name!r} as {other.layout}, another as {pair.layout}"
        if other is not pair:
            return f"they resize {pair.base.name!r} differently"
    for name, other, pair in meeting(pair for pair in pairs if not pair.tied):
        return f"{other.name!r} and {pair.name!r} have {name!r} in different forms"
    return None


def meeting(pairs: Iterable[LayerPair]) -> Iterator[tuple[str, LayerPair, LayerPair]]:
    """Pairs that meet in a base weight, with its name: the first of those rows, and each later one that shares some."""
    owners: dict[str, dict[Rows | None, LayerPair]] = defaultdict(dict)
    for pair in pairs:
        for name, rows in footprint(pair.base):
            for taken, other in owners[name].items():
                if overlap(taken, rows):
                    yield name, other, pair
            owners[name].setdefault(rows, pair)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def name_matches(module: str, pattern: str) -> bool:
    """Whether a part of the module's name is what a shell pattern describes."""
    return fnmatch.fnmatchcase(module, f"*{pattern}*")


def _selected(module: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(name_matches(module, pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude)
