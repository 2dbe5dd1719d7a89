"""A tensor's values, read where they lie in a file.

The file is opened for one tensor and closed again, and its header is not parsed again: of 36,000 factors in one file
each would cost 45 ms (measured).  A map instead of a read would count every page ever touched, and end the process
where the file shrinks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.errors import CorruptFileError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' names and torch's.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip

HALVES = ("F16", "BF16")

Stamp = tuple[int, int]  # size and time of the last change


def half_precision(dtype: str | None) -> torch.dtype | None:
    """torch's dtype of that name if it is of half precision, else None."""
    import torch

    return getattr(torch, DTYPES[dtype]) if dtype in HALVES else None


def stamp_of(status: os.stat_result) -> Stamp:
    """What changes where a file's content does."""
    return status.st_size, status.st_mtime_ns


def raw_at(file: Path, place: int, count: int, name: str, stamp: Stamp | None) -> Tensor:
    """``count`` bytes as a tensor of uint8, which lies where torch's own do: BLAS' last digits depend on that.

    Raises
    ------
    CorruptFileError : the file is not what it was when ``stamp`` was taken.
    """
    import torch

    raw = torch.empty(count, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(place)
            while done < count and (more := opened.readinto(view[done:])):  # at most 2 GB at a time
                done += more
            now = stamp_of(os.fstat(opened.fileno()))
    except OSError as error:
        raise CorruptFileError(file, f"could not be read: {error.strerror or error}", name) from None
    if done != count or stamp not in (None, now):
        raise CorruptFileError(file, "the file changed while it was being read", name)
    return raw


def values_at(
    file: Path, place: int, dtype: str, shape: tuple[int, ...], rows: slice | None, name: str, stamp: Stamp | None
) -> Tensor:
    """A tensor of one of ``DTYPES`` whose values lie in order from ``place`` on, or some of its leading rows."""
    import torch

    kind = getattr(torch, DTYPES[dtype])
    begin, step, row = 0, 1, 1
    for size in shape[1:]:
        row *= size
    if rows is not None and shape:
        begin, end, step = rows.indices(shape[0])
        shape = (max(0, end - begin), *shape[1:])
    count = row * shape[0] if shape else 1
    if not count:
        return torch.empty(shape, dtype=kind)[::step] if shape else torch.empty(shape, dtype=kind)
    raw = raw_at(file, place + begin * row * kind.itemsize, count * kind.itemsize, name, stamp)
    tensor: Tensor = raw.view(kind).view(shape)
    return tensor if step == 1 else tensor[::step]
