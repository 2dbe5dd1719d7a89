"""Factors as tools other than PEFT store them, and how their modules are found in the base.

A file for image models holds updates of several models (a denoiser, text encoders) under one prefix each, its
*component*; a base is one of these models, or all in one file.  Some writers turn the dots of names into underscores,
which only the base's own names can undo.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from spectra.adapters.ldm import aliases
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.errors import AdapterError, WrongBaseError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.derived import Derived, Weight
from spectra.files.orientation import Layout, role_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import Update

# What some model classes put before the names of one and the same network, and others do not.
WRAPPERS = ("text_model", "model", "transformer")
# What writers call the models of a pipeline, and how its folders are called.
COMPONENTS = {
    **{name: (name,) for name in ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2",
                                  "text_encoder_3")},
    "lora_unet": ("unet", "transformer", "transformer_2"), "diffusion_model": ("unet", "transformer", "transformer_2"),
    "lora_transformer": ("transformer", "transformer_2"), "transformer": ("transformer", "transformer_2"),
    "lora_te": ("text_encoder",), "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",), "lora_te3": ("text_encoder_3",),
}  # fmt: skip
# Which of a pipeline's text encoders a component is, and how single files call the first and the second.
TEXT_ENCODERS = {
    "lora_te": 1, "lora_te1": 1, "text_encoder": 1, "lora_te2": 2, "text_encoder_2": 2, "lora_te3": 3,
    "text_encoder_3": 3,
}  # fmt: skip
_ENCODER = re.compile(
    r"(?P<first>cond_stage_model|conditioner\.embedders\.0|(?:text_encoders\.)?clip_l|text_encoder)\..+"
    r"|(?P<second>conditioner\.embedders\.1|(?:text_encoders\.)?clip_g|text_encoder_2)\..+"
    r"|(?P<last>(?:text_encoders\.)?t5xxl|text_encoder_3)\..+"
)
SECOND = ("text_encoders.clip_g.", "clip_g.", "text_encoder_2.")  # where a third follows
NOT_PLACED = "no weight of the base has its name, or as many values; name a base that has this part of the model"
ALONE = "model"  # the component of a file that holds one model's update under the model's own names
DEEPEST = 32  # parts of a module's name that are looked at; a crafted file could have any number
NO_ALPHA = "no alpha is stored, so it is taken for the rank, as its tools do: the scaling is 1"
ZERO_ALPHA = (
    "the stored alpha is 0, which the trainer takes for the rank (a scaling of 1) and its merging script for no "
    "change; this report follows the trainer"
)
SPLIT_AS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v"}  # what diffusers calls the parts of a qkv
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}  # of struct; BF16 is half a float32


@dataclass(frozen=True)
class StoredFactors:
    """The factors of one module: ``down`` (r, in) or (r, in, k…), ``up`` (out, r); ``mid`` (r, r, k…) between them.

    Several of each belong to parts of the output that are stacked.  ``transposed`` ones are stored as (in, r) and
    (r, out).  ``magnitude`` (out,) is DoRA's, or (in,) where ``by_columns``.  ``others`` were read with the headers:
    alphas.  ``component`` says which model of several, ``name`` which module of it, its parts joined by ``joint``: the
    dot, or what a writer made of it.
    """

    module: str
    targets: tuple[str, ...]
    down: tuple[TensorInfo, ...]
    up: tuple[TensorInfo, ...]
    alpha: float | None
    scaling: float
    mid: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    others: tuple[TensorInfo, ...] = ()
    transposed: bool = False
    by_columns: bool = False
    component: str = ""
    name: str = ""
    joint: str = "."
    layout: Layout | None = None
    kernel: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    may_be_new: bool = False
    base_copy: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(info.name for info in (*self.trained, *self.others))

    @property
    def trained(self) -> tuple[TensorInfo, ...]:
        return (*self.down, *self.up, *(info for info in (self.mid, self.magnitude) if info is not None))

    @property
    def kind(self) -> UpdateKind:
        if self.magnitude is None:
            return "low_rank"
        return "column_scaled" if self.by_columns else "row_scaled"

    @property
    def rank(self) -> int:
        return sum(info.shape[1 if self.transposed else 0] for info in self.down)

    @property
    def shape(self) -> tuple[int, int]:
        if self.transposed:
            return self.up[0].shape[1], self.down[0].shape[0]
        kernel = () if self.mid is None else self.mid.shape[2:]
        return sum(info.shape[0] for info in self.up), math.prod((*self.down[0].shape[1:], *kernel))

    @property
    def parameters(self) -> int:
        return sum(info.size for info in self.trained)

    def fits_stored(self, stored: tuple[int, ...]) -> bool:
        if len(stored) == 2:
            return sorted(stored) == sorted(self.shape) and all(size == 1 for size in self.kernel)
        same = self.kernel == stored[2:] or all(size == 1 for size in (*self.kernel, *stored[2:]))
        return same and self.shape[0] == stored[0] and math.prod(stored[1:]) == self.shape[1]

    def placed(self, name: str, stored: tuple[int, ...]) -> StoredFactors:
        module = name.removesuffix(".weight")
        if len(stored) > 2:  # a convolution where the base has one
            return replace(self, module=module, targets=(name,), layout="conv", kernel=stored[2:])
        embedding = role_of(module, 2) == "embedding" and stored == self.shape[::-1]
        return replace(self, module=module, targets=(name,), layout="embedding" if embedding else None, kernel=())

    def looked_for(self, names: tuple[str, ...]) -> StoredFactors:
        return replace(self, targets=names)

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Update:
        import torch

        from spectra.updates.algebra import LowRank, RowScaled
        from spectra.updates.multiplied import Normed

        def factor(info: TensorInfo) -> Tensor:
            # Factors are small and kept in float64: only the weight has the working dtype.
            stored = checkpoint.read(info.name, digest=True).to(device=device).double().flatten(1)
            return stored.T if self.transposed else stored

        for info in self.others:
            checkpoint.read(info.name, digest=True)  # known already; for the fingerprint
        A, blocks = torch.cat([factor(info) for info in self.down]), [factor(info) for info in self.up]
        B = blocks[0].new_zeros(sum(block.shape[0] for block in blocks), A.shape[0])
        row = column = 0
        for block in blocks:
            B[row : row + block.shape[0], column : column + block.shape[1]] = block
            row, column = row + block.shape[0], column + block.shape[1]
        if self.mid is not None:
            core = checkpoint.read(self.mid.name, digest=True).to(device=device).double()
            A = torch.einsum("ij...,jn->in...", core, A).flatten(1)
        A = A if rows is None else A[:, :rows]
        if self.magnitude is None:
            return LowRank(B, A, self.scaling)
        magnitude = checkpoint.read(self.magnitude.name, digest=True).to(device=device).double().flatten()
        if self.by_columns:
            return Normed(LowRank(B, A, self.scaling), magnitude[:rows], columns=True)
        return RowScaled(B, A, self.scaling, magnitude)


def check_factors(down: TensorInfo, up: TensorInfo, mid: TensorInfo | None = None) -> int:
    """The rank of a pair of factors, (r, in, …) and (out, r, 1…), that fit each other.

    Raises
    ------
    AdapterError : dtypes or shapes contradict each other.
    """
    for info in (down, up, *([] if mid is None else [mid])):
        if not info.holds_floats:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
        if len(info.shape) < 2 or info.size == 0:
            raise AdapterError(info.file, f"expected a matrix, found shape {list(info.shape)}", info.name)
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise AdapterError(
            up.file, f"its second dimension is {up.shape[1]}, but {down.name!r} has rank {rank}", up.name
        )
    if any(size != 1 for size in up.shape[2:]):
        raise AdapterError(up.file, f"expected a 1×1 convolution, found shape {list(up.shape)}", up.name)
    if mid is not None:
        if any(size != 1 for size in down.shape[2:]):
            raise AdapterError(down.file, f"beside {mid.name!r} expected a 1×1 convolution", down.name)
        if len(mid.shape) < 3 or mid.shape[:2] != (rank, rank):
            raise AdapterError(mid.file, f"expected ({rank}, {rank}, …), found shape {list(mid.shape)}", mid.name)
    return rank


def scalar(info: TensorInfo) -> float:
    """The value of a tensor with one element, read without torch.

    Raises
    ------
    AdapterError : it has not one element, is no plain number or is not finite.
    """
    size = info.span[1]
    if info.size != 1 or (info.dtype not in SCALARS and info.dtype != "BF16"):
        raise AdapterError(info.file, f"expected one number, found {info.dtype} of shape {list(info.shape)}", info.name)
    try:
        with info.file.open("rb") as file:
            file.seek(info.span[0])
            raw = file.read(size)
        value = struct.unpack(SCALARS.get(info.dtype, "<f"), raw if info.dtype != "BF16" else b"\0\0" + raw)[0]
    except (OSError, struct.error) as error:
        raise AdapterError(info.file, f"could not be read: {error}", info.name) from None
    if not -1e15 < value < 1e15:
        raise AdapterError(info.file, f"it is {value}; expected a finite number", info.name)
    return float(value)


def alpha_of(info: TensorInfo | None, rank: int) -> tuple[float, float, tuple[str, ...]]:
    """(alpha, alpha / rank, notes) by the rules of kohya's trainer and of LyCORIS."""
    alpha = None if info is None else scalar(info)
    if not alpha:
        return float(rank), 1.0, (NO_ALPHA if alpha is None else ZERO_ALPHA,)
    return alpha, alpha / rank, ()


