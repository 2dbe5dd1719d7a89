"""Pickled checkpoints, read only where the user allows it, and never unpickled.

``torch.save`` writes an archive: ``data.pkl`` says how a dictionary of tensors is put together, and beside it lies each
storage as it is.  What ``data.pkl`` says is followed here without calling anything: tensors, numbers, text, and
dictionaries of them; anything else is refused by name.  Values are the bytes of the storages, read where they lie.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import AmbiguousFilesError, CorruptFileError, MissingFileError, SpectraError, UnsafeFileError
from spectra.files.archives import Archive, read_members
from spectra.files.configs import MAX_NAME, check_regular
from spectra.files.headers import ForeignTensor, TensorInfo
from spectra.files.values import raw_at

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 100_000_000  # as of a safetensors header
SMALL_PICKLE_BYTES = 1_000_000  # from here on it must be smaller than the data that it describes
# Instructions that a pickle may have: torch writes one in 2.1 bytes or more, for a tensor 25 to 60.
SOME_STEPS, MOST_STEPS = 30_000, 10_000_000
NESTED = ("state_dict", "model", "module")  # where trainers put a model's tensors among other things

_DTYPES = {  # of torch → safetensors' name, bytes
    "float64": ("F64", 8), "double": ("F64", 8), "float32": ("F32", 4), "float": ("F32", 4), "float16": ("F16", 2),
    "half": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2),
    "int8": ("I8", 1), "uint8": ("U8", 1), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8),
    "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1), "float8_e8m0fnu": ("F8_E8M0", 1),
    "complex64": ("C64", 8),
}  # fmt: skip
_WIDTHS = dict(_DTYPES.values())
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8",
}  # fmt: skip
_CALLED = (
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch.Size",
)  # fmt: skip


@dataclass(frozen=True)
class PickledTensor(ForeignTensor):
    """A tensor of such an archive.

    ``span`` reaches from its first value to its last, ``strides`` count elements.
    """

    strides: tuple[int, ...] = ()

    @property
    def as_stored(self) -> bool:
        return _in_order(self.shape, self.strides) or not self.size

    def value(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its leading rows, in an order of its own; raises CorruptFileError."""
        import torch

        names = {dtype: name for name, (dtype, _) in _DTYPES.items()}
        width = _WIDTHS[self.dtype]
        shape, begin, step = self.shape, 0, 1
        if rows is not None and shape:
            first, end, step = rows.indices(shape[0])
            shape, begin = (max(0, end - first), *shape[1:]), first * self.strides[0]
        wanted = _reach(shape, self.strides) * width
        raw = raw_at(self.file, self.span[0] + (begin * width if wanted else 0), wanted, self.name, self.stamp)
        dtype = getattr(torch, names[self.dtype])
        if not wanted:
            tensor = torch.empty(shape, dtype=dtype)
        elif _in_order(shape, self.strides):  # whatever the strides of sizes of 1
            tensor = raw.view(dtype).view(shape)
        else:
            tensor = raw.view(dtype).as_strided(shape, self.strides).contiguous()
        return tensor if step == 1 else tensor[::step]


