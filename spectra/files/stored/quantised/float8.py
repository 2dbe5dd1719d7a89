"""Eight-bit weights of torch's own dtypes, and gpt-oss's MXFP4.

fp8: every value is its own float, times a scale: one for all, one for each row, or one for each block, whose size is
in ``config.json`` (DeepSeek's 128 by 128; the last blocks may be shorter).  ``weight_scale_inv`` is multiplied with,
whatever its name says.  Scales of activations are not part of the weight.  Without a scale the floats are the weight,
where it has a parameter's name and the config names no method.

int8 of compressed-tensors: the same, less a zero point where there is one.

MXFP4: two e2m1 floats a byte, the first in the lower half, times 2^(scale − 127) for each 32 values of a row.

Sources: transformers 5.23, ``integrations/finegrained_fp8.py`` (``_dequantize_fp8_weight``) and ``mxfp4.py``
(``convert_moe_packed_tensors``); compressed-tensors 0.20, ``compressors/naive_quantized``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Make, Reader, Unreadable, Weight
from spectra.files.headers import TensorInfo
from spectra.files.stored.experts import FROM_HIDDEN, TO_HIDDEN
from spectra.files.stored.quantised.weights import SCALES, Quantised, blocks_of, expect, is_count

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
# Parameters that are a weight under their own names.
PARAMETERS = frozenset({"weight", "in_proj_weight"}) | FROM_HIDDEN | TO_HIDDEN
# Of activations, by their names in a module, or after a parameter's name and an underscore.
ACTIVATIONS = ("input_scale", "activation_scale", "act_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_BYTES = 16  # of a block of 32 values


def float8(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """Tensors of float8, with their scales where there are any."""
    for name, info in checkpoint.weights.items():
        if info.dtype not in FLOAT8 or _is_scale(checkpoint, name):
            continue
        scale, activations, unknown = _scales(checkpoint, name)
        if unknown:
            reason = f"fp8 with scales by the name {unknown[0]!r}, whose meaning is not known"
            yield checkpoint.refused(name, reason, (name, *unknown))
            continue
        form = f"fp8 ({FLOAT8[info.dtype]})"
        if scale is None:
            problem = _no_weight(checkpoint, info)
            if problem:
                yield checkpoint.refused(name, problem, (name,))
                continue
            how = f"{form}, without scales"
            yield checkpoint.derived(name, info.shape, [info, *activations], _cast(info), how, "fp8")
            continue
        block = _block(checkpoint, info, scale)
        if isinstance(block, str):
            yield checkpoint.refused(name, f"fp8: {block}", (name, scale.name))
            continue
        sources = [info, scale, *activations]
        made = scaled(info, scale, block, None)
        yield checkpoint.derived(name, info.shape, sources, made, f"{form}, {_in_words(info, scale, block)}", "fp8")


def _no_weight(checkpoint: Quantised, info: TensorInfo) -> str | None:
    """Why floats without a scale may not be the weight itself, or None."""
    if checkpoint.method:
        return f"fp8 without the scales that belong to it (quantised by {checkpoint.method[:40]!r}, says config.json)"
    if len(info.shape) > 1 and info.name.rpartition(".")[2] not in PARAMETERS:
        return "fp8 under a name that no parameter is known by, and without scales: it may be a part of another form"
    return None


def int8(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """Tensors of bytes that compressed-tensors wrote ("int-quantized")."""
    if checkpoint.method != "compressed-tensors":
        return
    for name, info in checkpoint.weights.items():
        scale = checkpoint.get(f"{name}_scale")
        if info.dtype != "I8" or scale is None:
            continue
        block = _block(checkpoint, info, scale)
        if isinstance(block, str):
            yield checkpoint.refused(name, f"int8: {block}", (name, scale.name))
            continue
        zero = checkpoint.get(f"{name}_zero_point")
        if zero is not None:
            expect(zero, ("I8",), scale.shape)
        sources = [info, scale, *([zero] if zero else []), *_scales(checkpoint, name)[1]]
        made = scaled(info, scale, block, zero)
        yield checkpoint.derived(name, info.shape, sources, made, f"int8, {_in_words(info, scale, block)}", "int8")


def _is_scale(checkpoint: Quantised, name: str) -> bool:
    return any(
        name.endswith(end) and name.removesuffix(end) in checkpoint.weights for end in ("_scale", "_scale_inv")
    ) or name.endswith(ACTIVATIONS)


def _scales(checkpoint: Quantised, name: str) -> tuple[Weight | None, list[Weight], list[str]]:
    """A weight's scale, the scales of activations beside it, and what else is named like a scale of it."""
    leaf = name.rpartition(".")[2]
    scales: list[Weight] = []
    activations: list[Weight] = []
    unknown: list[str] = []
    for other in checkpoint.scales.get(name, ()):
        end = other.rpartition(".")[2]
        if end in (f"{leaf}_scale_inv", f"{leaf}_scale"):
            scales.append(checkpoint.weights[other])
        elif end in ACTIVATIONS or end.removeprefix(f"{leaf}_") in ACTIVATIONS:
            activations.append(checkpoint.weights[other])
        else:
            unknown.append(other)
    if len(scales) > 1:
        unknown += [info.name for info in scales]
    return (scales[0] if scales else None), activations, unknown


