"""Quantised weights against what their writers dequantise, or where these cannot be installed against their layouts."""

from __future__ import annotations

import json
import math
import re

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectra
from spectra.cli import main
from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Unreadable
from spectra.files.headers import BITS, TensorInfo
from spectra.files.stored.quantised import quantised
from spectra.pairing.precision import sounds_quantised
from tests.support.paths import FIXTURES, ROOT
from tests.support.quantised import (
    AWQ,
    E4M3,
    E5M2,
    E8M0,
    FP8,
    GPTQ,
    I8,
    PACKED,
    STATE,
    U8,
    A,
    C,
    F,
    G,
    as_bytes,
    check,
    dense,
    draw,
    four,
    gptq,
    of_bitsandbytes,
    refused,
    words,
)

SEEDS = range(24)


# fp8


@pytest.mark.parametrize("seed", SEEDS)
def test_fp8_is_multiplied_as_transformers_multiplies_it(opened, seed):
    """Blocks of several sizes, the last ones ragged; rows; one scale; scales of each dtype; stacks of experts."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    rng = np.random.default_rng(seed)
    block = [(128, 128), (64, 32), (1, 32), (128, 64)][seed % 4]
    stack = (3,) if seed % 3 == 2 else ()
    rows, columns = (int(size) for size in rng.integers(3, 300, 2))
    weight = (draw(rng, *stack, rows, columns) * 50).to(E4M3 if seed % 5 else E5M2)
    per = ("block", "block", "row", "one")[(seed // 4) % 4]
    shape = {"block": (-(-rows // block[0]), -(-columns // block[1])), "row": (rows, 1), "one": ()}[per]
    scale = draw(rng, *(stack if per != "one" else ()), *shape).abs() * 1e-3
    scale = scale.to([torch.float32, torch.bfloat16, E8M0][seed % 3])
    name, suffix = ("e.gate_up_proj", "_scale_inv") if stack else ("m.q_proj.weight", "_scale_inv")
    suffix = "_scale" if per == "row" else suffix
    extra = {} if stack else {"m.q_proj.input_scale": torch.ones(1)}
    checkpoint = opened(
        {name: weight, name + suffix: scale, **extra}, {"quant_method": "fp8", "weight_block_size": list(block)}
    )
    expected = _dequantize_fp8_weight(weight, scale, block if per == "block" else None, torch.float32)
    check(checkpoint, name, expected, "fp8")
    assert set(checkpoint.weights) == {name}


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_fp8_without_scales_is_the_weight_itself(opened, rng, dtype):
    weight = draw(rng, 7, 5).to(dtype)
    check(opened({"m.weight": weight, "m.bias": draw(rng, 7).to(dtype)}), "m.weight", weight.float(), "fp8")


@pytest.mark.parametrize(
    ("tensors", "settings", "name", "says"),
    [
        (("_weight_qdata", "_weight_scale"), {"quant_method": "torchao"}, "q.weight", "torchao"),
        (("_weight_qdata", "_weight_scale"), None, "q.weight", "torchao"),
        (("inner",), None, "q.inner", "a name that no parameter is known by"),
        (("weight",), {"quant_method": "fp8"}, "q.weight", "without the scales that belong to it"),
    ],
)
def test_fp8_that_may_lack_its_scales_is_refused(opened, rng, tensors, settings, name, says):
    """torchao keeps scales under names of its own; what was scaled is never taken for the weight."""
    stored = {f"q.{tensors[0]}": draw(rng, 8, 8).to(E4M3)}
    stored |= {f"q.{end}": torch.rand(8, 1) for end in tensors[1:]}
    checkpoint = opened(stored, settings)
    assert says in refused(checkpoint, name)
    assert set(checkpoint.weights) == {name}


@pytest.mark.parametrize("seed", SEEDS)
def test_compressed_tensors_floats_and_bytes(opened, seed):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(seed)
    kind = "float" if seed % 2 else "int"
    strategy = ["channel", "tensor", "block", "group"][(seed // 2) % 4]
    rows, columns = int(rng.integers(2, 200)), 32 * int(rng.integers(1, 6))
    said = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": kind == "float" or seed % 4 == 0}
    if strategy == "block":
        said["block_structure"] = [48, 80]
    if strategy == "group":
        said["group_size"] = 32
    args = QuantizationArgs(**said)
    shape = {
        "channel": (rows, 1),
        "tensor": (1,),
        "block": (-(-rows // 48), -(-columns // 80)),
        "group": (rows, columns // 32),
    }[strategy]
    state = {"weight": draw(rng, rows, columns), "weight_scale": draw(rng, *shape).abs() * 0.01 + 1e-3}
    if not said["symmetric"]:
        state["weight_zero_point"] = torch.from_numpy(rng.integers(-100, 100, shape)).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(f"{kind}-quantized")
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": said}}}
    checkpoint = opened({f"m.{key}": value for key, value in stored.items()}, settings)
    check(checkpoint, "m.weight", expected, "fp8" if kind == "float" else "int8")


@pytest.mark.parametrize("seed", range(32))
def test_four_bits_of_bitsandbytes(opened, seed):
    bnb = pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(seed)
    kind = ("nf4", "fp4")[seed % 2]
    rows, columns = (int(size) for size in rng.integers(3, 150, 2))
    storage = torch.uint8
    if seed % 8 == 7:
        storage, columns = torch.bfloat16, 4 * columns
    if seed % 4 == 2:
        columns = 64 * (1 + seed % 3)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    blocksize = (32, 64, 128, 256, 4096)[seed % 5]
    weight = draw(rng, rows, columns, dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=seed % 4 > 1, quant_type=kind, quant_storage=storage
    )
    stored = {"m.weight": packed} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    checkpoint = opened(stored)
    check(checkpoint, "m.weight", of_bitsandbytes(packed, state), kind)
    rounded = of_bitsandbytes(packed, state, dtype)  # what the loaded model computes with
    assert torch.equal(checkpoint.load("m.weight").to(dtype), rounded)
    assert set(checkpoint.weights) == {"m.weight"}


def test_modules_of_bitsandbytes(opened, rng):
    """As the modules themselves save them: Linear4bit with its bias, Linear8bitLt with its weight_format."""
    bnb = pytest.importorskip("bitsandbytes")
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    four = bnb.nn.Linear4bit(70, 33, compress_statistics=True, quant_type="nf4").to("cpu")
    eight = bnb.nn.Linear8bitLt(70, 33, has_fp16_weights=False).to("cpu")
    tensors |= {f"a.{key}": value for key, value in four.state_dict().items()}
    tensors |= {f"b.{key}": value for key, value in eight.state_dict().items()}
    expected["a"] = of_bitsandbytes(four.weight.data, four.weight.quant_state)
    expected["b"] = bnb.functional.int8_vectorwise_dequant(tensors["b.weight"], tensors["b.SCB"])
    checkpoint = opened(tensors)
    check(checkpoint, "a.weight", expected["a"], "nf4")
    check(checkpoint, "b.weight", expected["b"], "int8")
    assert set(checkpoint.weights) == {"a.weight", "a.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_one_expert_of_four_bits_reads_no_more_than_its_own(opened, monkeypatch, nested, storage):
    """Of odd sizes, so that bytes and blocks are shared by neighbours."""
    bnb = pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(3)
    stack = draw(rng, 16, 31, 33 if storage == torch.uint8 else 36)
    packed, state = bnb.functional.quantize_4bit(
        stack, blocksize=64, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    name = "m.experts.up_proj"
    stored = {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    checkpoint = opened(stored, model_type="nemotron_h", hidden_size=stack.shape[2])
    expected = of_bitsandbytes(packed, state)
    read = {}
    own = type(checkpoint).read

    def spy(self, name, **options):
        value = own(self, name, **options)
        read[name] = value.numel() * value.itemsize
        return value

    monkeypatch.setattr(type(checkpoint), "read", spy)
    for index in range(16):
        assert torch.equal(checkpoint.load(f"m.experts.{index}.up_proj.weight"), expected[index])
        assert read[name] <= stack[0].numel() / 2 + 4
        assert read[f"{name}.absmax"] <= (stack[0].numel() / 64 + 2) * (1 if nested else 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_eight_bits_of_bitsandbytes(opened, seed):
    bnb = pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(seed)
    weight = draw(rng, *(int(size) for size in rng.integers(3, 200, 2)), dtype=torch.float16)
    codes, scb, _ = bnb.functional.int8_vectorwise_quant(weight)
    stored = {"m.weight": codes, "m.SCB": scb}
    if seed % 2:
        stored["m.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    checkpoint = opened(stored)
    check(checkpoint, "m.weight", bnb.functional.int8_vectorwise_dequant(codes, scb), "int8")
    assert set(checkpoint.weights) == {"m.weight"}


def test_more_values_than_are_unpacked_at_once(opened, rng, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("spectra.files.stored.quantised.bitsandbytes.AT_ONCE", 64)
    weight = draw(rng, 33, 7)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    stored = {"m.weight": packed} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    check(opened(stored), "m.weight", of_bitsandbytes(packed, state), "nf4")


def test_gpt2s_projections_in_fp8_are_as_they_were(opened, rng):
    weight = draw(rng, 64, 64).to(E4M3)
    name = "transformer.h.0.attn.c_proj"
    checkpoint = opened({f"{name}.weight": weight, f"{name}.bias": torch.zeros(64)}, model_type="gpt2")
    check(checkpoint, f"{name}.weight", weight.float(), "fp8")


@pytest.mark.parametrize("method", ["bnb", "gptq"])
def test_gpt2s_projections_are_turned_back(opened, make_base, rng, method):
    """transformers turns a Conv1D before it quantises it; the square one must not be taken for what it is not."""
    shape = (64, 64)
    weight = draw(rng, *shape)
    name = "transformer.h.0.attn.c_proj"
    if method == "bnb":
        bnb = pytest.importorskip("bitsandbytes")
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
        stored = {f"{name}.weight": packed}
        stored |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected, settings = of_bitsandbytes(packed, state), None
    else:
        stored, expected = gptq(rng, *shape, bits=4, size=16, act_order=False)
        stored = {f"{name}.{key}": value for key, value in stored.items()}
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    checkpoint = opened(stored | {f"{name}.bias": torch.zeros(64)}, settings, model_type="gpt2")
    check(checkpoint, f"{name}.weight", expected.T, "nf4" if method == "bnb" else "gptq")


# MXFP4


@pytest.mark.parametrize("seed", SEEDS)
def test_mxfp4_of_gpt_oss(opened, seed):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(seed)
    experts, rows, groups = (int(size) for size in rng.integers(2, 9, 3))
    blocks = torch.from_numpy(rng.integers(0, 256, (experts, 8 * rows, groups, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(90, 160, (experts, 8 * rows, groups), dtype=np.uint8))
    name = "model.layers.0.mlp.experts." + ("gate_up_proj", "down_proj")[seed % 2]
    checkpoint = opened(
        {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.zeros(experts, 8 * rows)},
        {"quant_method": "mxfp4"},
        model_type="gpt_oss",
        hidden_size=(32 * groups if seed % 2 == 0 else 8 * rows),
    )
    (info,) = quantised(checkpoint.tensors, checkpoint.config)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert isinstance(info, Derived)
    assert (info.name, info.quantised) == (name, "mxfp4")
    assert info.shape == tuple(expected.shape) == (experts, 32 * groups, 8 * rows)
    assert torch.equal(checkpoint.load(info), expected)
    assert torch.equal(checkpoint.load(info, rows=slice(1, 2)), expected[1:2])
    # Each expert is cut from it, and read without the others.
    if expected.shape[1] != expected.shape[2]:
        assert torch.equal(checkpoint.load(f"{name.replace('experts', 'experts.1')}.weight"), expected[1].T)


@pytest.mark.parametrize("seed", range(32))
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


@pytest.mark.parametrize("seed", SEEDS)
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


@pytest.mark.parametrize("seed", range(32))
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


@pytest.mark.parametrize(
    ("tensors", "settings", "reason"),
    [
        (G, None, "does not say which"),
        (G, {"quant_method": "auto-round"}, "auto-round"),
        (G, GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (G, GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        (G, GPTQ | {"bits": 5}, "bits = 5"),
        (G, GPTQ | {"bits": [4]}, "bits"),
        (G, GPTQ | {"group_size": "32"}, "group_size"),
        (A, AWQ | {"version": "gemv"}, "gemv"),
        (A, AWQ | {"version": ["gemm"]}, "gemm"),
        (A, AWQ | {"bits": 3}, "bits = 3"),
        (A, AWQ | {"zero_point": False}, "without zero points"),
        (A, AWQ | {"group_size": 0}, "group_size"),
        (C, None, "does not say of how many bits"),
        (C | {"m.weight_g_idx": words(64)}, PACKED, "weight_g_idx"),
        (F, None, "does not say the size of the blocks"),
        (F, {"quant_method": "fp8", "weight_block_size": "128"}, "does not say the size of the blocks"),
        (F | {"m.scale_weight": torch.ones(1)}, FP8, "scale_weight"),
        (F | {"m.weight_scale": torch.ones(1)}, FP8, "weight_scale"),
        ({"m.weight": torch.zeros(8, 8).to(E4M3), "m.weight_scale": torch.ones(8)}, FP8, "unclear side"),
        ({"m.weight": I8, "m.SCB": torch.ones(4), "m.weight_format": U8[0, 0] + 2}, None, "tiled"),
        ({"m.weight.quant_state.bitsandbytes__int4": as_bytes("{}")}, None, "int4"),
        ({"m.W_q": U8, "m.scale": torch.ones(4), "m.zero": torch.ones(4)}, {"quant_method": "hqq"}, "HQQ"),
        ({"m.codes": I8, "m.codebooks": torch.ones(1, 4)}, {"quant_method": "aqlm"}, "AQLM"),
        ({"m.Qidxs": I8}, None, "QuIP#"),
        ({"m.weight": I8, "m.weight_scales": torch.ones(8)}, {"quant_method": "eetq"}, "EETQ"),
        ({"m.weight._data": I8, "m.weight._scale": torch.ones(4, 1)}, None, "quanto"),
        ({"m.weight_qdata": I8, "m.weight_scale": torch.ones(4)}, {"quant_method": "torchao"}, "torchao"),
        (
            {"m.weight": U8, "m.weight_scale": torch.ones(4, 1).to(E4M3), "m.weight_scale_2": torch.ones(())},
            {"quant_method": "modelopt"},
            "NVFP4",
        ),
        (
            {"m.weight_packed": U8, "m.weight_scale": torch.ones(4).to(E4M3), "m.weight_global_scale": torch.ones(1)},
            {"quant_method": "compressed-tensors"},
            "four-bit floats|NVFP4",
        ),
        ({"m.weight": words(4, 8), "m.scales": torch.ones(4, 1), "m.biases": torch.ones(4, 1)}, None, "MLX"),
        ({"m.weight": U8, "m.weight_scale": torch.ones(1)}, {"quant_method": "bitnet"}, "bitnet"),
    ],
)  # fmt: skip
def test_forms_that_are_known_by_name_are_refused_by_it(opened, tensors, settings, reason):
    checkpoint = opened(tensors | {"m.bias": torch.zeros(4), "other": torch.zeros(3, 3)}, settings)
    assert re.search(reason, refused(checkpoint, "m.weight"))
    assert {"m.bias", "other"} <= set(checkpoint.weights)


def changed(tensors, **changes):
    """The tensors with some others; those that are None left out."""
    made = tensors | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "settings", "tensor", "says"),
    [
        (changed(F, m__weight_scale_inv=torch.ones(3, 3)), FP8, "m.weight_scale_inv", "does not fit"),
        (changed(F, m__weight_scale_inv=words(2, 3)), FP8, "m.weight_scale_inv", "expected F32"),
        ({"m.weight": torch.zeros(4).to(E4M3), "m.weight_scale": torch.ones(2)}, FP8, "m.weight_scale", "vector"),
        (changed(G, m__scales=None), GPTQ, "m.qweight", "is missing: 'm.scales'"),
        (changed(G, m__qzeros=None), GPTQ, "m.qweight", "is missing: 'm.qzeros'"),
        (changed(G, m__scales=torch.ones(3, 32)), GPTQ, "m.scales", r"\[3, 32\]; expected .* \[2, 32\]"),
        (changed(G, m__qzeros=words(2, 5)), GPTQ, "m.qzeros", r"expected I32 of shape \[2, 4\]"),
        (changed(G, m__qweight=words(8, 32).float()), GPTQ, "m.qweight", "expected I32"),
        (changed(G, m__qweight=words(8)), GPTQ, "m.qweight", "expected a matrix"),
        (changed(G, m__g_idx=words(63)[:50]), GPTQ, "m.g_idx", "8 words"),
        (changed(A, m__qzeros=words(2, 3)), AWQ, "m.qzeros", "expected"),
        (changed(A, m__scales=torch.ones(2, 31)), AWQ, "m.scales", "expected"),
        (changed(C, m__weight_packed=words(32, 9)), PACKED, "m.weight_packed", "no group"),
        (changed(C, m__weight_scale=torch.ones(32, 3)), PACKED, "m.weight_packed", "no group"),
        (changed(C, m__weight_shape=torch.tensor([31, 64])), PACKED, "m.weight_packed", r"says \[31, 64\]"),
        (changed(C, m__weight_shape=torch.tensor([32, -64])), PACKED, "m.weight_packed", "says"),
        (changed(C, m__weight_shape=None), PACKED, "m.weight_packed", "is missing"),
        (changed(C, m__weight_zero_point=words(4, 2)), PACKED, "m.weight_packed", "no group"),
        (changed(G, m__weight=torch.ones(32, 64)), GPTQ, "m.weight", "as such and, quantised, as 'm.qweight'"),
        ({"m.SCB": torch.ones(4)}, None, "m.SCB", "is missing: 'm.weight'"),
        ({"m.weight": I8, "m.SCB": torch.ones(5)}, None, "m.SCB", "expected F32"),
        ({"m.weight": words(4, 8), "m.SCB": torch.ones(4)}, None, "m.weight", "expected I8"),
        ({"e.x_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8)}, None, "e.x_blocks", "is missing"),
        (
            {"e.x_blocks": torch.zeros(2, 3, 4, 8, dtype=torch.uint8), "e.x_scales": torch.zeros(2, 3, 4).byte()},
            None,
            "e.x_blocks",
            "expected U8",
        ),
        (
            {"e.x_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8), "e.x_scales": torch.zeros(2, 3, 5).byte()},
            None,
            "e.x_scales",
            "expected U8",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_file_and_tensor(opened, tensors, settings, tensor, says):
    with pytest.raises(CorruptFileError, match=says) as caught:
        opened(tensors, settings).weights  # noqa: B018
    assert caught.value.tensor == tensor
    assert caught.value.path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": "8, 32"}, "shape"),
        ({"shape": [8, True]}, "shape"),
        ({"shape": [8, -32]}, "shape"),
        ({"shape": [10**18, 10**18]}, "shape"),
        ({"shape": []}, "shape"),
        ({"shape": [9, 32]}, "two values"),
        ({"blocksize": 0}, "blocksize"),
        ({"blocksize": 63}, "blocksize"),
        ({"blocksize": 64.0}, "blocksize"),
        ({"blocksize": [64]}, "blocksize"),
        ({"blocksize": 128}, "absmax"),
        ({"quant_type": "fp4"}, "quant_type"),
        ({"nested_blocksize": 256, "nested_offset": 0.5}, "absmax"),
        ({"nested_blocksize": 0, "nested_offset": 0.5}, "nested_blocksize"),
        ({"nested_blocksize": 256, "nested_offset": float("nan")}, "nested_offset"),
        ({"nested_blocksize": 256, "nested_offset": 10**400}, "nested_offset"),
        ({"nested_blocksize": 256}, "nested_offset"),
    ],
)
def test_a_quant_state_that_makes_no_sense(opened, rng, changes, says):
    with pytest.raises(CorruptFileError, match=says):
        opened(four(rng, **changes)).weights  # noqa: B018


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (as_bytes("{" * 4000), "not readable as JSON"),
        (as_bytes("[" * 4000), "not readable as JSON"),
        (as_bytes("[1]"), "expected a JSON object"),
        (torch.tensor([255, 254], dtype=torch.uint8), "not readable as JSON"),
        (torch.zeros(5000, dtype=torch.uint8), "at most 4,096"),
        (torch.zeros(40), "expected U8"),
    ],
)
def test_a_quant_state_that_is_none(opened, rng, state, says):
    with pytest.raises(CorruptFileError, match=says) as caught:
        opened(four(rng) | {STATE: state}).weights  # noqa: B018
    assert caught.value.tensor == STATE


def test_contents_that_do_not_fit(opened, rng):
    """What only the values show is found when they are read, and named as well."""
    other = four(rng) | {"m.weight.quant_map": torch.linspace(-1, 1, 16)}
    with pytest.raises(CorruptFileError, match=r"m\.weight\.quant_map.*not the 16 values of nf4"):
        opened(other, folder="map").load("m.weight")
    index = torch.full((64,), 2, dtype=torch.int32)
    with pytest.raises(CorruptFileError, match=r"m\.g_idx.*none of the 2"):
        opened(G | {"m.g_idx": index}, GPTQ, folder="index").load("m.weight")


# Whole runs


@pytest.mark.parametrize("form", ["nf4", "fp8", "gptq"])
def test_an_audit_on_a_quantised_base_is_that_on_the_matrices_it_means(opened, make_adapter, rng, form):
    name = "model.layers.0.self_attn.q_proj"
    settings: dict[str, object] | None = None
    if form == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        packed, state = bnb.functional.quantize_4bit(draw(rng, 96, 64), blocksize=64, quant_type="nf4")
        stored = {f"{name}.weight": packed}
        stored |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected = of_bitsandbytes(packed, state)
    elif form == "fp8":
        stored = {f"{name}.weight": draw(rng, 96, 64).to(E4M3), f"{name}.weight_scale": torch.tensor(0.25)}
        expected, settings = stored[f"{name}.weight"].float() * 0.25, {"quant_method": "compressed-tensors"}
    else:
        made, expected = gptq(rng, 96, 64, bits=4, size=32, act_order=True)
        stored = {f"{name}.{key}": value for key, value in made.items()}
        settings = GPTQ | {"desc_act": True}
    base = opened(stored, settings, model_type="llama")
    plain = opened({f"{name}.weight": expected.float()}, folder="plain", model_type="llama")
    adapter = make_adapter({name: (3 * draw(rng, 96, 4).numpy(), draw(rng, 4, 64).numpy())}, r=4)
    one, other = (spectra.audit(adapter, base=place.path, top_k=5).to_dict(canonical=True) for place in (base, plain))
    assert (one["base_quantised"], one["base"]["quantised"]) == (True, form)
    assert (other["base_quantised"], other["base"]["quantised"]) == (False, None)
    (mine,), (theirs,) = one["layers"], other["layers"]
    assert mine.pop("stored_shape") == theirs.pop("stored_shape")
    assert mine["intruders"] > 0
    assert [note for note in mine.pop("notes") if form in note.lower()]
    del theirs["notes"]
    assert mine == theirs
    assert one["summary"] == other["summary"]


def test_a_fine_tune_stored_as_fp8(opened, rng):
    """Against a base in half precision: the update is what fp8 left of it, and every tensor is accounted for."""
    weight = draw(rng, 64, 48, dtype=torch.bfloat16)
    base = opened({"m.weight": weight, "n.weight": weight[:8].clone()}, folder="plain", model_type="llama")
    W1 = weight.float() + 2 * draw(rng, 64, 2) @ draw(rng, 2, 48)
    scale = torch.full((1, 2), 0.02)
    stored = (W1 / 0.02).clamp(-448, 448).to(E4M3)
    tensors = {
        "m.weight": stored,
        "m.weight_scale_inv": scale,
        "m.input_scale": torch.ones(1),
        "n.weight": weight[:8].clone(),
    }
    tuned = opened(tensors, {"quant_method": "fp8", "weight_block_size": [64, 32]}, model_type="llama")
    whole = opened(
        {"m.weight": stored.float() * 0.02, "n.weight": weight[:8].clone()}, folder="whole", model_type="llama"
    )
    one, other = (spectra.audit(place.path, base=base.path, top_k=5) for place in (tuned, whole))
    assert [layer.vectors for layer in one.layers] == [layer.vectors for layer in other.layers]
    assert one.total("all") == other.total("all") > 0
    assert {layer.name for layer in one.layers} == {"m", "n"}


def test_a_layer_whose_base_is_not_read_is_skipped_with_the_reason(opened, make_adapter, rng):
    tensors = {"a.W_q": U8, "a.scale": torch.ones(4), "a.zero": torch.ones(4), "b.weight": draw(rng, 12, 10)}
    base = opened(tensors, {"quant_method": "hqq"})
    modules = {name: (draw(rng, 12, 2).numpy(), draw(rng, 2, 10).numpy()) for name in ("a", "b")}
    report = spectra.audit(make_adapter(modules, r=2), base=base.path)
    assert [layer.name for layer in report.layers] == ["b"]
    assert [(item["name"], "HQQ" in item["reason"]) for item in report.skipped] == [("a", True)]


@pytest.mark.parametrize("command", [["audit"], ["inspect"]])
def test_a_broken_one_ends_in_one_line(opened, make_adapter, rng, capsys, command):
    base = opened(four(rng, blocksize=63))
    adapter = make_adapter({"m": (draw(rng, 8, 2).numpy(), draw(rng, 2, 32).numpy())}, r=2)
    paths = [str(adapter), "--base", str(base.path)] if command == ["audit"] else [str(base.path)]
    assert main([*command, *paths]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert STATE in error
    assert "Traceback" not in error


NAMED = [
    ("unsloth/llama-3-8b-bnb-4bit", True),
    ("TheBloke/Mistral-7B-v0.1-GPTQ", True),
    ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
    ("neuralmagic/Meta-Llama-3-8B-Instruct-FP8", True),
    ("org/x.w4a16", True),
    ("/home/me/awq-experiments/llama/", False),
    ("meta-llama/Llama-3.2-1B", False),
    ("org/rabbit-1b", False),
    ("org/model-128bit", False),
]


@pytest.mark.parametrize(("name", "expected"), NAMED)
def test_names_that_say_that_a_model_is_quantised(name, expected):
    assert sounds_quantised(name) is expected


@pytest.mark.parametrize(
    ("quantised", "named", "says"),
    [
        (True, "../base", ["relative to its dequantised weights"]),
        (True, "org/model", ["relative to its dequantised weights", "audit it against those"]),
        (True, "org/model-fp8", ["relative to its dequantised weights"]),
        (False, "org/model-bnb-4bit", ["was not trained on"]),
        (False, "org/model", []),
        (False, "../base", []),
    ],
)
def test_the_caveat_is_in_the_report_and_in_the_text(opened, make_adapter, rng, capsys, quantised, named, says):
    weight = draw(rng, 24, 20)
    opened({"m.weight": weight.to(E4M3) if quantised else weight})
    adapter = make_adapter({"m": (draw(rng, 24, 2).numpy(), draw(rng, 2, 20).numpy())}, base_model_name_or_path=named)
    base = adapter.parent / "base"
    report = spectra.audit(adapter, base=base)
    caveat = report.base["caveat"] or ""
    assert bool(caveat) is bool(says)
    assert all(part in caveat for part in says)
    assert ("audit it against" in caveat) is ("audit it against those" in says)
    assert main(["audit", str(adapter), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert f"note: {caveat}" in text if says else "quantised" not in text
    value = json.loads(report.to_json())
    jsonschema.validate(value, json.loads((ROOT / "spectra" / "records" / "report.schema.json").read_text()))
    assert spectra.Report.from_dict(value).base_quantised is quantised


def test_a_fine_tune_and_its_base_at_different_precisions(opened, rng):
    weight = draw(rng, 24, 20)
    full = opened({"m.weight": weight}, folder="full")
    eight = opened({"m.weight": weight.to(E4M3)}, folder="eight")
    assert "the fine-tune is stored as fp8" in spectra.audit(eight.path, base=full.path).base["caveat"]
    assert "rounding changed in the base" in spectra.audit(full.path, base=eight.path).base["caveat"]
    assert "update" not in spectra.audit(eight.path, base=eight.path).base["caveat"]


@pytest.mark.parametrize(
    "command",
    [["compare"], ["ranks"], ["mitigate", "--scale", "0.5", "--dry-run"]],
)
def test_every_command_says_that_the_base_is_quantised(opened, make_adapter, rng, capsys, command):
    base = opened({"m.weight": draw(rng, 24, 20).to(E4M3)})
    adapter = make_adapter({"m": (4 * draw(rng, 24, 2).numpy(), draw(rng, 2, 20).numpy())})
    assert main([command[0], str(adapter), "--base", str(base.path), *command[1:]]) == 0
    assert re.search("note: .*stored as fp8.*dequantised", capsys.readouterr().out)


SUFFIXES = (
    "weight", "weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "qweight",
    "qzeros", "scales", "g_idx", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "W_q", "scale", "bias",
    "weight.quant_state.bitsandbytes__nf4", "x_blocks", "x_scales", "weight_scale_2", "weight_global_scale", "B",
    "s", "codebooks", "codes", "weight_scales", "biases", "input_scale",
)  # fmt: skip
SMALL = st.integers(0, 40) | st.sampled_from([64, 128, 2**31, 2**62])
ANYTHING = st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=8) | st.just([128, 128])
METHODS = st.sampled_from(["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "GPTQ", ""]) | ANYTHING


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(SUFFIXES),
        st.tuples(st.sampled_from(["I32", "U8", "I8", "F32", "F16", "F8_E4M3", "I64"]), st.lists(SMALL, max_size=4)),
        min_size=1,
    ),
    st.fixed_dictionaries(
        {"quant_method": METHODS},
        optional={
            "bits": st.sampled_from([2, 3, 4, 8]) | ANYTHING,
            "group_size": st.sampled_from([-1, 32]) | ANYTHING,
            "weight_block_size": st.lists(ANYTHING | SMALL, max_size=3) | ANYTHING,
            "version": ANYTHING,
            "meta": ANYTHING,
            "config_groups": ANYTHING
            | st.dictionaries(
                st.text(max_size=2), ANYTHING | st.fixed_dictionaries({"weights": ANYTHING | st.dictionaries(
                    st.sampled_from(["num_bits", "group_size", "strategy", "symmetric", "type"]), ANYTHING
                )})
            ),
        },
    )
    | ANYTHING,
)  # fmt: skip
def test_no_header_and_no_config_leads_to_any_other_error(stored, said):
    file = FIXTURES / "nothing.safetensors"
    tensors = {}
    for name, (dtype, shape) in stored.items():
        size = math.prod(shape) * BITS[dtype] // 8
        tensors[f"m.{name}"] = TensorInfo(f"m.{name}", dtype, tuple(shape), file, (8, size))
    made, named = [], set()
    try:
        made = list(quantised(tensors, {"quantization_config": said}))
    except CorruptFileError as error:
        named = {error.tensor}
    assert named <= set(tensors)
    used = [name for info in made for name in info.sources]
    assert len(used) == len(set(used))
    assert set(used) <= set(tensors)
    assert all(isinstance(info, Unreadable) or math.prod(info.shape) <= 64 * sum(
        tensors[name].span[1] for name in info.sources) for info in made)  # fmt: skip