def common_facts(updates: Iterable[PlannedUpdate]) -> dict[str, Any]:
    """Rank, alpha and scaling of a fine-tune as a whole; null where modules differ."""
    updates = list(updates)
    facts = {}
    for key in ("rank", "alpha", "scaling"):
        distinct = {getattr(update, key) for update in updates}
        facts[key] = distinct.pop() if len(distinct) == 1 else None
    return facts


class Placeable(PlannedUpdate, Protocol):
    """An update whose module is yet to be found among the base's; ``component``, ``name`` and ``joint`` say which.

    ``fits_stored`` says whether a weight stored so can be its base, ``placed`` is the update under the base's own name,
    ``looked_for`` the one whose base weight has one of the names.
    """

    @property
    def component(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def joint(self) -> str: ...
    def fits_stored(self, stored: tuple[int, ...]) -> bool: ...
    def placed(self, name: str, stored: tuple[int, ...]) -> PlannedUpdate: ...
    def looked_for(self, names: tuple[str, ...]) -> PlannedUpdate: ...


def _is_placeable(update: PlannedUpdate) -> TypeGuard[Placeable]:
    return bool(getattr(update, "component", ""))


def placed_in(plan: Plan, base: Checkpoint, parts: Mapping[str, Weight] | None = None) -> Plan:
    """The plan with the modules of a :class:`Placeable` found among the base's names.

    All modules of one component stand under one prefix of the base: the one under which most of them fit.  Components
    of which the base has no module are not placed, unless that is so for all.  ``parts`` are the weights that the
    base's are split into.

    Raises
    ------
    WrongBaseError : several weights of the base could be meant; they are listed.
    """
    groups: dict[str, list[Placeable]] = defaultdict(list)
    for update in plan.updates:
        if _is_placeable(update):
            groups[update.component].append(update)
    if not groups:
        return plan
    family = base.config.get("model_type")
    for component, group in groups.items():
        of_diffusers = isinstance(group[0], StoredFactors) and component.startswith(("transformer", ALONE))
        if of_diffusers and group[0].alpha is None and isinstance(family, str):
            raise WrongBaseError(
                base.path,
                f"{group[0].module!r} is read as a LoRA of diffusers, but this base is a {family[:80]} model of "
                "transformers: without its adapter_config.json its alpha is not known",
            )
    weights = {**base.weights, **(parts or {})}
    joints = {update.joint for group in groups.values() for update in group}
    indices = {joint: _ends(weights, joint) for joint in joints}
    placed: dict[str, PlannedUpdate] = {}
    homes: dict[str, str] = {}
    absent: list[str] = []
    for component, group in groups.items():
        resolved = _resolve(base, weights, group, _within(base, component, groups, indices[group[0].joint]))
        if resolved is None:
            absent.append(component)
            continue
        home, found = resolved
        if component in TEXT_ENCODERS and homes.setdefault(home, component) != component:
            raise WrongBaseError(
                base.path,
                f"the text encoders {homes[home]} and {component} both fit its modules, which do not say which of the "
                "two they are: name the whole model as the base, or the pipeline's folder",
            )
        placed |= found
    if len(absent) == len(groups):
        absent = []
    skipped = [
        Skipped(update.module, f"of {component}: {NOT_PLACED}", "not_placed", update.parameters)
        for component in absent for update in groups[component]
    ]  # fmt: skip
    left = {item.name for item in skipped}
    updates = tuple(placed.get(update.module, update) for update in plan.updates if update.module not in left)
    return replace(plan, updates=updates, skipped=(*plan.skipped, *skipped))


def _within(
    base: Checkpoint, component: str, others: Container[str], named: Mapping[str, list[tuple[str, str]]]
) -> Mapping[str, list[tuple[str, str]]]:
    """Of a base's weights by the ends of their names, those of the models that a component may be.

    ``others`` are all components of the file: what one of them is by name, no other is.
    """
    if base.layout == "diffusers pipeline" and component in COMPONENTS:
        models = tuple(f"{name}." for name in COMPONENTS[component] if name == component or name not in others)
        return {end: [item for item in items if item[1].startswith(models)] for end, items in named.items()}
    if component not in TEXT_ENCODERS:
        return named
    number = TEXT_ENCODERS[component]
    last = 3 if any(name.startswith(SECOND) for name in base.weights) else 2
    return {
        end: [item for item in items if _encoder_of(item[1], last) in (number, None)] for end, items in named.items()
    }


def _encoder_of(name: str, last: int) -> int | None:
    """Which text encoder a single file's weight is of; None where its name does not say."""
    match = _ENCODER.fullmatch(name)
    return None if match is None else {"first": 1, "second": 2, "last": last}[str(match.lastgroup)]


def _ends(weights: Mapping[str, Weight], joint: str) -> dict[str, list[tuple[str, str]]]:
    """End of a module's name, its parts joined → (what stands before it, tensor) of each weight with such a name.

    A name that other tools have for a module counts as one of its names.
    """
    ends: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, info in weights.items():
        if not name.endswith(".weight") or len(info.shape) < 2:
            continue
        module = name.removesuffix(".weight")
        parts = module.split(".")
        spelled = [parts]
        if isinstance(info, Derived) and info.part_of is not None and parts[-1] in SPLIT_AS:
            spelled.append([*parts[:-1], SPLIT_AS[parts[-1]]])
        for own in spelled:
            for length in range(1, min(len(own), DEEPEST) + 1):
                ends[joint.join(own[-length:])].append((".".join(own[:-length]), name))
        for before, alias in aliases(module):
            ends[alias.replace(".", joint)].append((before, name))
    return ends


def _resolve(
    base: Checkpoint,
    weights: Mapping[str, Weight],
    group: Sequence[Placeable],
    named: Mapping[str, list[tuple[str, str]]],
) -> tuple[str, dict[str, PlannedUpdate]] | None:
    """(prefix, module → update with the base's own names); None where nothing of the component fits the base."""
    names = {update.module: update.name for update in group}
    options, votes = _options(weights, group, names, named)
    for wrapper in WRAPPERS:
        if not votes:
            start = wrapper + group[0].joint
            names = {update.module: update.name.removeprefix(start) for update in group}
            options, votes = _options(weights, group, names, named)
    if not votes:
        return None
    most = max(votes.values())
    prefixes = sorted(prefix for prefix, count in votes.items() if count == most)
    if len(prefixes) > 1:
        places = {prefix: (name, module) for module, items in options.items() for prefix, name in items}
        listed = ", ".join(f"{name!r} ({module})" for name, module in (places[prefix] for prefix in prefixes))
        raise WrongBaseError(
            base.path,
            f"as many modules of {group[0].component} fit {listed}; Spectra does not guess which are meant. Name "
            f"the one that was trained as the base{_by_folder(base, prefixes)}",
        )
    resolved: dict[str, PlannedUpdate] = {}
    for update in group:
        fitting = sorted(name for prefix, name in options[update.module] if prefix == prefixes[0])
        if len(fitting) > 1:
            listed = ", ".join(map(repr, fitting))
            raise WrongBaseError(base.path, f"{update.module!r} could be any of {listed}; Spectra does not guess")
        if fitting:
            resolved[update.module] = update.placed(fitting[0], weights[fitting[0]].shape)
        else:  # there in another shape, or not at all: matching says which
            misfits = [name for prefix, name in named.get(names[update.module], ()) if prefix == prefixes[0]]
            resolved[update.module] = update.looked_for(tuple(misfits) or update.targets)
    return prefixes[0], resolved


def _by_folder(base: Checkpoint, prefixes: Sequence[str]) -> str:
    """Which folders these are, where they are components of a pipeline."""
    folders = [prefix for prefix in prefixes if prefix in base.components]
    return f": {' or '.join(str(base.path / folder) for folder in folders)}" if folders else ""


def _options(
    weights: Mapping[str, Weight],
    group: Sequence[Placeable],
    names: Mapping[str, str],
    named: Mapping[str, list[tuple[str, str]]],
) -> tuple[dict[str, list[tuple[str, str]]], Counter[str]]:
    """module → (prefix, tensor) of each weight that fits; how many modules each prefix serves."""
    options = {
        update.module: [
            item for item in named.get(names[update.module], ()) if update.fits_stored(weights[item[1]].shape)
        ]
        for update in group
    }
    votes = Counter(prefix for items in options.values() for prefix in {prefix for prefix, _ in items})
    return options, votes
