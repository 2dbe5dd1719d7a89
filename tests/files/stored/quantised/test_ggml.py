"""ggml's quantised types against a twin that decodes them value by value, and GGUF files by gguf's own writer."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

import spectra
from spectra.cli import main
from spectra.errors import UnsupportedMethodError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived
from spectra.files.gguf.headers import LAYOUTS
from spectra.files.headers import TensorInfo
from spectra.files.stored.quantised.ggml import READ, dequantised
from spectra.pairing.precision import quantised_as
from tests.support.dialects import draw, write
from tests.support.ggml_blocks import TWINS, decoded, random_blocks
from tests.support.gguf_files import a_model, heads_of, lora_fields, reordered, write_gguf
from tests.support.seeds import each_seed

WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # what gguf can quantise, too


def in_blocks(weight, kind):
    """The bytes of a weight in blocks, by gguf's own arithmetic."""
    return quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])


def meant(raw, kind):
    return torch.from_numpy(quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def test_what_is_read_is_what_gguf_dequantises():
    theirs = {kind.name for kind in quants._type_traits} - {"BF16", "NVFP4"}
    assert theirs == READ == TWINS.keys()


@pytest.mark.parametrize("kind", sorted(READ))
def test_blocks_mean_what_the_twin_makes_of_them(tmp_path, rng, kind, monkeypatch):
    monkeypatch.setitem(dequantised.__globals__, "SLAB", 3 * 512)  # several slabs, the last of them short
    values, width = LAYOUTS[kind]
    raw = random_blocks(rng, kind, 7, 512 // values, width)
    path = write_gguf(tmp_path / "a.gguf", "qwen2", {"blk.0.ffn_up.weight": (raw, kind)})
    opened = open_checkpoint(path)
    info = opened.derived["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(info, Derived)
    assert (info.shape, info.dtype, info.quantised) == ((7, 512), "F32", kind)
    expected = decoded(raw, kind, width)
    found = opened.load(info)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert torch.equal(opened.load(info, rows=slice(2, 7, 2)), found[2:7:2])
    assert torch.equal(opened.load(info, rows=3), found[:3])


@each_seed(range(24))
def test_a_quantised_model_is_what_was_converted(tmp_path, seed):
    """In the order of transformers; a tensor is read as blocks, as halves or as floats, whatever its neighbours are."""
    rng = np.random.default_rng(seed)
    architecture, kind = ("llama", "qwen2", "phi3", "gemma2")[seed % 4], WRITTEN[seed // 3 % len(WRITTEN)]
    heads, key_heads = 4, int(rng.integers(1, 3)) * 2
    weights, names = a_model(rng, architecture, torch.float32, heads, key_heads)
    block = LAYOUTS[kind][0]
    stored, expected = {}, {}
    for name, own in names.items():
        weight = draw(rng, weights[name].shape[0], block * int(rng.integers(1, 3)))
        count = heads_of(architecture, own, heads, key_heads)
        ordered = weight if count is None else reordered(weight, count)
        if rng.random() < 0.3:
            stored[f"{own}.weight"], expected[name] = ordered.half(), weight.half().float()
            continue
        raw = in_blocks(ordered, kind)
        stored[f"{own}.weight"] = (raw, kind)
        plain = meant(raw, kind)
        # reordered(·) of what is meant must be what was stored
        expected[name] = plain if count is None else undone(plain, count)
    fields = [("uint32", f"{architecture}.attention.head_count", heads),
              ("uint32", f"{architecture}.attention.head_count_kv", key_heads)]  # fmt: skip
    opened = open_checkpoint(write_gguf(tmp_path / "model.gguf", architecture, stored, fields))
    for name, value in expected.items():
        assert torch.equal(opened.load(name).float(), value), name
        assert torch.equal(opened.load(name, rows=slice(1, 5)).float(), value[1:5])
    assert quantised_as(opened) in (kind, None)
    for name in opened.tensors:
        opened.read(name, digest=True)
    assert opened.fingerprint() == open_checkpoint(tmp_path).fingerprint(hash_contents=True)


def undone(weight, heads):
    """What :func:`reordered` was given, found by reordering the numbers of its rows."""
    places = reordered(torch.arange(weight.shape[0])[:, None], heads)[:, 0]
    out = torch.empty_like(weight)
    out[places] = weight
    return out


def test_an_adapter_on_a_quantised_base_counts_as_on_the_dequantised_one(tmp_path, rng):
    name = "model.layers.0.mlp.up_proj"
    W0 = draw(rng, 96, 64)
    raw = in_blocks(W0, "Q8_0")
    base = write_gguf(tmp_path / "base.gguf", "qwen2", {"blk.0.ffn_up.weight": (raw, "Q8_0")})
    plain = write(tmp_path / "plain", {f"{name}.weight": meant(raw, "Q8_0")})
    tensors = {"blk.0.ffn_up.weight.lora_a": draw(rng, 2, 64), "blk.0.ffn_up.weight.lora_b": 4 * draw(rng, 96, 2)}
    lora = write_gguf(tmp_path / "lora.gguf", "qwen2", tensors, lora_fields(2.0))
    one, other = (spectra.audit(lora, path, cache=False) for path in (base, plain))
    assert one[name].intruder_indices == other[name].intruder_indices
    assert one[name].intruders > 0
    assert [vector.sigma for vector in one[name].vectors] == [vector.sigma for vector in other[name].vectors]
    assert one.base["quantised"] == "Q8_0"
    assert "relative to its dequantised weights" in one.base["caveat"]
    assert any("Q8_0 in blocks of 32" in note for note in one[name].notes)
    assert other.base["quantised"] is None


def test_the_factors_of_a_lora_may_be_quantised(tmp_path, rng):
    """As ``convert_lora_to_gguf.py --outtype q8_0`` writes them."""
    A, B = draw(rng, 32, 64), draw(rng, 96, 32)
    raw = {"lora_a": in_blocks(A, "Q8_0"), "lora_b": in_blocks(B, "Q8_0")}
    tensors = {f"blk.0.ffn_up.weight.{factor}": (value, "Q8_0") for factor, value in raw.items()}
    lora = write_gguf(tmp_path / "lora.gguf", "qwen2", tensors, lora_fields(32.0))
    base = write(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": draw(rng, 96, 64)})
    ((_, _, update),) = spectra.iter_layers(lora, base)
    A, B = (meant(value, "Q8_0") for value in raw.values())
    assert update.factors is not None
    assert torch.equal(update.factors[0] @ update.factors[1], B.double() @ A.double())


def test_a_vector_in_blocks(tmp_path, rng):
    value = draw(rng, 96)
    raw = in_blocks(value[None], "Q8_0")[0]
    opened = open_checkpoint(write_gguf(tmp_path / "a.gguf", "qwen2", {"output_norm.weight": (raw, "Q8_0")}))
    whole = opened.load("output_norm.weight")
    assert whole.shape == (96,)
    assert torch.equal(opened.load("output_norm.weight", rows=slice(3, 9)), whole[3:9])
    assert (whole - value).abs().max() < value.abs().max() / 100


def test_without_the_package_the_error_says_what_to_install(tmp_path, rng, monkeypatch, capsys):
    path = write_gguf(
        tmp_path / "a.gguf", "qwen2", {"blk.0.ffn_up.weight": (in_blocks(draw(rng, 8, 32), "Q4_0"), "Q4_0")}
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    opened = open_checkpoint(path)
    with pytest.raises(UnsupportedMethodError, match=r"a\.gguf: tensor .*Q4_0.*pip install gguf"):
        opened.load("model.layers.0.mlp.up_proj.weight")
    assert main(["inspect", str(path)]) == 0, "what only needs headers needs no package"
    capsys.readouterr()
    assert main(["audit", str(path), "--base", str(path)]) == 2
    assert "pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers_end_in_one_line(tmp_path, rng, scale, capsys):
    raw = in_blocks(draw(rng, 8, 32), "Q8_0")
    raw[3, :2] = np.array([scale], "<f2").view(np.uint8)
    path = write_gguf(tmp_path / "a.gguf", "qwen2", {"blk.0.ffn_up.weight": (raw, "Q8_0")})
    base = write(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": draw(rng, 8, 32)})
    assert main(["audit", str(base), "--base", str(path)]) == 2
    said = capsys.readouterr()
    assert "mlp.up_proj" in said.out + said.err
    assert "Warning" not in said.err


@pytest.mark.parametrize("shape", [(0, 36), (3, 0), (0, 0), (2, 0, 18)])
def test_blocks_of_nothing(tmp_path, shape):
    info = TensorInfo("a", "Q4_0", (*shape[:-1], shape[-1] // 18 * 32), tmp_path, (0, 0))
    assert dequantised(info, torch.empty(shape, dtype=torch.uint8)).shape == info.shape
