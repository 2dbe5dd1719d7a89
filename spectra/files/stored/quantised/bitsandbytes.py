"""bitsandbytes: nf4 and fp4 (Linear4bit) and int8 (Linear8bitLt).

Four bits: two codes a byte, the first in the upper half, along the flattened weight; each block of ``blocksize``
values has the value that 1 stands for (``absmax``), which may itself be quantised ("double quantisation": a byte into a
map of 256 values, a scale for each ``nested_blocksize`` of them, and one offset for all).  Shape and settings are JSON
in a small tensor.  Eight bits: each row times its ``SCB / 127``.

Source: bitsandbytes 0.50, ``functional.QuantState``, ``backends/default/ops.py``, ``nn/modules.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Reader, Unreadable
from spectra.files.headers import TensorInfo
from spectra.files.stored.quantised.weights import Quantised, blocks_of, expect, is_count, small_json, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
AT_ONCE = 1 << 20  # values that are unpacked at a time
# functional.get_4bit_type: the values that the 16 codes stand for
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


def four_bit(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """Weights with a quant_state beside them."""
    for name, info in checkpoint.weights.items():
        weight, marker, kind = name.rpartition(STATE)
        if not marker:
            continue
        if kind not in CODES:
            names = [name] + [key for key in checkpoint.modules.get(weight, ()) if key != name]
            yield checkpoint.refused(weight, f"quantised as {kind[:20]!r} by bitsandbytes: not a known type", names)
            continue
        yield _four_bit(checkpoint, weight, info, kind)


def _four_bit(checkpoint: Quantised, name: str, state: TensorInfo, kind: str) -> Derived:
    packed = checkpoint.partner(state, name)
    said = small_json(state)
    shape, blocksize = _settings(state, said, kind)
    count = math.prod(shape)
    if len(packed.shape) != 2 or packed.shape[1] != 1 or packed.span[1] != (count + 1) // 2:
        raise CorruptFileError(
            packed.file,
            f"{packed.dtype} of shape {list(packed.shape)}; {state.name!r} says {list(shape)}, of which two values "
            "make a byte",
            packed.name,
        )
    absmax, values = (checkpoint.partner(state, f"{name}.{part}") for part in ("absmax", "quant_map"))
    expect(values, ("F32",), (16,))
    blocks = blocks_of(count, blocksize)
    sources = [packed, state, absmax, values]
    if "nested_blocksize" in said:
        expect(absmax, ("U8",), (blocks,))
        nested, nested_map = (
            checkpoint.partner(state, f"{name}.{part}") for part in ("nested_absmax", "nested_quant_map")
        )
        expect(nested_map, ("F32",), (256,))
        expect(nested, ("F32",), (blocks_of(blocks, said["nested_blocksize"]),))
        sources += [nested, nested_map]
    else:
        expect(absmax, ("F32",), (blocks,))

    def make(read: Reader, rows: slice | None) -> Tensor:
        width = math.prod(shape[1:])
        first, last, _ = (rows or slice(None)).indices(shape[0])
        begin, end = first * width, max(first, last) * width
        code = _code(read, values, kind)
        if rows is None:
            at, block, stored, scales = 0, 0, read(name), _absmax(read, name, said)
        else:  # what these rows lie in: bytes that hold two values each, in elements of a byte or more; and blocks
            size = packed.span[1] // packed.shape[0]
            at, block = begin // 2 // size, begin // blocksize
            stored = read(name, slice(at, blocks_of(end, 2 * size)))
            scales = _absmax(read, name, said, slice(block, blocks_of(end, blocksize)))
            at *= 2 * size
        made = _unpacked(stored, code, scales, at, block, blocksize, begin, end)
        return made.reshape(-1, *shape[1:])

    how = f"{kind}, blocks of {blocksize}{', scales quantised too' if 'nested_blocksize' in said else ''}"
    return checkpoint.derived(name, shape, sources, make, how, kind, linear=True)


def _settings(state: TensorInfo, said: Mapping[str, Any], kind: str) -> tuple[tuple[int, ...], int]:
    """Shape and block size; raises CorruptFileError where what the JSON says makes no sense."""

    def wrong(key: str, expected: str) -> CorruptFileError:
        return CorruptFileError(state.file, f"{key} = {str(said.get(key))[:80]}; expected {expected}", state.name)

    shape, blocksize = said.get("shape"), said.get("blocksize")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(is_count(size) for size in shape):
        raise wrong("shape", "a list of whole numbers")
    if blocksize not in BLOCKSIZES or type(blocksize) is not int:
        raise wrong("blocksize", f"one of {', '.join(map(str, BLOCKSIZES))}")
    if said.get("quant_type") != kind:
        raise wrong("quant_type", f"{kind!r}, as in its name")
    offset = said.get("nested_offset")
    if "nested_blocksize" in said or offset is not None:
        if not is_count(said.get("nested_blocksize"), 4096):
            raise wrong("nested_blocksize", "a whole number up to 4096")
        if type(offset) not in (int, float) or not math.isfinite(float(str(offset))):
            raise wrong("nested_offset", "a number")
    return tuple(shape), blocksize


def _code(read: Reader, values: TensorInfo, kind: str) -> Tensor:
    """The stored map of the 16 codes, which must be the type's own: the writer reads it with its own in any case."""
    import torch

    stored = read(values.name)
    own = torch.tensor(CODES[kind], dtype=torch.float64)
    if not bool((stored.double() - own).abs().max() <= 1e-6):
        raise CorruptFileError(values.file, f"these are not the 16 values of {kind}", values.name)
    return stored


