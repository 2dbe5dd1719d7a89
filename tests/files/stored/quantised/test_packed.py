"""GPTQ, AWQ and compressed-tensors: codes in words against their layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.errors import CorruptFileError
from tests.support.quantised import check, dense, draw, gptq
from tests.support.seeds import each_seed

SEEDS = range(24)


@each_seed(range(32))
def test_gptq(opened, seed):
    rng = np.random.default_rng(seed)
    bits = (2, 3, 4, 8)[seed % 4]
    rows, columns = 32 * int(rng.integers(1, 5)), 32 * int(rng.integers(1, 6))
    size = (-1, 16, 32, 128)[(seed // 4) % 4]
    version = ("gptq", "gptq_v2")[seed % 3 == 0]
    act_order = seed % 5 < 2
    stored, expected = gptq(
        rng,
        rows,
        columns,
        bits=bits,
        size=columns if size == -1 else size,
        act_order=act_order,
        less=int(version == "gptq"),
    )
    if not act_order and seed % 2:
        del stored["g_idx"]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order}
    settings["checkpoint_format"] = version
    checkpoint = opened({f"m.{key}": value for key, value in stored.items()} | {"m.bias": torch.zeros(rows)}, settings)
    check(checkpoint, "m.weight", expected, "gptq")
    assert set(checkpoint.weights) == {"m.weight", "m.bias"}


def test_a_zero_point_that_readers_disagree_on(opened, rng):
    """Stored as 15, one less than 0 or than 16; gptqmodel, which borrows across codes, says that it wrote it."""
    stored, _ = gptq(rng, 32, 32, bits=4, size=32, act_order=False)
    codes = torch.from_numpy(rng.integers(1, 16, (1, 32)))
    codes[0, 5] = 0
    subtracted = dense(codes.numpy(), 4).numpy().view(np.uint32).astype(np.int64) - 0x11111111
    stored["qzeros"] = torch.from_numpy((subtracted & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
    tensors = {f"m.{key}": value for key, value in stored.items()}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    with pytest.raises(CorruptFileError, match=r"m\.qzeros.*stored as 15"):
        opened(tensors, settings).load("m.weight")
    known = opened(tensors, settings | {"meta": {"quantizer": ["gptqmodel:2.0.0"]}}, folder="known").load("m.weight")
    values = torch.stack([stored["qweight"] >> (4 * at) & 15 for at in range(8)], 1).flatten(0, 1)
    assert torch.equal(known, ((values - codes) * stored["scales"].float()).T)


@each_seed(SEEDS)
def test_awq(opened, seed):
    rng = np.random.default_rng(seed)
    size = (-1, 32, 64, 128)[seed % 4]
    rows, columns = 8 * int(rng.integers(1, 20)), 128 * int(rng.integers(1, 3))
    groups = 1 if size == -1 else columns // size
    group = np.arange(columns) // (columns if size == -1 else size)
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (groups, rows))
    scales = draw(rng, groups, rows).to(torch.float16)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def words(values):
        return dense(values.reshape(len(values), -1, 8)[:, :, order].reshape(len(values), -1), 4)

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    checkpoint = opened({"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": scales}, settings)
    check(checkpoint, "m.weight", (torch.from_numpy(codes - zeros[group]) * scales.double()[group]).T, "awq")


@each_seed(range(32))
def test_packed_by_compressed_tensors(opened, seed):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(seed)
    bits = (4, 8, 2, 3, 5, 6, 4, 7)[seed % 8]
    strategy = ("group", "channel", "tensor")[seed % 3]
    rows, columns = int(rng.integers(2, 100)), 32 * int(rng.integers(1, 6))
    symmetric = strategy == "tensor" or seed % 4 < 2
    said = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        said["group_size"] = 32
    shape = {"group": (rows, columns // 32), "channel": (rows, 1), "tensor": (1,)}[strategy]
    state = {"weight": draw(rng, rows, columns), "weight_scale": draw(rng, *shape).abs() + 0.01}
    if not symmetric:
        zeros = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        state["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    other = {"num_bits": 8 if bits != 8 else 4, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"weights": said}, "group_1": {"weights": other}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    checkpoint = opened({f"m.{key}": value for key, value in stored.items()}, settings)
    check(checkpoint, "m.weight", expected, f"int{bits}")
    assert set(checkpoint.weights) == {"m.weight"}
