"""Tensors in memory as those of a :class:`Checkpoint`, under the names that ``save_pretrained`` gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import (
    CorruptFileError,
    MissingFileError,
    UnsupportedMethodError,
    in_short,
)
from spectra.files.checkpoint import Checkpoint
from spectra.files.configs import MAX_NAME
from spectra.files.derived import Alternative, Derived, Reader, Unreadable, Weight, read_rows, sources_of
from spectra.files.headers import ForeignTensor, TensorInfo
from spectra.files.wrapped import own_name
from spectra.sources.live.saving import config_of, saved_names, tied_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IN_MEMORY, ADAPTER_IN_MEMORY = "in memory", "peft adapter in memory"
_DTYPES = {  # of torch → safetensors' names, in the order in which it writes them
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ORDER = {name: place for place, name in enumerate(_DTYPES.values(), -len(_DTYPES))}  # the widest first
MADE = "a part of a parametrisation: the weight is made of it, and is no tensor of its own"
# Tensors that mean something else than their values, as far as their classes do not say so to torch.
_NOT_READ = ("GGUFParameter", "UninitializedParameter", "UninitializedBuffer")


@dataclass(frozen=True)
class LiveTensor(ForeignTensor):
    """A tensor in memory, as it is at the time of reading."""

    tensor: Tensor = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    @property
    def as_stored(self) -> bool:
        return False

    def value(self, rows: slice | None = None) -> Tensor:
        """The tensor itself, or some of its leading rows, on the CPU: no copy where it is there already."""
        value = self.tensor.detach()
        return (value if rows is None else value[rows]).cpu()


@dataclass(frozen=True)
class LiveCheckpoint(Checkpoint):
    """A model, an adapter or a state dict in memory.

    ``path`` says for people which it is.

    Attributes
    ----------
    source : what was given, or the base model in it; two checkpoints of one source are of one place.
    around : of an adapter that sits in a model, opens that model without it.
    origin : the path or the name that a model says it was loaded from.
    names : names that the model itself has, where they are not those that it is saved with → the latter.
    """

    source: object = field(default=None, compare=False, repr=False)
    around: Callable[[], Checkpoint] | None = field(default=None, compare=False, repr=False)
    origin: str | None = None
    names: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def in_memory(self) -> bool:
        return True

    @property
    def place(self) -> Hashable:
        return IN_MEMORY, id(self.source), str(self.path)

    @property
    def adapter_config_file(self) -> Path:
        return self.path

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def shares(self, tensors: Iterable[Tensor]) -> bool:
        """Whether writing to some of these tensors would change this one's."""
        mine = {
            info.tensor.untyped_storage().data_ptr() for info in self.tensors.values() if isinstance(info, LiveTensor)
        }
        return any(value.untyped_storage().data_ptr() in mine for value in tensors if value.device.type != "meta")

    @cached_property
    def alternatives(self) -> Mapping[str, Alternative | Unreadable]:
        """As of a folder's; also the names in the model, which adapters that were made on it go by."""
        weights = self.weights
        named = {own: weights[saved] for own, saved in self.names.items() if saved in weights and own not in weights}
        return {**super().alternatives, **{own: _renamed(info, own) for own, info in named.items()}}

    def load(self, weight: str | Weight, *, rows: slice | int | None = None, digest: bool = False) -> Tensor:
        """As of a folder's; a tensor as it is where it lies, if no digest is wanted."""
        info = self.weights[weight] if isinstance(weight, str) else weight
        if digest or not isinstance(info, LiveTensor):
            return super().load(info, rows=rows, digest=digest)
        value = info.tensor.detach()
        return value if rows is None else value[slice(rows) if isinstance(rows, int) else rows]

    def prefetch(self, weights: Iterable[str | Weight]) -> None:
        """Nothing to fetch."""


