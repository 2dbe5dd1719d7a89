"""What a GGUF file's header says, bounded and checked before anything is read, and its tensors as torch has them.

After ggml's ``docs/gguf.md``, versions 2 and 3.  Sizes of a shape are stored with the last of torch's first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spectra.errors import CorruptFileError, MissingFileError, UnsupportedMethodError
from spectra.files.configs import MAX_NAME, check_regular
from spectra.files.headers import CHUNK, MAX_HEADER_BYTES, ForeignTensor, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 20_000  # of one file; experts are stacked, so that the largest models have 2,000
MAX_FIELDS = 10_000  # models have less than 100
MAX_ITEMS = 2_000_000  # of all arrays of text: a vocabulary of 262,144 with its merges has 800,000
KEPT_TEXT, KEPT_ITEMS = 256, 1024  # of a value; of all arrays: a number for each layer, the tokens of an aLoRA
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 16

# ggml's number of a type → its name, values a block, bytes a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
LAYOUTS = {name: (values, width) for name, values, width in TYPES.values()}
BLOCKS = frozenset(name for name, (values, _) in LAYOUTS.items() if values > 1)  # quantised, in blocks with scales
# What numpy calls the others; of blocks the bytes are read.
_NUMPY = {
    "F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<i2", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
}  # fmt: skip
# Number of a value's type → how struct reads it.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor(ForeignTensor):
    """A tensor of a GGUF file; ``heads`` of a model's query or key weight whose rows are put in order again."""

    heads: int | None = None

    @property
    def as_stored(self) -> bool:
        return self.heads is None

    @property
    def shape_as_read(self) -> tuple[int, ...]:
        if self.dtype not in BLOCKS:
            return self.shape
        values, width = LAYOUTS[self.dtype]
        return *self.shape[:-1], self.shape[-1] // values * width

    def value(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its leading rows; of one in blocks the bytes (…, bytes a row), uint8."""
        import numpy as np
        import torch

        kind, shape = np.dtype(_NUMPY.get(self.dtype, "u1")), self.shape_as_read
        whole = self.heads is not None or rows is None or not shape
        begin, end, step = (0, math.prod(shape), 1) if whole else rows.indices(shape[0])  # type: ignore[union-attr]
        row = 1 if whole else math.prod(shape[1:])
        wanted = max(0, end - begin) * row
        try:
            found = np.fromfile(self.file, kind, wanted, offset=self.span[0] + begin * row * kind.itemsize)
        except (OSError, ValueError) as error:
            raise CorruptFileError(self.file, f"could not be read: {error}", self.name) from None
        if found.size != wanted:
            raise CorruptFileError(self.file, "the file changed while it was being read", self.name)
        tensor = torch.from_numpy(found)
        if self.dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        if not whole:
            return tensor.reshape(-1, *shape[1:])[::step]
        tensor = tensor.reshape(shape)
        if self.heads is not None:
            tensor = in_order(tensor, self.heads)
        return tensor if rows is None else tensor[rows]


def in_order(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix, (out, …), in the order that transformers has them in.

    The converter of llama.cpp (``LlamaModel.permute``) takes (head, half, pair) to (head, pair, half), since ggml
    rotates neighbours where transformers rotates a first half against a second; this takes it back.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def check_heads(info: TensorInfo, heads: int) -> None:
    """Raises CorruptFileError unless the rows are those of that many heads, each of an even width."""
    if heads < 1 or not info.shape or info.shape[0] % (2 * heads):
        raise CorruptFileError(info.file, f"its shape {list(info.shape)} is not that of {heads} heads", info.name)


@dataclass(frozen=True)
class GgufFile:
    """``fields`` are the metadata, without long texts and arrays; ``tensors`` as named in the file."""

    fields: Mapping[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """A file read forwards in chunks, as far as a header may go."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.size, self._file = path, size, file
        self.at = 0
        self._buffer, self._start = b"", 0
        self.passed = self.kept = 0  # items of arrays

    def take(self, count: int) -> bytes:
        self._check(count)
        if self.at + count > self._start + len(self._buffer) or self.at < self._start:
            self._file.seek(self.at)
            self._buffer, self._start = self._file.read(max(count, CHUNK)), self.at
        begin = self.at - self._start
        data = self._buffer[begin : begin + count]
        if len(data) < count:
            raise CorruptFileError(self.path, "truncated: it ends within its header")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        self._check(count)
        self.at += count

    def _check(self, count: int) -> None:
        if self.at + count > self.size:
            raise CorruptFileError(self.path, "truncated: its header says that more follows than the file has")
        if self.at + count > MAX_HEADER_BYTES:
            raise CorruptFileError(self.path, f"malformed: its header has more than {MAX_HEADER_BYTES:,} bytes")

    def skip_texts(self, count: int) -> None:
        self.passed += count
        if self.passed > MAX_ITEMS:
            raise CorruptFileError(self.path, f"malformed: arrays of more than {MAX_ITEMS:,} texts")
        while count:
            buffer, place = self.take(min(CHUNK, self.size - self.at)), 0
            self.at -= len(buffer)
            while count and place + 8 <= len(buffer):
                place += 8 + int.from_bytes(buffer[place : place + 8], "little")
                count -= 1
            if not place:
                raise CorruptFileError(self.path, "truncated: it ends within its header")
            self.skip(place)

    def number(self, form: str = "<Q") -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def name(self, what: str) -> str:
        length = self.number()
        if not 0 < length <= MAX_NAME:
            raise CorruptFileError(self.path, f"malformed: {what} of {length:,} bytes; expected 1 to {MAX_NAME}")
        try:
            text = self.take(length).decode()
        except UnicodeDecodeError:
            text = "\0"
        if not text.isprintable():
            raise CorruptFileError(self.path, f"malformed: {what} that is no text")
        return text


def read_gguf(path: Path) -> GgufFile:
    """What a GGUF file says it holds, checked against its size.

    Raises
    ------
    MissingFileError, CorruptFileError
    UnsupportedMethodError : big-endian numbers, another version.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            cursor = _Cursor(path, file, size)
            tensors_wanted, fields_wanted = _counts(cursor)
            fields: dict[str, Any] = {}
            for _ in range(fields_wanted):
                key = cursor.name("a key")
                if key in fields:
                    raise CorruptFileError(path, f"malformed: the key {key!r} occurs twice")
                fields[key] = _value(cursor, cursor.number("<I"))
            entries = [_entry(cursor) for _ in range(tensors_wanted)]
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None
    if not entries and not fields.get("split.count"):  # the first part of a model may have none
        raise CorruptFileError(path, "holds no tensors")
    return GgufFile(
        {key: value for key, value in fields.items() if value is not None}, _placed(cursor, fields, entries)
    )


def _counts(cursor: _Cursor) -> tuple[int, int]:
    path = cursor.path
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise CorruptFileError(path, "no GGUF file, or a truncated one")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise UnsupportedMethodError(path, "this GGUF file has big-endian numbers, which this version cannot read")
    if version not in VERSIONS:
        raise UnsupportedMethodError(path, f"GGUF version {version} cannot be read by this version (2 and 3 can)")
    tensors, fields = cursor.number(), cursor.number()
    # A tensor takes 25 bytes of header at the least, a field 14.
    if tensors * 25 + fields * 14 > min(cursor.size, MAX_HEADER_BYTES) or fields > MAX_FIELDS or tensors > MAX_TENSORS:
        raise CorruptFileError(path, f"malformed: {tensors:,} tensors and {fields:,} fields in {cursor.size:,} bytes")
    return tensors, fields


def _value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    """A value; None for one that is too long to be kept."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _TEXT:
        length = cursor.number()
        if length > KEPT_TEXT:
            cursor.skip(length)
            return None
        return cursor.take(length).decode(errors="replace")
    if kind != _ARRAY:
        raise CorruptFileError(cursor.path, f"malformed: a value of type {kind}, which GGUF does not have")
    inner, count = cursor.number("<I"), cursor.number()
    if depth > 2:
        raise CorruptFileError(cursor.path, "malformed: arrays within arrays within arrays")
    if inner in _SCALARS and cursor.kept + count > KEPT_ITEMS:
        cursor.skip(count * struct.calcsize(_SCALARS[inner]))
        return None
    if inner == _TEXT:
        cursor.skip_texts(count)
        return None
    cursor.kept += count
    if cursor.kept > KEPT_ITEMS:
        raise CorruptFileError(cursor.path, f"malformed: more than {KEPT_ITEMS:,} arrays within arrays")
    return [_value(cursor, inner, depth + 1) for _ in range(count)]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape as torch has it, type, offset)."""
    name = cursor.name("a tensor's name")
    dimensions = cursor.number("<I")
    if not 0 <= dimensions <= MAX_DIMENSIONS:
        raise CorruptFileError(cursor.path, f"malformed: {dimensions} dimensions", name)
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    return name, tuple(reversed(sizes)), cursor.number("<I"), cursor.number()


def _placed(
    cursor: _Cursor, fields: Mapping[str, Any], entries: list[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, TensorInfo]:
    """The tensors where they lie: one after the other, each begun at a multiple of the alignment."""
    path = cursor.path
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CorruptFileError(path, f"malformed: an alignment of {str(alignment)[:40]}")
    start, expected = -(-cursor.at // alignment) * alignment, 0
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CorruptFileError(path, "this name occurs twice in the header", name)
        if kind not in TYPES:
            raise CorruptFileError(path, f"type {kind} of ggml is not known to this version", name)
        dtype, block, width = TYPES[kind]
        if block > 1 and (not shape or shape[-1] % block):
            row = shape[-1] if shape else 1
            raise CorruptFileError(path, f"malformed: rows of {row:,} values in blocks of {block}", name)
        length = math.prod(shape) // block * width
        if offset != expected:
            raise CorruptFileError(path, f"malformed: it begins at {offset:,}, where {expected:,} was expected", name)
        if start + offset + length > cursor.size:
            raise CorruptFileError(
                path, f"truncated: shape {list(shape)} of {dtype} takes {length:,} bytes, which the file has not", name
            )
        expected = -(-(offset + length) // alignment) * alignment
        tensors[name] = GgufTensor(name, dtype, shape, path, (start + offset, length))
    return tensors
