"""Codes of few bits packed into words of 32: GPTQ, AWQ and compressed-tensors' "pack-quantized".

All mean (code − zero) · scale, with zeros and scales for each group of inputs and each output:

===================  ==========================  ======================================================
form                 codes                       zeros
===================  ==========================  ======================================================
GPTQ                 (in·bits/32, out), dense    (groups, out·bits/32), dense, less one in its first
                     along the inputs            version ("gptq"), as they are in its second ("gptq_v2")
AWQ, version gemm    (in, out/8), the eight of   as the codes: (groups, out/8)
                     a word in AWQ_ORDER
pack-quantized       (out, in·bits/32), dense,   (out·bits/32, groups), likewise; none if symmetric
                     as code + 2^(bits − 1)
===================  ==========================  ======================================================

*Dense* is a stream of bits that begins at the lowest of each word.  ``g_idx`` gives each input its group (act-order).

Sources: auto_gptq 0.7.1 ``nn_modules/qlinear``, gptqmodel 7.7 ``nn_modules/qlinear`` and ``utils/model.py``; autoawq
0.2.9 ``modules/linear/gemm.py``, ``utils/packing_utils.py``; compressed-tensors 0.20 ``compressors/pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Make, Reader, Unreadable
from spectra.files.headers import TensorInfo
from spectra.files.stored.quantised.weights import SCALES, Quantised, blocks_of, expect, is_count, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns each four bits of a word are
AT_ONCE = 1 << 20  # values that are unpacked at a time


@dataclass(frozen=True)
class _Group:
    """The tensors of one module: ``zeros`` and ``index`` may be missing, ``bits`` is their width."""

    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None
    index: TensorInfo | None
    bits: int
    size: int  # inputs in a group

    @property
    def all(self) -> list[TensorInfo]:
        return [info for info in (self.codes, self.scales, self.zeros, self.index) if info is not None]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(n, count) codes from (n, words) int32 that are dense along the second dimension; uint8 for at most 8 bits."""
    import torch

    if 8 % bits == 0:
        parts = words.contiguous().view(torch.uint8)[..., None]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((parts >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]
    padded = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    begins = torch.arange(count) * bits
    at, shifts = begins // WORD, begins % WORD
    low = padded[:, at] >> shifts
    return ((low | (padded[:, at + 1] << (WORD - shifts))) & ((1 << bits) - 1)).to(torch.uint8)


def _dequantised(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group: Tensor | None, shape: tuple[int, int], bits: int
) -> Tensor:
    """(out, in) of float32 from packed codes (out, words), scales and zeros (out, groups), and each input's group."""
    import torch

    rows, columns = shape
    made = torch.empty(shape, dtype=torch.float32)
    step = max(AT_ONCE // max(columns, 1), 1)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        values = unpack(codes[part], bits, columns).to(torch.float32)
        own = scales[part].to(torch.float32)
        values -= float(1 << (bits - 1)) if zeros is None else _spread(zeros[part].to(torch.float32), group)
        made[part] = values.mul_(_spread(own, group))
    return made


def _spread(values: Tensor, group: Tensor | None) -> Tensor:
    """(out, groups) to (out, in)."""
    return values if group is None else values[:, group]


def qweights(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """GPTQ and AWQ, by the config's ``quant_method``: their tensors have the same names."""
    for name, codes in checkpoint.weights.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        method = checkpoint.method
        if method == "gptq":
            made = _gptq(checkpoint, module, codes)
        elif method == "awq":
            made = _awq(checkpoint, module, codes)
        else:
            said = f"calls it {method[:40]!r}" if method else "does not say which"
            made = f"packed as by GPTQ or AWQ, but config.json {said}: not read"
        if isinstance(made, str):
            yield checkpoint.refused(f"{module}.weight", made, [name, *checkpoint.belonging(module, name)])
        else:
            yield made


def _gptq(checkpoint: Quantised, module: str, codes: TensorInfo) -> Derived | str:
    said = checkpoint.settings
    version = said.get("checkpoint_format") or said.get("format") or "gptq"
    bits = said.get("bits")
    if version not in ("gptq", "gptq_v2"):
        return f"GPTQ in the format {str(version)[:40]!r}: only 'gptq' and 'gptq_v2' are read"
    if said.get("dynamic"):
        return "GPTQ with settings of its own for some modules ('dynamic')"
    if bits not in (2, 3, 4, 8) or type(bits) is not int:
        return f"GPTQ with bits = {str(bits)[:40]}: 2, 3, 4 and 8 are read"
    scales, zeros = (checkpoint.partner(codes, f"{module}.{part}") for part in ("scales", "qzeros"))
    index = checkpoint.get(f"{module}.g_idx")
    if len(expect(codes, ("I32",)).shape) != 2 or not codes.size:
        raise CorruptFileError(codes.file, f"shape {list(codes.shape)}; expected a matrix", codes.name)
    rows = codes.shape[1]
    columns = codes.shape[0] * WORD // bits
    if index is not None:
        expect(index, ("I32", "I64"))
        columns = index.size if len(index.shape) == 1 and blocks_of(index.size * bits, WORD) == codes.shape[0] else 0
        if not columns:
            raise CorruptFileError(
                index.file,
                f"shape {list(index.shape)}; {codes.name!r} has {codes.shape[0]} words of inputs",
                index.name,
            )
    size = _group_size(said.get("group_size"), columns)
    if size is None:
        return f"GPTQ with group_size = {str(said.get('group_size'))[:40]}"
    groups = blocks_of(columns, size)
    expect(scales, SCALES, (groups, rows))
    expect(zeros, ("I32",), (groups, blocks_of(rows * bits, WORD)))
    group = _Group(codes, scales, zeros, index, bits, size)
    meta = said.get("meta")
    writers = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
    make = _make_gptq(group, (rows, columns), version == "gptq", "gptqmodel" in writers)
    how = f"GPTQ, {bits} bits, groups of {size}"
    return checkpoint.derived(f"{module}.weight", (rows, columns), group.all, make, how, "gptq", linear=True)


def _make_gptq(group: _Group, shape: tuple[int, int], less_one: bool, by_word: bool) -> Make:
    assert group.zeros is not None
    zeros_info, bits = group.zeros, group.bits

    def make(read: Reader, rows: slice | None) -> Tensor:

        wanted = rows or slice(None)
        stored = read(zeros_info.name)
        if less_one and by_word and 8 % bits == 0:
            # gptqmodel takes one off each code by subtracting words, which may borrow, and adds them so again.
            ones = sum(1 << at for at in range(0, WORD, bits))
            stored = stored + (ones - (1 << WORD) if ones >= 1 << (WORD - 1) else ones)
        zeros = unpack(stored, bits, shape[0])
        if less_one and not (by_word and 8 % bits == 0):
            if bool((zeros == (1 << bits) - 1).any()):
                raise CorruptFileError(
                    zeros_info.file,
                    f"a zero point is stored as {(1 << bits) - 1}, which readers of this version take for 0 or for "
                    f"{1 << bits}; save the model in the format gptq_v2",
                    zeros_info.name,
                )
            zeros = zeros + 1
        index = _index(read, group, shape[1])
        scales, codes = read(group.scales.name), read(group.codes.name)
        count = len(range(*wanted.indices(shape[0])))
        return _dequantised(
            codes[:, wanted].T.contiguous(), scales[:, wanted].T, zeros[:, wanted].T, index, (count, shape[1]), bits
        )

    return make


def _index(read: Reader, group: _Group, columns: int) -> Tensor:
    """Each input's group, checked to be one."""
    import torch

    if group.index is None:
        return torch.arange(columns) // group.size
    index = read(group.index.name).long()
    groups = blocks_of(columns, group.size)
    if bool((index < 0).any()) or bool((index >= groups).any()):
        raise CorruptFileError(group.index.file, f"names groups beyond the {groups} that it has", group.index.name)
    return index


def _group_size(said: object, columns: int) -> int | None:
    """How many inputs share a scale; -1 says all."""
    if said == -1 and type(said) is int:
        return columns
    return said if type(said) is int and is_count(said) else None


def _awq(checkpoint: Quantised, module: str, codes: TensorInfo) -> Derived | str:
    said = checkpoint.settings
    version = said.get("version", said.get("format", "gemm"))
    bits = said.get("bits", said.get("w_bit"))
    if not isinstance(version, str) or version.lower() != "gemm":
        return f"AWQ in the version {str(version)[:40]!r}: only 'gemm' is read"
    if bits != 4 or type(bits) is not int:
        return f"AWQ with bits = {str(bits)[:40]}: 4 are read"
    if said.get("zero_point", True) is not True:
        return "AWQ without zero points"
    scales, zeros = (checkpoint.partner(codes, f"{module}.{part}") for part in ("scales", "qzeros"))
    if len(expect(codes, ("I32",)).shape) != 2 or not codes.size:
        raise CorruptFileError(codes.file, f"shape {list(codes.shape)}; expected a matrix", codes.name)
    columns, rows = codes.shape[0], codes.shape[1] * len(AWQ_ORDER)
    size = _group_size(said.get("group_size", said.get("q_group_size")), columns)
    if size is None:
        return f"AWQ with group_size = {str(said.get('group_size'))[:40]}"
    groups = blocks_of(columns, size)
    expect(scales, SCALES, (groups, rows))
    expect(zeros, ("I32",), (groups, codes.shape[1]))
    group = _Group(codes, scales, zeros, None, bits, size)
    make = _make_awq(group, (rows, columns))
    how = f"AWQ, {bits} bits, groups of {size}"
    return checkpoint.derived(f"{module}.weight", (rows, columns), group.all, make, how, "awq")


def _make_awq(group: _Group, shape: tuple[int, int]) -> Make:
    assert group.zeros is not None
    zeros_info = group.zeros

    def in_order(words: Tensor) -> Tensor:
        import torch

        codes = unpack(words, group.bits, shape[0]).reshape(len(words), -1, len(AWQ_ORDER))
        return codes[:, :, torch.tensor(AWQ_ORDER).argsort()].flatten(1)

    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        wanted = rows or slice(None)
        scales, zeros = read(group.scales.name).to(torch.float32)[:, wanted], in_order(read(zeros_info.name))[:, wanted]
        made = torch.empty((scales.shape[1], shape[1]), dtype=torch.float32)
        codes = read(group.codes.name)
        for at in range(blocks_of(shape[1], group.size)):
            part = slice(at * group.size, (at + 1) * group.size)
            values = in_order(codes[part])[:, wanted].to(torch.float32)
            made[:, part] = ((values - zeros[at].to(torch.float32)) * scales[at]).T
        return made

    return make


def packed(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """compressed-tensors' ``weight_packed`` of int32; its nvfp4 and mxfp4 are bytes."""
    for name, codes in checkpoint.weights.items():
        if not name.endswith(".weight_packed") or codes.dtype != "I32":
            continue
        module = name.removesuffix(".weight_packed")
        made = _packed(checkpoint, module, codes)
        if isinstance(made, str):
            reason = f"pack-quantized by compressed-tensors: {made}"
            yield checkpoint.refused(f"{module}.weight", reason, [name, *checkpoint.belonging(module, name)])
        else:
            yield made


def _packed(checkpoint: Quantised, module: str, codes: TensorInfo) -> Derived | str:
    scales, said = (checkpoint.partner(codes, f"{module}.weight_{part}") for part in ("scale", "shape"))
    zeros = checkpoint.get(f"{module}.weight_zero_point")
    shape = whole_numbers(expect(said, ("I64", "I32"), (2,))) if said.shape == (2,) else ()
    if not shape:
        return f"weight_shape has the shape {list(said.shape)}: stacks are not read"
    if min(shape) < 1 or len(codes.shape) != 2 or codes.shape[0] != shape[0]:
        raise CorruptFileError(
            codes.file, f"shape {list(codes.shape)}, but {said.name!r} says {list(shape)}", codes.name
        )
    if checkpoint.get(f"{module}.weight_g_idx") is not None:
        return "with an order of its own for the inputs (weight_g_idx)"
    rows, columns = shape
    fitting = []
    for group in checkpoint.groups:
        settings = _packed_group(group, codes, scales, zeros, columns)
        if settings is not None and settings not in fitting:
            fitting.append(settings)
    if not checkpoint.groups:
        return "config.json does not say of how many bits"
    if len(fitting) > 1:
        return "several groups of config.json fit its shape"
    if not fitting:
        raise CorruptFileError(
            codes.file,
            f"shape {list(codes.shape)} with scales of shape {list(scales.shape)} for a weight of shape {list(shape)}: "
            "no group of config.json fits that",
            codes.name,
        )
    bits, size = fitting[0]
    expect(scales, SCALES)
    if zeros is not None:
        expect(zeros, ("I32",), (blocks_of(rows * bits, WORD), scales.shape[-1]))
    used = _Group(codes, scales, zeros, None, bits, size)
    sources = [*used.all, said]
    sources += [info for end in ("input_scale", "input_global_scale") if (info := checkpoint.get(f"{module}.{end}"))]
    how = f"int{bits}, {'a scale a row' if size == columns else f'groups of {size}'}"
    name = f"{module}.weight"
    return checkpoint.derived(name, (rows, columns), sources, _make_packed(used, (rows, columns)), how, f"int{bits}")


def _packed_group(
    group: Any, codes: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, columns: int
) -> tuple[int, int] | None:
    """Bits and group size of one group of the config, where the tensors can be of it."""
    bits, strategy = group.get("num_bits"), group.get("strategy")
    if not is_count(bits, 8) or group.get("type", "int") != "int" or bool(group.get("symmetric", True)) != (not zeros):
        return None
    size = group.get("group_size") if strategy == "group" else columns
    if not is_count(size) or codes.shape[1] != blocks_of(columns * bits, WORD):
        return None
    if strategy == "tensor":
        return (bits, size) if scales.size == 1 and zeros is None else None
    return (bits, size) if scales.shape == (codes.shape[0], blocks_of(columns, size)) else None


def _make_packed(group: _Group, shape: tuple[int, int]) -> Make:
    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        wanted = rows or slice(None)
        codes = read(group.codes.name, rows)
        scales = read(group.scales.name)
        scales = scales.reshape(1, 1).expand(shape[0], 1) if scales.numel() == 1 else scales
        zeros = None
        if group.zeros is not None:
            zeros = unpack(read(group.zeros.name).T.contiguous(), group.bits, shape[0]).T[wanted]
        index = torch.arange(shape[1]) // group.size
        return _dequantised(codes, scales[wanted], zeros, index, (codes.shape[0], shape[1]), group.bits)

    return make