def _block(checkpoint: Quantised, info: TensorInfo, scale: TensorInfo) -> tuple[int, int] | str:
    """How many rows and columns of the weight one scale is for, or why that cannot be told.

    Raises
    ------
    CorruptFileError : the scales fit neither the weight nor the config.
    """
    exponents = "F8_E8M0"
    if scale.dtype == "U8" and checkpoint.settings.get("scale_fmt") == "ue8m0":
        exponents = "U8"
    expect(scale, (*SCALES, exponents))
    if scale.size == 1:
        return info.shape[-2:] if len(info.shape) > 1 else (1, info.size)  # type: ignore[return-value]
    if len(info.shape) < 2:
        raise CorruptFileError(scale.file, f"scales of shape {list(scale.shape)} for a vector", scale.name)
    *stack, rows, columns = info.shape
    grid = scale.shape[-2:]
    if scale.shape in ((rows,), (columns,)) and not stack:
        return (1, columns) if scale.shape == (rows,) and rows != columns else "one-dimensional scales of unclear side"
    if len(scale.shape) == len(info.shape) and list(scale.shape[:-2]) == stack:
        whole = {(rows, 1): (1, columns), (1, columns): (rows, 1), (1, 1): (rows, columns)}
        if (grid[0], grid[1]) in whole:
            return whole[grid[0], grid[1]]
        sizes = _block_sizes(checkpoint)
        fitting = {size for size in sizes if (blocks_of(rows, size[0]), blocks_of(columns, size[1])) == grid}
        if len(fitting) == 1:
            return fitting.pop()
        if not sizes:
            return f"config.json does not say the size of the blocks that scales of shape {list(scale.shape)} are for"
        if fitting:
            return f"blocks of {' or '.join(f'{a}×{b}' for a, b in sorted(fitting))}: config.json does not say which"
    raise CorruptFileError(
        scale.file,
        f"shape {list(scale.shape)}, which does not fit {info.name!r} of shape {list(info.shape)} by the blocks that "
        "config.json gives",
        scale.name,
    )


def _block_sizes(checkpoint: Quantised) -> set[tuple[int, int]]:
    given = [checkpoint.settings.get("weight_block_size")]
    for group in checkpoint.groups:
        given.append(group.get("block_structure"))
        if group.get("strategy") == "group":
            given.append([1, group.get("group_size")])
    sizes = [tuple(size) for size in given if isinstance(size, list) and len(size) == 2 and all(map(is_count, size))]
    return {(size[0], size[1]) for size in sizes}


def _in_words(info: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> str:
    if scale.size == 1:
        return "one scale"
    if block == (1, info.shape[-1]):
        return "a scale a row"
    return f"blocks of {block[0]}×{block[1]}"


def _cast(info: TensorInfo) -> Make:
    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        return read(info.name, rows).to(torch.float32)

    return make


def scaled(info: TensorInfo, scale: TensorInfo, block: tuple[int, int], zero: TensorInfo | None) -> Make:
    """(stored − zero) · scale in float32, a scale for each block of rows and columns."""
    ndim = len(info.shape)

    def read_scale(read: Reader, name: str, rows: slice | None) -> Tensor:
        import torch

        values = read(name)
        if values.dtype == torch.uint8:
            values = values.view(torch.float8_e8m0fnu)
        values = values.to(torch.float32)
        if values.numel() == 1:
            return values.reshape((1,) * max(ndim, 2))
        values = values.reshape(-1, 1) if values.ndim == 1 else values
        if ndim > 2:
            values = values if rows is None else values[rows]
        height = info.shape[-2]
        if values.shape[-2] not in (1, height):
            values = values.repeat_interleave(block[0], dim=-2)[..., :height, :]
        return values[rows] if ndim == 2 and rows is not None and values.shape[-2] > 1 else values

    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        made = read(info.name, rows).to(torch.float32)
        if zero is not None:
            _by_blocks(made, read_scale(read, zero.name, rows), block[1], torch.Tensor.sub_)
        _by_blocks(made, read_scale(read, scale.name, rows), block[1], torch.Tensor.mul_)
        return made

    return make


def _by_blocks(made: Tensor, values: Tensor, width: int, apply: Callable[[Tensor, Tensor], object]) -> None:
    """In place; values (…, rows or 1, blocks of columns) are not expanded over the columns."""
    import torch

    if values.shape[-1] in (1, made.shape[-1]):
        apply(made, values if made.ndim > 1 else values.reshape(-1))
        return
    full, rest = divmod(made.shape[-1], width)
    even = made[..., : full * width]
    apply(torch.unflatten(even, -1, (full, width)), values[..., :full, None])
    if rest:
        apply(made[..., full * width :], values[..., full:])


def mxfp4(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """gpt-oss's experts: blocks (E, out, in / 32, 16) and scales (E, out, in / 32) make a parameter (E, in, out)."""
    for name, blocks in checkpoint.weights.items():
        if not name.endswith("_blocks") or blocks.dtype != "U8" or len(blocks.shape) != 4:
            continue
        made = name.removesuffix("_blocks")
        scales = checkpoint.partner(blocks, f"{made}_scales")
        count, rows, groups, width = blocks.shape
        expect(blocks, ("U8",), (count, rows, groups, MX_BYTES))
        expect(scales, ("U8",), blocks.shape[:3])
        shape = (count, groups * width * 2, rows)
        how = "mxfp4, blocks of 32"
        yield checkpoint.derived(made, shape, [blocks, scales], _mxfp4(blocks, scales), how, "mxfp4")


def _mxfp4(blocks: TensorInfo, scales: TensorInfo) -> Make:
    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        values = torch.tensor(E2M1, dtype=torch.float32)
        stored, exponents = read(blocks.name, rows), read(scales.name, rows).to(torch.int32) - 127
        experts, height, groups, _ = stored.shape
        made = torch.empty((experts, groups * MX_BYTES * 2, height), dtype=torch.float32)
        for expert in range(experts):
            codes = torch.stack((stored[expert] & 15, stored[expert] >> 4), dim=-1).reshape(height, groups, -1)
            part = torch.ldexp(values[codes.int()], exponents[expert][..., None])
            made[expert] = part.reshape(height, -1).T
        return made

    return make
