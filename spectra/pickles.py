"""Pickled checkpoints, read only where the user allows it: names, shapes and dtypes without unpickling, values safely.

``torch.save`` writes an archive: ``data.pkl`` says how a dictionary of tensors is put together, and beside it lies each
storage as it is.  What ``data.pkl`` says is followed here without calling anything: tensors, numbers, text, and
dictionaries of them; anything else is refused by name.  Values come from ``torch.load`` with ``weights_only=True``,
which must agree; there is no other way to read them.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spectra.errors import AmbiguousFilesError, CorruptFileError, MissingFileError, SpectraError, UnsafeFileError
from spectra.headers import MAX_NAME, ForeignTensor, TensorInfo, check_regular

if TYPE_CHECKING:
    from torch import Tensor

SAFE_TORCH = (2, 10)  # the first without CVE-2025-32434 and CVE-2026-24747
MAX_PICKLE_BYTES = 100_000_000  # as of a safetensors header
SMALL_PICKLE_BYTES = 1_000_000  # from here on it must be smaller than the data that it describes
MAX_DIRECTORY_BYTES = 16_000_000  # of the archive: some 150 bytes a storage
# Instructions that a pickle may have: a tensor takes 35, as a parameter and with a line of metadata 60.
SOME_STEPS, STEPS_A_STORAGE = 100_000, 80
NESTED = ("state_dict", "model", "module")  # where trainers put a model's tensors among other things

_DTYPES = {  # of torch → safetensors' name, bytes
    "float64": ("F64", 8), "double": ("F64", 8), "float32": ("F32", 4), "float": ("F32", 4), "float16": ("F16", 2),
    "half": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2),
    "int8": ("I8", 1), "uint8": ("U8", 1), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8),
    "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1), "float8_e8m0fnu": ("F8_E8M0", 1),
    "complex64": ("C64", 8),
}  # fmt: skip
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
    """A tensor of such an archive; ``keys`` lead to it from the outermost dictionary."""

    keys: tuple[str, ...] = ()

    def value(self, rows: slice | None = None) -> Tensor:
        import torch

        try:
            # The whole file is mapped, and only what is asked for becomes memory.
            found: Any = torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
            for key in self.keys:
                found = found[key]
        except Exception as error:  # whatever unpickling raises: the file is at fault
            what = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise CorruptFileError(self.file, f"could not be read: {what}", self.name) from None
        agrees = isinstance(found, torch.Tensor) and tuple(found.shape) == self.shape
        if not agrees or _DTYPES.get(str(found.dtype).removeprefix("torch."), ("",))[0] != self.dtype:
            raise CorruptFileError(self.file, "the file changed while it was being read", self.name)
        tensor: Tensor = found.detach() if rows is None else found.detach()[rows]
        return tensor.clone(memory_format=torch.contiguous_format)


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


@dataclass
class _Archive:
    """The members of a torch archive: name after the first folder → (place, bytes) of its content in the file."""

    path: Path
    size: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_pickle(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What ``torch.save`` stored: tensors by name, and the entries that are none, each with a reason.

    A model's tensors may lie one level deep, under "state_dict", "model" or "module".

    Raises
    ------
    MissingFileError, CorruptFileError, AmbiguousFilesError
    UnsafeFileError : it would call something, is of another kind than this reads, or torch is too old to read it.
    """
    check_torch(path)
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            archive = _members(path, file, size)
            place, length = archive.members["data.pkl"]
            most = max(SMALL_PICKLE_BYTES, size - length)
            if length > min(most, MAX_PICKLE_BYTES):
                raise CorruptFileError(path, f"malformed: its pickle has {length:,} bytes, more than what it describes")
            file.seek(place)
            most = SOME_STEPS + STEPS_A_STORAGE * min(len(archive.members), size >> 12)
            found = _Follower(path).follow(file.read(length), most)
    except MissingFileError:
        raise
    except OSError as error:
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None
    return _tensors(archive, found)