@dataclass(frozen=True)
class _Named:
    """Something that a pickle names: a function, a type, a dtype."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Stored:
    """A tensor as the pickle puts it together; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def read_pickle(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What ``torch.save`` stored: tensors by name, and the entries that are none, each with a reason.

    A model's tensors may lie one level deep, under "state_dict", "model" or "module".

    Raises
    ------
    MissingFileError, CorruptFileError, AmbiguousFilesError
    UnsafeFileError : it would call something, or is of another kind than this reads.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            archive = read_members(path, file, size)
            place, length = archive.members["data.pkl"]
            most = max(SMALL_PICKLE_BYTES, size - length)
            if length > min(most, MAX_PICKLE_BYTES):
                raise CorruptFileError(path, f"malformed: its pickle has {length:,} bytes, more than what it describes")
            file.seek(place)
            content = _Follower(path).follow(file.read(length), min(SOME_STEPS + length // 2, MOST_STEPS))
    except MissingFileError:
        raise
    except OSError as error:
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None
    return _tensors(archive, content)


class _Follower:
    """Goes through a pickle's instructions without calling what they name."""

    def __init__(self, path: Path):
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def follow(self, data: bytes, most: int) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count > most:
                    raise CorruptFileError(self.path, "malformed: its pickle has more to it than its tensors need")
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            (content,) = self.stack
        except SpectraError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CorruptFileError(self.path, f"malformed pickle: {str(error)[:100]}") from None
        return content

    def _step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                if len(self.marks) > MAX_NAME:
                    raise ValueError("nested too deeply")
                self.marks.append(len(self.stack))
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
            case "TUPLE":
                push(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self._taken(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self._taken(1) if name == "APPEND" else self._marked()
                self._into(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._taken(2) if name == "SETITEM" else self._marked()
                into = self._into(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if type(key) not in (str, int):  # others can take forever to compare
                        raise TypeError("a key that is neither text nor a number")
                    into[key] = value
            case "BUILD":
                self.stack.pop()  # what a state dict says of its modules' versions
                self._into(dict)
            case "GLOBAL":
                push(self._named(*argument.split(" ", 1)))
            case "BINPERSID":
                storage = _storage(*self.stack.pop())
                if self.storages.setdefault(storage.key, storage) != storage:  # torch goes by the first
                    raise ValueError(f"the storage {storage.key} in two forms")
                push(storage)
            case "REDUCE":
                called, arguments = self._taken(2)
                push(self._called(called, arguments))
            case _:
                raise self._refused(f"the instruction {name}")

    def _refused(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(
            self.path,
            f"its pickle has {what[:200]}, which is no part of a dictionary of tensors; nothing of it was run",
        )

    def _taken(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("nothing left to take")
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def _into(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError("what is filled is no list or dictionary")
        return self.stack[-1]

    def _named(self, module: str, name: str) -> _Named:
        known = f"{module}.{name}" in _CALLED or (module == "torch" and name in (_STORAGES.keys() | _DTYPES.keys()))
        if not known and (module, name) != ("torch.storage", "UntypedStorage"):
            raise self._refused(f"{module}.{name}")
        return _Named(f"{module}.{name}")

    def _called(self, called: Any, arguments: Any) -> Any:
        if type(called) is not _Named or called.name not in _CALLED or type(arguments) is not tuple:
            raise self._refused(f"a call of {getattr(called, 'name', type(called).__name__)}")
        name = called.name.rpartition(".")[2]
        if name == "OrderedDict":
            if arguments:
                raise ValueError("an OrderedDict that is not filled entry by entry")
            return {}
        if name == "Size":
            (sizes,) = arguments
            return _numbers(sizes)
        if name == "_rebuild_parameter":
            if type(arguments[0]) is not _Stored:
                raise ValueError("a parameter of something that is no tensor")
            return arguments[0]
        own_dtype = name == "_rebuild_tensor_v3"
        if any(arguments[6 + own_dtype :]):
            raise self._refused("a tensor whose values are stored conjugated or negated")
        return _stored(arguments, own_dtype=own_dtype)


def _storage(kind: Any, storage: Any, key: Any, _device: Any, count: Any) -> _Storage:
    if kind != "storage" or type(storage) is not _Named or type(key) is not str or type(count) is not int:
        raise ValueError("a reference that is none to a storage")
    dtype = _STORAGES.get(storage.name.rpartition(".")[2])
    if dtype is None or not re.fullmatch(r"[0-9]{1,9}", key) or count < 0:
        raise ValueError("a storage that is none")
    return _Storage(key, dtype, count)


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 16 or not all(type(one) is int and 0 <= one < 2**63 for one in value):
        raise ValueError("sizes that are no whole numbers")
    numbers: tuple[int, ...] = value
    return numbers


def _stored(arguments: tuple[Any, ...], *, own_dtype: bool) -> _Stored:
    storage, offset, shape, strides = arguments[:4]
    (offset,), shape, strides = _numbers((offset,)), _numbers(shape), _numbers(strides)
    if type(storage) is not _Storage or len(shape) != len(strides):
        raise ValueError("a tensor without its storage")
    dtype = arguments[6].name.rpartition(".")[2] if own_dtype else storage.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor of {dtype}")
    return _Stored(storage, offset, shape, strides, dtype)


def _tensors(archive: Archive, content: Any) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    path = archive.path
    if type(content) is not dict:
        raise UnsafeFileError(path, f"it holds {_kind(content)}, not a dictionary of tensors")
    within: tuple[str, ...] = ()
    inner = [key for key, value in content.items() if type(value) is dict and _holds_tensors(value)]
    outer = _holds_tensors(content)
    if inner and (outer or len(inner) > 1):
        listed = ", ".join(repr(str(key)[:80]) for key in inner[:8])
        also = ", beside tensors of its own" if outer else ""
        raise AmbiguousFilesError(path, f"it holds several dictionaries of tensors: {listed}{also}; save one of them")
    aside: dict[str, str] = {}
    for key in content:
        _check_key(path, key)
    if inner:
        if inner[0] not in NESTED:
            raise UnsafeFileError(
                path,
                f"its tensors lie under {str(inner[0])[:80]!r}; expected them by name, or under {', '.join(NESTED)}",
            )
        aside = {f"{key}": f"no tensor but {_kind(value)}" for key, value in content.items() if key != inner[0]}
        within, content = (inner[0],), content[inner[0]]
    tensors: dict[str, TensorInfo] = {}
    for key, value in content.items():
        _check_key(path, key)
        if type(key) is not str:
            raise CorruptFileError(path, f"{str(key)[:80]!r} is no name of a tensor")
        if type(value) is _Stored:
            tensors[key] = _info(archive, key, value)
        else:
            aside[".".join((*within, key))] = f"no tensor but {_kind(value)}"
    if not tensors:
        raise CorruptFileError(path, "holds no tensors by name: no state dict of a model")
    return tensors, {key: reason for key, reason in aside.items() if key not in tensors}


def _check_key(path: Path, key: str | int) -> None:
    """Raises CorruptFileError for a key that cannot be shown; it may be a number."""
    if len(str(key)) > MAX_NAME or not str(key).isprintable():
        raise CorruptFileError(path, f"{str(key)[:80]!r} is no name of a tensor, nor of anything beside them")


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(type(item) is _Stored for item in value.values())


def _kind(value: Any) -> str:
    return {dict: "a dictionary", list: "a list", tuple: "a tuple", str: "text", type(None): "nothing"}.get(
        type(value), "a number" if isinstance(value, int | float) else "something else"
    )


def _in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor's values lie one after the other."""
    step = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != step:
            return False
        step *= count
    return True


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements there are from a tensor's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def _info(archive: Archive, name: str, stored: _Stored) -> PickledTensor:
    def wrong(what: str) -> CorruptFileError:
        return CorruptFileError(archive.path, f"malformed: {what}", name)

    member = archive.members.get(f"data/{stored.storage.key}")
    if member is None:
        raise wrong(f"its storage {stored.storage.key} is not in the archive")
    place, length = member
    if stored.storage.count * _DTYPES[stored.storage.dtype][1] != length:
        raise wrong(f"its storage would have {stored.storage.count:,} values, but has {length:,} bytes")
    dtype, width = _DTYPES[stored.dtype]
    size, reach = math.prod(stored.shape), _reach(stored.shape, stored.strides)
    if size and (size * width > length or (stored.offset + reach) * width > length):
        raise wrong(f"its shape {list(stored.shape)} holds more than its storage of {length:,} bytes")
    if math.prod(max(1, count) for count in stored.shape) * width >= 2**63:  # one of no values too
        raise wrong(f"its shape {list(stored.shape)} is too large")
    span = (place + stored.offset * width, reach * width) if size else (place, 0)
    return PickledTensor(name, dtype, stored.shape, archive.path, span, stored.strides, stamp=archive.stamp)
