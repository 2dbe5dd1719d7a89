"""What files say before any tensor is read: safetensors headers.

Whoever made a file may have meant harm, so everything is bounded before it is read or parsed.  A header is parsed
entry by entry: one that is broken costs no memory in proportion to its length.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from spectra.errors import CorruptFileError, MissingFileError, UnsafeFileError
from spectra.files.configs import MAX_NAME, check_regular, unique_names
from spectra.files.values import DTYPES, Stamp, stamp_of, values_at

if TYPE_CHECKING:
    from torch import Tensor

BYTES_PER_ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # what can be analysed
# Every dtype of safetensors 0.8 and its bits an element.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_ADVICE = (
    "this is a pickle, which can run code when it is read; a state dict is read as it is with --allow-pickle "
    "(allow_pickle=True), which runs nothing of it; or, where you trust it, convert it: what the model's class loads, "
    "such as AutoModel.from_pretrained(…), its save_pretrained(…) writes as safetensors, shards and tied weights too"
)

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_METADATA_BYTES = 32_000_000  # trainers store their settings and captions there, of some megabytes
MAX_PADDING_BYTES = 1_000_000  # writers align to 8 bytes, some to pages
MAX_ENTRY_BYTES = 1 << 16
# An entry takes some 70 bytes: from here on a header must be smaller than the data it describes.
MANY_ENTRIES_BYTES = 1 << 19
CHUNK = 1 << 18

_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]|\\.)*+"'
_NAME = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_VALUE = re.compile(rb"(\{[^{}]*+\})" + _SPACE + rb"([,}])")
_BLANK = re.compile(_SPACE)
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # of a string, up to its end or the chunk's
_BETWEEN = re.compile(rb"[ \t\r\n:,]*+")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    ``shape`` is as stored, ``dtype`` safetensors' name, ``span`` the place and number of its bytes in
    the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    span: tuple[int, int]
    stamp: Stamp | None = field(default=None, kw_only=True, compare=False, repr=False)  # of the file, when opened

    @property
    def is_float(self) -> bool:
        return self.dtype in BYTES_PER_ELEMENT

    @property
    def holds_floats(self) -> bool:
        """Whether its values are numbers with a point, eight bits included, which without scales only factors have."""
        return self.is_float or self.dtype in ("F8_E4M3", "F8_E5M2")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def as_stored(self) -> bool:
        """Whether its value's bytes are those of ``span``, in their order."""
        return True

    @property
    def shape_as_read(self) -> tuple[int, ...]:
        """That of its value: ``shape``, but where several values share bytes that are read as such."""
        return self.shape