def check_torch(path: Path) -> None:
    """Raises UnsafeFileError where the torch that is installed does not read pickles safely."""
    found = re.match(r"(\d+)\.(\d+)", version("torch"))
    if found is None or (int(found[1]), int(found[2])) < SAFE_TORCH:
        raise UnsafeFileError(
            path,
            f"--allow-pickle needs torch 2.10 or later, and this is {version('torch')}: before, a pickle could run "
            "code even with weights_only=True (CVE-2025-32434, CVE-2026-24747)",
        )


def _members(path: Path, file: BinaryIO, size: int) -> _Archive:
    start = file.read(4)
    if start != b"PK\x03\x04":
        if not start:
            raise CorruptFileError(path, "the file is empty")
        if start[:1] == b"\x80":
            raise UnsafeFileError(
                path,
                "this is a bare pickle, or what torch.save wrote before 1.6: neither can be bounded before it is read; "
                "load it with torch.load(path, weights_only=True) and save it again",
            )
        raise CorruptFileError(path, "not an archive as torch.save writes it")
    _check_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as opened:
            infos = opened.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise CorruptFileError(path, f"truncated or malformed archive: {str(error)[:100]}") from None
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1 or "data.pkl" not in {info.filename.partition("/")[2] for info in infos}:
        raise CorruptFileError(path, "not an archive as torch.save writes it: it has no data.pkl in its one folder")
    archive = _Archive(path, size)
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in archive.members:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} occurs twice in the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} is compressed, which torch.save never does")
        archive.members[name] = (_content(path, file, info, size), info.file_size)
    program = next((name for name in archive.members if name.startswith("code/") or name == "constants.pkl"), None)
    if program is not None:
        raise UnsafeFileError(path, f"this is a TorchScript program ({program[:80]!r}), not a dictionary of tensors")
    end = 0
    for name, (place, length) in sorted(archive.members.items(), key=lambda item: item[1]):
        if place < end:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} overlaps another member of the archive")
        end = place + length
    place, length = archive.members.get("byteorder", (0, 0))
    if length:
        file.seek(place)
        order = file.read(min(length, 16))
        if order != b"little":
            raise CorruptFileError(path, f"its numbers are stored in byte order {order!r}, which is not read")
    return archive


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Raises CorruptFileError unless the archive ends as torch's do, in a directory of a bounded length."""
    ends, zip64 = 22, 56 + 20
    file.seek(max(0, size - ends - zip64))
    tail = file.read()
    end = tail[-ends:]
    if len(end) < ends or end[:4] != b"PK\x05\x06":
        raise CorruptFileError(path, "truncated: the directory at the end of the archive is missing")
    length = int.from_bytes(end[12:16], "little")
    if length == 0xFFFFFFFF and tail[:4] == b"PK\x06\x06":
        length = int.from_bytes(tail[40:48], "little")
    if length > min(MAX_DIRECTORY_BYTES, size):
        raise CorruptFileError(path, f"malformed: its directory has {length:,} bytes")


