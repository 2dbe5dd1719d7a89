"""Four and eight bits of bitsandbytes against what it dequantises itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.errors import CorruptFileError
from spectra.files.stored.quantised import bitsandbytes
from tests.support.quantised import STATE, as_bytes, check, draw, four, of_bitsandbytes
from tests.support.seeds import each_seed

SEEDS = range(24)


@each_seed(range(32))
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


@each_seed(SEEDS)
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
    monkeypatch.setattr(bitsandbytes, "AT_ONCE", 64)
    weight = draw(rng, 33, 7)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    stored = {"m.weight": packed} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    check(opened(stored), "m.weight", of_bitsandbytes(packed, state), "nf4")


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
