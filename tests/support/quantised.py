"""Quantised weights as their writers lay them out, and what these dequantise."""

from __future__ import annotations

import json

import numpy as np
import torch

from spectra.files.derived import Derived, Unreadable
from spectra.files.stored.quantised.bitsandbytes import CODES

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def check(checkpoint, name, expected, quantised):
    """The weight and any of its rows, to the last bit; it is what its record says, and its sources are used up."""
    info = checkpoint.weights[name]
    assert isinstance(info, Derived)
    assert (info.shape, info.dtype, info.quantised) == (tuple(expected.shape), "F32", quantised)
    made = checkpoint.load(name)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected.to(torch.float32), rtol=0, atol=0)
    begin, end = len(expected) // 3, len(expected) // 3 + 2
    torch.testing.assert_close(
        checkpoint.load(name, rows=slice(begin, end)), expected[begin:end].float(), rtol=0, atol=0
    )
    assert not (set(info.sources) - {name}) & set(checkpoint.weights)


def refused(checkpoint, name):
    """The reason for which a weight is not read."""
    info = checkpoint.weights[name]
    assert isinstance(info, Unreadable)
    return info.reason


def draw(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


# bitsandbytes


def of_bitsandbytes(packed, state, dtype=torch.float32):
    """What bitsandbytes dequantises, by its portable implementation.

    Its kernel for CPUs with AVX-512 (0.50.2) takes blocks that cross the end of a row of 16·n values, as they do where
    the block size does not divide the row, for others than it quantised with; where it does, the two must agree.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    flat = packed.reshape(-1).view(torch.uint8)
    made = _dequantize_4bit_compute.__wrapped__(flat, absmax, state.code, state.blocksize, state.shape, dtype)
    if state.shape[-1] % state.blocksize == 0:
        state.dtype, before = dtype, state.dtype
        assert torch.equal(dequantize_4bit(packed, state), made)
        state.dtype = before
    return made


# GPTQ, AWQ, compressed-tensors: codes in words


def dense(codes, bits):
    """(n, words) int32 from (n, count) codes, as one long number a row."""
    words = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * at) for at, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(number >> (32 * at)) & 0xFFFFFFFF for at in range(count)])
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def gptq(rng, rows, columns, *, bits, size, act_order, less=1):
    """What GPTQ stores of a weight (rows, columns), and that weight."""
    groups = -(-columns // size)
    group = np.arange(columns) // size
    if act_order:
        group = rng.permutation(group)
    codes = rng.integers(0, 2**bits, (rows, columns))
    zeros = rng.integers(1, 2**bits, (rows, groups))
    scales = draw(rng, groups, rows).abs().to(torch.float16)
    stored = {
        "qweight": dense(codes, bits).T,
        "qzeros": dense((zeros - less).T, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(group).to(torch.int32),
    }
    expected = (torch.from_numpy(codes - zeros[:, group])) * scales.double().T[:, group]
    return stored, expected


# What is refused, and what is wrong


def four(rng, rows=8, columns=32, **changes):
    """An nf4 weight as bitsandbytes lays it out, with ``changes`` to the JSON."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]} | changes
    return {
        "m.weight": torch.from_numpy(rng.integers(0, 256, (rows * columns // 2, 1), dtype=np.uint8)),
        "m.weight.absmax": torch.ones(rows * columns // 64),
        "m.weight.quant_map": torch.tensor(CODES["nf4"]),
        "m.weight.quant_state.bitsandbytes__nf4": as_bytes(json.dumps(said)),
    }


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
PACKED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}}},
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
G = {"m.qweight": words(8, 32), "m.qzeros": words(2, 4), "m.scales": torch.ones(2, 32)}
A = {"m.qweight": words(64, 4), "m.qzeros": words(2, 4), "m.scales": torch.ones(2, 32)}
C = {"m.weight_packed": words(32, 8), "m.weight_scale": torch.ones(32, 2), "m.weight_shape": torch.tensor([32, 64])}
F = {"m.weight": torch.zeros(200, 300).to(E4M3), "m.weight_scale_inv": torch.ones(2, 3)}
U8, I8 = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.int8)
STATE = "m.weight.quant_state.bitsandbytes__nf4"
