"""fp8, MXFP4 and the bytes of compressed-tensors against what their writers dequantise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spectra
from spectra.files.derived import Derived
from spectra.files.stored.quantised import quantised
from tests.support.quantised import E4M3, E5M2, E8M0, check, draw, refused
from tests.support.seeds import each_seed

SEEDS = range(24)


# fp8


@each_seed(SEEDS)
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


@each_seed(SEEDS)
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


def test_gpt2s_projections_in_fp8_are_as_they_were(opened, rng):
    weight = draw(rng, 64, 64).to(E4M3)
    name = "transformer.h.0.attn.c_proj"
    checkpoint = opened({f"{name}.weight": weight, f"{name}.bias": torch.zeros(64)}, model_type="gpt2")
    check(checkpoint, f"{name}.weight", weight.float(), "fp8")


# MXFP4


@each_seed(SEEDS)
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