def _content(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    """Where a member's content begins, behind a header of its own that repeats its name."""
    file.seek(max(0, info.header_offset))  # negative, where the directory lies about itself
    header = file.read(30) if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CorruptFileError(path, f"malformed: {info.filename[:80]!r} is not where the archive's directory says")
    place = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if place + info.file_size > size:
        raise CorruptFileError(path, f"truncated: {info.filename[:80]!r} would end behind the file")
    return place


class _Follower:
    """Goes through a pickle's instructions without calling what they name."""

    def __init__(self, path: Path):
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def follow(self, data: bytes, most: int) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count > most:
                    raise CorruptFileError(self.path, "malformed: its pickle has more to it than its tensors need")
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            (found,) = self.stack
        except SpectraError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CorruptFileError(self.path, f"malformed pickle: {str(error)[:100]}") from None
        return found

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
                push(_storage(*self.stack.pop()))
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
        return _stored(arguments, own_dtype=name == "_rebuild_tensor_v3")


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
    found: tuple[int, ...] = value
    return found


def _stored(arguments: tuple[Any, ...], *, own_dtype: bool) -> _Stored:
    storage, offset, shape, strides = arguments[:4]
    (offset,), shape, strides = _numbers((offset,)), _numbers(shape), _numbers(strides)
    if type(storage) is not _Storage or len(shape) != len(strides):
        raise ValueError("a tensor without its storage")
    dtype = arguments[6].name.rpartition(".")[2] if own_dtype else storage.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor of {dtype}")
    return _Stored(storage, offset, shape, strides, dtype)


def _tensors(archive: _Archive, found: Any) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    path = archive.path
    if type(found) is not dict:
        raise UnsafeFileError(path, f"it holds {_kind(found)}, not a dictionary of tensors")
    within: tuple[str, ...] = ()
    inner = [key for key, value in found.items() if type(value) is dict and _holds_tensors(value)]
    outer = _holds_tensors(found)
    if inner and (outer or len(inner) > 1):
        listed = ", ".join(repr(str(key)[:80]) for key in inner[:8])
        also = ", beside tensors of its own" if outer else ""
        raise AmbiguousFilesError(path, f"it holds several dictionaries of tensors: {listed}{also}; save one of them")
    aside: dict[str, str] = {}
    if inner:
        if inner[0] not in NESTED:
            raise UnsafeFileError(
                path,
                f"its tensors lie under {str(inner[0])[:80]!r}; expected them by name, or under {', '.join(NESTED)}",
            )
        aside = {f"{key}": f"no tensor but {_kind(value)}" for key, value in found.items() if key != inner[0]}
        within, found = (inner[0],), found[inner[0]]
    tensors: dict[str, TensorInfo] = {}
    for key, value in found.items():
        if type(key) is not str or len(key) > MAX_NAME or not key.isprintable():
            raise CorruptFileError(path, f"{str(key)[:80]!r} is no name of a tensor")
        if type(value) is _Stored:
            tensors[key] = _info(archive, key, value, (*within, key))
        else:
            aside[".".join((*within, key))] = f"no tensor but {_kind(value)}"
    if not tensors:
        raise CorruptFileError(path, "holds no tensors by name: no state dict of a model")
    return tensors, {key: reason for key, reason in aside.items() if key not in tensors}


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(type(item) is _Stored for item in value.values())


def _kind(value: Any) -> str:
    return {dict: "a dictionary", list: "a list", tuple: "a tuple", str: "text", type(None): "nothing"}.get(
        type(value), "a number" if isinstance(value, int | float) else "something else"
    )


def _info(archive: _Archive, name: str, stored: _Stored, keys: tuple[str, ...]) -> PickledTensor:
    def wrong(what: str) -> CorruptFileError:
        return CorruptFileError(archive.path, f"malformed: {what}", name)

    member = archive.members.get(f"data/{stored.storage.key}")
    if member is None:
        raise wrong(f"its storage {stored.storage.key} is not in the archive")
    place, length = member
    if stored.storage.count * _DTYPES[stored.storage.dtype][1] != length:
        raise wrong(f"its storage would have {stored.storage.count:,} values, but has {length:,} bytes")
    dtype, width = _DTYPES[stored.dtype]
    size = math.prod(stored.shape)
    last = sum((count - 1) * stride for count, stride in zip(stored.shape, stored.strides, strict=True))
    if size and (size * width > length or (stored.offset + last + 1) * width > length):
        raise wrong(f"its shape {list(stored.shape)} holds more than its storage of {length:,} bytes")
    contiguous, step = True, 1
    for count, stride in zip(reversed(stored.shape), reversed(stored.strides), strict=True):
        contiguous &= count == 1 or stride == step
        step *= count
    span = (place + stored.offset * width, size * width) if contiguous or not size else member
    return PickledTensor(name, dtype, stored.shape, archive.path, span, keys)