def model_in_memory(
    model: torch.nn.Module, unwrapped: Callable[[str], str | None] = lambda name: name
) -> LiveCheckpoint:
    """A model without adapters; ``unwrapped`` gives each tensor's name without them, None of one that is theirs."""
    path = Path(f"{type(model).__name__} in memory")
    _check_whole(path, model)
    try:
        state = model.state_dict()
    except NotImplementedError as error:  # bitsandbytes' quantised embeddings
        raise UnsupportedMethodError(path, f"its tensors cannot be read: {in_short(error)}") from None
    own = {name: unwrapped(own_name(name)) for name in state}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: state[inside] for inside, name in own.items() if name is not None and name not in ignored}
    saved = saved_names(model, kept)
    tied = {saved.get(name, name) for name in tied_names(model)}
    made = {name: MADE for name in kept if "parametrizations." in name}
    tensors, aside = tensors_of(path, {saved[name]: kept[name] for name in kept if name not in made}, tied)
    return LiveCheckpoint(
        path, IN_MEMORY, tensors, config_of(model), aside=aside | made, source=model,
        origin=getattr(model, "name_or_path", None) or None,
        names={name: new for name, new in saved.items() if new != name},
    )  # fmt: skip


def tensors_of(
    path: Path, state: Mapping[str, Any], tied: Iterable[str] = (), *, once: bool = True
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a state dict in the order of a safetensors file; what else is in it, with a reason.

    Of names that are one tensor, where each is wanted ``once``, the first is kept that is not among ``tied``.

    Raises
    ------
    MissingFileError, UnsupportedMethodError : as :func:`checkpoint_of` does.
    """
    import torch

    tied = set(tied)
    values = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    aside = {name: f"no tensor but a {type(value).__name__}" for name, value in state.items() if name not in values}
    for name, value in values.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise CorruptFileError(path, f"a tensor's name is {name[:80]!r}; expected text that can be printed")
        check_readable(path, name, value)
    first: dict[Hashable, str] = {}
    for name in sorted(values, key=lambda name: name in tied):  # stable: the others in their order
        first.setdefault((once and _same_values(values[name])) or name, name)
    kept = set(first.values())
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(kept, key=lambda name: (_ORDER.get(dtype_name(values[name]), 0), name)):
        value = values[name]
        bytes_ = math.prod(value.shape) * value.element_size()
        tensors[name] = LiveTensor(name, dtype_name(value), tuple(value.shape), path, (0, bytes_), value)
    if not tensors:
        raise CorruptFileError(path, "holds no tensors by name: no state dict of a model")
    return tensors, aside


def dtype_name(value: Tensor) -> str:
    """safetensors' name of a tensor's dtype, or torch's own where it has none."""
    plain = str(value.dtype).removeprefix("torch.")
    return _DTYPES.get(plain, plain)


def check_readable(path: Path, name: str, value: Tensor) -> None:
    """Raises MissingFileError or UnsupportedMethodError where a tensor's values are not here to be read."""
    import torch

    kind = type(value)
    if value.device.type == "meta":
        raise MissingFileError(
            path,
            "on the meta device, so it has no values here (offloaded, or not loaded yet); load the model whole",
            name,
        )
    if hasattr(value, "ds_id") and not value.numel():
        raise MissingFileError(path, "its values are shared out by ZeRO-3; gather them first", name)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or kind.__name__ in _NOT_READ:
        raise UnsupportedMethodError(path, f"a {kind.__name__}, which is not read as it is in memory", name)
    if value.layout != torch.strided:
        raise UnsupportedMethodError(path, f"its layout is {value.layout}; expected torch.strided", name)


def _same_values(value: Tensor) -> Hashable:
    """The same for two tensors that are one, None where nothing is shared."""
    if not value.numel():
        return None
    return value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _renamed(info: Weight, name: str) -> Alternative | Unreadable:
    if isinstance(info, Unreadable):
        return replace(info, name=name, uses=(info.name,))

    def make(read: Reader, rows: slice | None = None) -> Tensor:
        return read_rows(info, read, rows)

    return Alternative(
        name, info.dtype, info.shape, info.file, info.span, sources=sources_of(info), make=make,
        how=info.how if isinstance(info, Derived) else "",
        quantised=info.quantised if isinstance(info, Derived) else None, whole=False, uses=(info.name,),
    )  # fmt: skip


def _check_whole(path: Path, model: torch.nn.Module) -> None:
    """Raises where a model's weights are shared out, or in a form that reading them would turn back in place."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise MissingFileError(path, "shared out by FSDP; gather its values first (summon_full_params)", name)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            why = "bitsandbytes has packed it for this CPU's forward pass; load it anew"
            raise UnsupportedMethodError(path, why, f"{name}.weight")
