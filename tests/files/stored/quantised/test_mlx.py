"""What mlx quantises, against mlx itself."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.errors import CorruptFileError
from tests.support.quantised import check, refused
from tests.support.seeds import each_seed

mx = pytest.importorskip("mlx.core")


def quantised(rng, *shape, size=64, bits=4, mode="affine", dtype="float32"):
    """What mlx stores of a random weight, as torch has it, and what it means in float32."""
    weight = mx.array(rng.normal(size=shape).astype(np.float32)).astype(getattr(mx, dtype))
    parts = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
    stored = dict(zip(("weight", "scales", "biases"), map(as_torch, parts), strict=False))
    wide = [part.astype(mx.float32) if part.dtype not in (mx.uint32, mx.uint8) else part for part in parts]
    options = {"dtype": mx.float32} if mode == "mxfp4" else {}
    meant = mx.dequantize(*wide, group_size=size, bits=bits, mode=mode, **options)
    return stored, torch.from_numpy(np.array(meant.astype(mx.float32)))


def as_torch(array):
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def named(stored, module="m"):
    return {f"{module}.{key}": value for key, value in stored.items()}


@each_seed(range(36))
def test_affine(opened, seed):
    rng = np.random.default_rng(seed)
    bits, size = (2, 3, 4, 5, 6, 8)[seed % 6], (32, 64, 128)[seed // 6 % 3]
    rows, groups = int(rng.integers(3, 40)), int(rng.integers(1, 5))
    lead = (int(rng.integers(1, 4)),) if seed % 7 == 0 else ()
    dtype = ("float32", "float16", "bfloat16")[seed % 3]
    stored, meant = quantised(rng, *lead, rows, groups * size, size=size, bits=bits, dtype=dtype)
    said = {"group_size": size, "bits": bits} | ({"mode": "affine"} if seed % 2 else {})
    checkpoint = opened(named(stored) | {"m.bias": torch.zeros(rows)}, quantization=said)
    made = checkpoint.load("m.weight")
    torch.testing.assert_close(made, meant, rtol=1e-6, atol=1e-6)  # mlx may use one operation for code · scale + bias
    assert checkpoint.weights["m.weight"].quantised == f"mlx {bits} bits"
    assert torch.equal(checkpoint.load("m.weight", rows=slice(1, 3)), made[1:3])
    assert set(checkpoint.weights) == {"m.weight", "m.bias"}


@each_seed(range(8))
def test_mxfp4(opened, seed):
    rng = np.random.default_rng(seed)
    stored, meant = quantised(rng, int(rng.integers(3, 40)), 32 * int(rng.integers(1, 5)), size=32, mode="mxfp4")
    said = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    check(opened(named(stored), quantization=said), "m.weight", meant, "mlx mxfp4")


def test_modules_may_have_their_own_bits(opened, rng):
    (four, meant4), (six, meant6) = (quantised(rng, 8, 64, bits=bits) for bits in (4, 6))
    said = {"group_size": 64, "bits": 4, "b.c": {"group_size": 64, "bits": 6}, "norm": False}
    plain = {"norm.weight": torch.ones(8), "d.weight": torch.ones(8, 8)}
    checkpoint = opened(named(four, "a") | named(six, "b.c") | plain, quantization=said)
    torch.testing.assert_close(checkpoint.load("a.weight"), meant4, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(checkpoint.load("b.c.weight"), meant6, rtol=1e-6, atol=1e-6)
    assert torch.equal(checkpoint.load("d.weight"), torch.ones(8, 8))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "does not say how"),
        ({"group_size": 64, "bits": 4, "m": False}, "does not say how"),
        ({"group_size": 64, "bits": 7}, "bits = 7"),
        ({"group_size": 64, "bits": "4"}, "bits = 4"),
        ({"group_size": 64, "bits": 4.0}, "bits = 4.0"),
        ({"group_size": 0, "bits": 4}, "group_size = 0"),
        ({"group_size": 10**9, "bits": 4}, "group_size"),
        ({"group_size": 64, "bits": 4, "mode": "nvfp4"}, "nvfp4"),
        ({"group_size": 64, "bits": 4, "mode": ["affine"]}, "mode"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp4"}, "group_size = 64"),
    ],
)
def test_settings_that_leave_the_meaning_open_are_refused(opened, rng, said, reason):
    stored, _ = quantised(rng, 8, 64)
    tensors = named(stored) | {"other": torch.zeros(3, 3)}
    checkpoint = opened(tensors) if said is None else opened(tensors, quantization=said)
    assert re.search(reason, refused(checkpoint, "m.weight"))
    assert set(checkpoint.weights) == {"m.weight", "other"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"biases": None}, "m.biases"),
        ({"biases": torch.zeros(8, 2)}, "m.biases"),
        ({"biases": torch.zeros(8, 1).int()}, "m.biases"),
        ({"scales": torch.zeros(7, 1)}, "m.weight"),
        ({"scales": torch.zeros(8, 3), "biases": torch.zeros(8, 3)}, "m.weight"),
        ({"scales": torch.zeros(8, 1).int()}, "m.scales"),
        ({"weight": torch.zeros(8, 7, dtype=torch.uint32)}, "m.weight"),
        ({"weight": torch.zeros(9, 8, dtype=torch.uint32)}, "m.weight"),
        ({"scales": torch.zeros(8, 0), "biases": torch.zeros(8, 0)}, "m.weight"),
        ({"scales": torch.zeros(8, 1).double(), "biases": torch.zeros(8, 1)}, "m.scales"),
        ({"scales": torch.zeros(())}, "m.weight"),
        ({"biases": torch.zeros(1, 8, 1)}, "m.biases"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(opened, rng, changes, words):
    stored, _ = quantised(rng, 8, 64)
    tensors = {key: value for key, value in (stored | changes).items() if value is not None}
    with pytest.raises(CorruptFileError, match=re.escape(words)):
        _ = opened(named(tensors), quantization={"group_size": 64, "bits": 4}).weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": torch.ones(8, 2)}, "m.scales"),
        ({"scales": torch.ones(8, 3, dtype=torch.uint8)}, "m.weight"),
        ({"scales": torch.ones(7, 2, dtype=torch.uint8)}, "m.weight"),
        ({"weight": torch.zeros(8, 9, dtype=torch.uint32)}, "m.weight"),
    ],
)
def test_what_does_not_fit_in_mxfp4_is_refused_by_name(opened, rng, changes, words):
    stored, _ = quantised(rng, 8, 64, size=32, mode="mxfp4")
    with pytest.raises(CorruptFileError, match=re.escape(words)):
        _ = opened(named(stored | changes), quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"}).weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 255], ids=str)
def test_a_scale_that_is_no_number_fails_its_layer(tmp_path, rng, value):
    mode = "mxfp4" if value == 255 else "affine"
    stored, _ = quantised(rng, 8, 64, size=32, mode=mode)
    stored["scales"][3, 1] = value  # of mxfp4, 255 is 2 to the 128th
    said = {"group_size": 32, "bits": 4, "mode": mode}
    for folder, tensors in (("tuned", stored), ("base", quantised(rng, 8, 64, size=32, mode=mode)[0])):
        (tmp_path / folder).mkdir()
        save_file(named(tensors, "a.q_proj"), tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"quantization": said}))
    report = spectra.audit(tmp_path / "tuned", tmp_path / "base", top_k=2)
    (layer,) = report.layers
    assert layer.status == "non_finite"