def _absmax(read: Reader, name: str, said: Mapping[str, Any], blocks: slice | None = None) -> Tensor:
    stored = read(f"{name}.absmax", blocks)
    if "nested_blocksize" not in said:
        return stored
    import torch

    values = read(f"{name}.nested_quant_map")[stored.long()]
    places = torch.arange(len(values)) + (blocks.start if blocks else 0)
    scales = read(f"{name}.nested_absmax")[places // said["nested_blocksize"]]
    return values * scales + torch.tensor(float(said["nested_offset"]), dtype=torch.float32)


def _unpacked(
    packed: Tensor, code: Tensor, scales: Tensor, value: int, block: int, blocksize: int, begin: int, end: int
) -> Tensor:
    """Values ``begin`` to ``end`` in float32: code · absmax, without more than AT_ONCE of what lies between.

    ``packed`` begins with the value of that number, an even one, ``scales`` with the block.
    """
    import torch

    stored = packed.reshape(-1).view(torch.uint8)
    made = torch.empty(end - begin, dtype=torch.float32)
    at = begin
    while at < end:
        stop = min(at - at % 2 + AT_ONCE, end)
        part = stored[(at - value) // 2 : (stop - value + 1) // 2]
        codes = torch.stack((part >> 4, part & 15), dim=-1).reshape(-1)[at % 2 :][: stop - at]
        places = torch.arange(at, stop) // blocksize - block
        made[at - begin : stop - begin] = code[codes.long()] * scales[places]
        at = stop
    return made


def eight_bit(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """Weights of bytes with a row of ``SCB`` beside them."""
    for name, scb in checkpoint.weights.items():
        if not name.endswith(".SCB"):
            continue
        module = name.removesuffix(".SCB")
        weight = checkpoint.partner(scb, f"{module}.weight")
        if weight.dtype in ("F32", "F16", "BF16"):
            continue  # kept in half precision: the statistics are left over
        if len(expect(weight, ("I8",)).shape) != 2:
            raise CorruptFileError(weight.file, f"shape {list(weight.shape)}; expected a matrix", weight.name)
        expect(scb, ("F32",), weight.shape[:1])
        sources = [weight, scb]
        marked = checkpoint.get(f"{module}.weight_format")
        if marked is not None:
            sources.append(marked)
            if whole_numbers(expect(marked, ("U8",), (), (1,))) != (0,):
                reason = "int8 in a tiled order of bitsandbytes before 0.45: only rows are read"
                yield checkpoint.refused(weight.name, reason, [info.name for info in sources])
                continue
        make = _rows_of(weight, scb)
        yield checkpoint.derived(weight.name, weight.shape, sources, make, "int8, a scale a row", "int8", linear=True)


def _rows_of(weight: TensorInfo, scb: TensorInfo) -> Any:
    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        # The reciprocal of 127 as the writer's kernels have it.
        return read(weight.name, rows).to(torch.float32).mul_(read(scb.name, rows)[:, None]).mul_(7.874015718698502e-3)

    return make