@dataclass(frozen=True)
class ForeignTensor(TensorInfo):
    """One that is not read from a safetensors file under its own name, and knows how it is."""

    def value(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its leading rows; raises CorruptFileError."""
        raise NotImplementedError


@dataclass(frozen=True)
class Renamed(ForeignTensor):
    """A tensor stored under another name; ``stored`` is what the file says."""

    stored: TensorInfo | None = None

    @property
    def as_stored(self) -> bool:
        return self.stored is None or self.stored.as_stored

    @property
    def shape_as_read(self) -> tuple[int, ...]:
        return self.shape if self.stored is None else self.stored.shape_as_read

    def value(self, rows: slice | None = None) -> Tensor:
        assert self.stored is not None
        return stored_value(self.stored, rows)


def stored_value(info: TensorInfo, rows: slice | None = None) -> Tensor:
    """A tensor as its file holds it, or some of its leading rows; raises CorruptFileError."""
    from safetensors import SafetensorError, safe_open

    if isinstance(info, ForeignTensor):
        return info.value(rows)
    if info.dtype in DTYPES:
        return values_at(info.file, info.span[0], info.dtype, info.shape, rows, info.name, info.stamp)
    try:  # of less than a byte each: how torch has them is the library's business
        with safe_open(info.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(info.name) if rows is None else file.get_slice(info.name)[rows]
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(info.file, f"could not be read: {error}", info.name) from None
    return tensor


def leads_out(file: Path, folder: Path) -> Path | None:
    """Where a link leads that leaves its folder for anything but the hub cache's own blobs; else None."""
    try:
        target, home = file.resolve(), folder.resolve()
    except RuntimeError:  # a circle leads nowhere: opening it will say so
        return None
    if home in target.parents:
        return None
    for parent in home.parents:  # models--org--name/snapshots/<commit>[/subfolder]
        if parent.name == "snapshots" and parent.parent / "blobs" in target.parents:
            return None
    return target


def check_within(file: Path, folder: Path) -> Path:
    """The file itself; raises UnsafeFileError where it is a link that leads out of the folder."""
    outside = leads_out(file, folder)
    if outside is not None:
        raise UnsafeFileError(
            file, f"this is a link that leads out of its folder, to {outside}; name that itself, or copy it"
        )
    return file


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file says it holds, checked against its size.

    Beyond what the safetensors library checks, names that occur twice are refused, and the usual
    things that are mistaken for safetensors are recognised: git-LFS pointers and pickles.

    Raises
    ------
    MissingFileError, CorruptFileError, UnsafeFileError
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = check_regular(path)
        with path.open("rb") as file:
            start = file.read(56)
            _sniff(path, start)
            length = int.from_bytes(start[:8], "little")
            _check_length(path, start, length, size)
            file.seek(8)
            tensors = _read_entries(path, file, length, size, stamp_of(os.fstat(file.fileno())))
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None
    if not tensors:
        raise CorruptFileError(path, "holds no tensors")
    _check_spans(path, tensors, 8 + length, size)
    try:
        with safe_open(path, framework="np"):
            pass  # the library, which reads the tensors, must agree
    except (SafetensorError, OSError) as error:
        problem = str(error).removeprefix("Error while deserializing header: ")
        raise CorruptFileError(path, f"malformed: {problem[:200]}") from None
    return tensors


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(
            path, f"not a safetensors file (its header would have {length:.1e} bytes, over the format's limit)"
        )
    if size < 8 + length:
        raise CorruptFileError(path, f"truncated: the header says {length:,} bytes, the file has {size:,}")
    if start[8:9] != b"{":
        raise CorruptFileError(path, "not a safetensors file: its header is not JSON (it begins with no brace)")


def _read_entries(path: Path, file: BinaryIO, length: int, size: int, stamp: Stamp) -> dict[str, TensorInfo]:
    scanner = _Scanner(file, length)
    tensors: dict[str, TensorInfo] = {}
    used = 0
    not_json = CorruptFileError(path, "not a safetensors file: its header is not JSON")
    scanner.fill()
    scanner.at, after = 1, b","  # past the brace
    if scanner.take(re.compile(_SPACE + rb"\}")):
        after = b"}"
    while after == b",":
        scanner.fill()
        begun = scanner.at
        key = scanner.take(_NAME)
        if key is None:
            if len(scanner.rest) > MAX_ENTRY_BYTES and scanner.rest.lstrip().startswith(b'"'):
                raise CorruptFileError(path, f"a tensor's name is longer than {MAX_NAME} letters: malformed")
            raise not_json
        name = _checked_name(path, key[1])
        if name == "__metadata__":
            after = _skip_metadata(path, scanner)
            continue
        if name in tensors:
            raise CorruptFileError(path, "this name occurs twice in the header", name)
        scanner.fill()
        entry = scanner.take(_VALUE)
        if entry is None:
            begins = repr(scanner.rest[:40].decode(errors="replace"))
            raise CorruptFileError(path, f"malformed: its entry in the header is not JSON, or not one: {begins}", name)
        tensors[name] = _tensor(path, name, entry[1], 8 + length, stamp)
        used += scanner.at - begun
        if used > max(MANY_ENTRIES_BYTES, size - length):
            raise CorruptFileError(path, "malformed: its header is larger than the data that it describes")
        after = entry[2]
    blank = 0
    while scanner.fill():
        padding = scanner.take(_BLANK)
        blank += len(padding[0]) if padding else 0
        if not padding or not padding[0]:
            raise not_json
        if blank > MAX_PADDING_BYTES:
            raise CorruptFileError(path, f"malformed: its header ends in over {MAX_PADDING_BYTES:,} bytes of padding")
    return tensors


class _Scanner:
    """A header in chunks: ``rest`` is what was read and not yet taken."""

    def __init__(self, file: BinaryIO, length: int):
        self._file, self._left = file, length
        self._buffer = b""
        self.at = 0

    @property
    def rest(self) -> bytes:
        return self._buffer[self.at : self.at + MAX_ENTRY_BYTES + 1]

    @property
    def more(self) -> bool:
        """Whether the file has more than was read."""
        return self._left > 0

    def fill(self) -> bool:
        """Reads on until the longest entry would be there; whether anything is left."""
        if len(self._buffer) - self.at <= MAX_ENTRY_BYTES + 8 * MAX_NAME and self._left:
            more = self._file.read(min(CHUNK, self._left))
            self._left = self._left - len(more) if more else 0
            self._buffer, self.at = self._buffer[self.at :] + more, 0
        return self.at < len(self._buffer)

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        match = pattern.match(self._buffer, self.at)
        if match:
            self.at = match.end()
        return match


def _checked_name(path: Path, stored: bytes) -> str:
    try:
        plain = stored[1:-1]
        if b"\\" not in plain and plain.isascii() and plain.decode().isprintable():
            name = plain.decode()  # as JSON reads it, which takes ten times as long
        else:
            name = json.loads(stored.decode())
    except ValueError as error:
        raise CorruptFileError(path, f"malformed: a tensor's name is not text: {error}") from None
    if len(name) > MAX_NAME:
        raise CorruptFileError(path, f"a tensor's name is longer than {MAX_NAME} letters: {name[:40]!r}…")
    if not name.isprintable():  # what would end up in a terminal, or split a line
        raise CorruptFileError(path, f"a tensor's name holds control characters: {name[:80]!r}")
    return name


def _skip_metadata(path: Path, scanner: _Scanner) -> bytes:
    """Passes over names and values that are strings, or over null; returns what follows."""
    wrong = CorruptFileError(path, "malformed: __metadata__ is no object of strings")
    nothing = scanner.take(re.compile(rb"null" + _SPACE + rb"([,}])"))  # as mlx writes it
    if nothing is not None:
        return nothing[1]
    if not scanner.take(re.compile(rb"\{")):
        raise wrong
    passed, within = 0, False
    while scanner.fill():
        match = scanner.take(_INSIDE if within else _BETWEEN)
        passed += len(match[0]) if match else 0
        mark = scanner.rest[:1]
        if passed > MAX_METADATA_BYTES:
            raise CorruptFileError(path, f"malformed: __metadata__ of over {MAX_METADATA_BYTES:,} bytes")
        if mark == b'"':
            within = not within
        elif mark == b"}" and not within:
            scanner.at += 1
            scanner.fill()
            end = scanner.take(re.compile(_SPACE + rb"([,}])"))
            if end is None:
                raise wrong
            return end[1]
        elif mark and (mark != b"\\" or not scanner.more):  # a backslash at a chunk's end is completed by the next
            raise wrong
        if mark == b'"':
            scanner.at += 1
    raise wrong


def _tensor(path: Path, name: str, stored: bytes, begins: int, stamp: Stamp) -> TensorInfo:
    """One entry, checked by itself."""
    try:
        entry = json.loads(stored.decode())
        if len(entry) != stored.count(b":"):  # a key that occurs twice, or a colon in a text
            entry = json.loads(stored.decode(), object_pairs_hook=unique_names(path, name))
    except CorruptFileError:
        raise
    except (ValueError, RecursionError):
        raise CorruptFileError(path, "malformed: its entry in the header is not JSON", name) from None
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CorruptFileError(path, f"malformed: unknown dtype {str(dtype)[:40]!r}", name)
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
            raise CorruptFileError(path, f"malformed: {key} = {str(value)[:80]}; expected whole numbers", name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFileError(path, f"malformed: invalid offset for tensor: {str(offsets)[:80]}", name)
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise CorruptFileError(
            path, f"malformed: invalid shape: {str(shape)[:80]} of {dtype} does not make {end - begin:,} bytes", name
        )
    return TensorInfo(name, dtype, tuple(shape), path, (begins + begin, end - begin), stamp=stamp)


def _check_spans(path: Path, tensors: dict[str, TensorInfo], begins: int, size: int) -> None:
    """The tensors lie one after the other, without a gap, to the end of the file."""
    end = begins
    for info in sorted(tensors.values(), key=lambda info: (info.span[0], info.span[1])):
        if info.span[0] != end:
            how = "overlaps the one before" if info.span[0] < end else "leaves a gap before it"
            raise CorruptFileError(path, f"malformed: invalid offset for tensor: it {how}", info.name)
        end += info.span[1]
    if end != size:
        raise CorruptFileError(
            path, f"truncated or swapped: its size does not fit its header (expected {end:,} bytes, found {size:,})"
        )


def _sniff(path: Path, start: bytes) -> None:
    if not start:
        raise CorruptFileError(path, "the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CorruptFileError(path, "this is a git-LFS pointer, not the weights; fetch them with `git lfs pull`")
    if start[8:9] == b"{" and path.suffix not in PICKLE_SUFFIXES:
        return
    # A zip (torch.save since 1.6), or a pickle's PROTO opcode where a length should be.
    pickled = start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] in b"\2\3\4\5")
    if pickled or path.suffix in PICKLE_SUFFIXES:
        raise UnsafeFileError(path, PICKLE_ADVICE)
    if start.startswith(b"GGUF"):
        raise CorruptFileError(path, "this is a GGUF file; it is read as one where its name ends in .gguf")
    if len(start) < 8:
        raise CorruptFileError(path, f"truncated: {len(start)} bytes are too few for a safetensors file")
