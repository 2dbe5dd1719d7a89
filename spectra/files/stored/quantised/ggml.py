"""ggml's quantised types, in which GGUF files hold most models: blocks of some values with scales of their own.

The arithmetic is that of the package ``gguf``, which llama.cpp keeps beside its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spectra.errors import UnsupportedMethodError
from spectra.files.derived import Derived, Make, Reader, Unreadable
from spectra.files.gguf.headers import BLOCKS, LAYOUTS
from spectra.files.headers import TensorInfo
from spectra.files.stored.quantised.weights import Quantised

if TYPE_CHECKING:
    from torch import Tensor

SLAB = 1 << 20  # values that are dequantised at once: the package keeps all of them twice
# What the package dequantises, but for NVFP4, whose tensors have a scale of their own in another.
READ = BLOCKS - {"Q8_1", "Q8_K", "Q1_0", "NVFP4"}


def ggml(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """A weight for each tensor in blocks."""
    for name, info in checkpoint.weights.items():
        if info.dtype not in BLOCKS:
            continue
        if info.dtype not in READ:
            yield checkpoint.refused(name, f"quantised ({info.dtype} of GGUF): this version does not read it", [name])
            continue
        how = f"{info.dtype} in blocks of {LAYOUTS[info.dtype][0]}"
        yield checkpoint.derived(name, info.shape, [info], _from(info), how, info.dtype)


def _from(info: TensorInfo) -> Make:
    def make(read: Reader, rows: slice | None) -> Tensor:
        if rows is None or len(info.shape) > 1:
            return dequantised(info, read(info.name, rows))
        return dequantised(info, read(info.name))[rows]  # a vector's blocks lie across what would be its rows

    return make


def dequantised(info: TensorInfo, stored: Tensor) -> Tensor:
    """The values (…, n), float32, of a tensor's bytes (…, bytes a row)."""
    import numpy as np
    import torch

    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UnsupportedMethodError(
            info.file, f"stored as {info.dtype}, which takes the package gguf: pip install gguf", info.name
        ) from None
    values, width = LAYOUTS[info.dtype]
    kind = GGMLQuantizationType[info.dtype]
    rows = stored.numpy().reshape(math.prod(stored.shape[:-1]), stored.shape[-1])
    made = np.empty((rows.shape[0], rows.shape[1] // width * values), np.float32)
    each = max(1, SLAB // max(1, made.shape[1]))
    with np.errstate(all="ignore"):  # scales may be anything; what is not finite is refused where it is analysed
        for at in range(0, rows.shape[0] if made.size else 0, each):
            made[at : at + each] = dequantize(rows[at : at + each], kind)
    return torch.from_numpy(made).reshape(*stored.shape[:-1], made.shape[1])
