"""GGUF files against gguf's own writer, its table of names, and the converter's order of rows."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import CorruptFileError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.gguf.headers import KEPT_ITEMS, TYPES, read_gguf
from spectra.files.gguf.names import MIXTURES, MODULES
from tests.support.dialects import check, draw, write
from tests.support.gguf_files import (
    ARCHITECTURES,
    DENSE,
    LORA,
    STORED,
    a_mixture,
    a_model,
    heads_of,
    lora_fields,
    reordered,
    write_gguf,
)
from tests.support.seeds import each_seed

# A model


@each_seed(range(24))
def test_a_model_is_what_was_converted(tmp_path, seed):
    rng = np.random.default_rng(seed)
    architecture = "llama" if seed % 2 else DENSE[seed // 2 % len(DENSE)]
    key_heads, dtype = int(rng.integers(1, 4)), tuple(STORED)[seed % 4]
    heads = key_heads * int(rng.integers(1, 4))
    weights, names = a_model(rng, architecture, dtype, heads, key_heads)
    stored = {}
    for name, own in names.items():
        count = heads_of(architecture, own, heads, key_heads)
        stored[f"{own}.weight"] = weights[name] if count is None else reordered(weights[name], count)
    stored["output_norm.weight"] = weights["model.norm.weight"].float()
    fields = [("uint32", f"{architecture}.attention.head_count", heads)]
    fields += [("uint32", f"{architecture}.attention.head_count_kv", key_heads)] if key_heads != heads else []
    path = write_gguf(tmp_path / "model.gguf", architecture, stored, fields)
    opened = open_checkpoint(tmp_path)
    assert opened.path == tmp_path
    assert opened.layout == "gguf"
    for name in names:
        assert opened.tensors[name].shape == tuple(weights[name].shape)
        assert torch.equal(opened.read(name, digest=True), weights[name])
        assert torch.equal(opened.read(name, rows=slice(3)), weights[name][:3])
        assert torch.equal(opened.read(name, rows=slice(1, 6, 2)), weights[name][1:6:2])
    base = write(tmp_path / "base", weights)
    report = spectra.audit(path, base)
    assert {layer.name for layer in report.layers} == {name.removesuffix(".weight") for name in names}
    assert all(layer.status == "unchanged" for layer in report.layers)
    for name in opened.tensors:
        opened.read(name, digest=True)
    assert opened.fingerprint() == open_checkpoint(tmp_path).fingerprint(hash_contents=True), (
        "in the order of transformers"
    )
    report = spectra.audit(base, path)
    assert all(layer.status == "unchanged" for layer in report.layers)


@each_seed(range(20))
def test_a_mixture_is_what_was_converted(tmp_path, seed):
    """Its stacks in three parts, plain or in blocks, against transformers' in two."""
    rng = np.random.default_rng(seed)
    architecture = sorted(MIXTURES)[seed % len(MIXTURES)]
    heads, key_heads, experts = 4, int(rng.choice([1, 2, 4])), int(rng.integers(2, 6))
    hidden, inner = (64, 32) if seed % 3 else (16, 16)  # square matrices do not tell how they lie
    weights, stored = a_mixture(rng, architecture, heads, key_heads, experts, hidden, inner)
    if hidden == 64 and seed % 2:
        stored = {name: quantised(value) if value.ndim > 1 else value for name, value in stored.items()}
    fields = [
        ("uint32", f"{architecture}.{key}", value)
        for key, value in (
            ("attention.head_count", heads), ("attention.head_count_kv", key_heads), ("expert_count", experts),
            ("embedding_length", hidden),
        )
    ]  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", architecture, stored, fields)
    base = write(tmp_path / "base", weights)
    (base / "config.json").write_text(json.dumps({"model_type": MIXTURES[architecture], "hidden_size": hidden}))
    of_gguf, of_base = spectra.audit(path, base, top_k=2), spectra.audit(base, path, top_k=2)
    for report in (of_gguf, of_base):
        assert not report.coverage.is_partial
        assert not report.failed
        assert len(report.layers) >= 6 + 2 * experts
        norms = [(layer.measures or {}).get("update_norm_relative") or 0.0 for layer in report.layers]
        assert max(norms) < (0.02 if hidden == 64 and seed % 2 else 1e-9)


def quantised(value):
    """(bytes, type) as gguf's own arithmetic makes blocks of eight bits."""
    return gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0), "Q8_0"


EMBEDDINGS = ("token_embd", "position_embd", "token_types", "per_layer_token_embd", "blk.0.nextn.embed_tokens")


def tensors_of(rng, architecture):
    """One block's tensors and those outside, of gguf's table, as an architecture that was not checked may have them."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    tensors = {}
    for kind in gguf.MODEL_TENSORS[kinds[architecture]]:
        name = gguf.TENSOR_NAMES[kind].format(bid=0, xid=0)
        if "norm" in name or "rope" in name or "bias" in name or "sinks" in name:
            tensors[f"{name}.weight"] = draw(rng, 6)
        elif name.endswith("_exps"):
            tensors[f"{name}.weight"] = draw(rng, 3, *((6, 8), (8, 6), (8, 8))[int(rng.integers(3))])
            tensors[f"{name}.bias"] = draw(rng, 3, 8)
        else:
            tensors[f"{name}.weight"] = draw(rng, 10, 8)
    return tensors


@pytest.mark.parametrize("architecture", sorted(set(gguf.MODEL_ARCH_NAMES.values()) - set(MODULES) - {"clip"}))
def test_an_architecture_that_was_not_checked_is_compared_with_its_own_kind(tmp_path, architecture):
    rng = np.random.default_rng(len(architecture))
    before = tensors_of(rng, architecture)
    after = {name: value + 0.1 * draw(rng, *value.shape) for name, value in before.items()}
    fields = [("uint32", f"{architecture}.expert_count", 3)] if any("_exps" in name for name in before) else []
    base = write_gguf(tmp_path / "base.gguf", architecture, before, fields)
    tuned = write_gguf(tmp_path / "tuned.gguf", architecture, after, fields)
    report = spectra.audit(tuned, base, top_k=2)
    assert not report.coverage.is_partial, report.to_text()
    found = {layer.name: layer for layer in report.layers}
    for name, value in before.items():
        change = after[name] - value
        if value.ndim == 3:
            for expert in range(3):
                layer = found.pop(f"blk.0.experts.{expert}.{name[10:].partition('_exps')[0]}_proj")
                assert layer.shape == tuple(value.shape[1:])
                expected = change[expert].norm() / value[expert].norm()
                assert layer.measures["update_norm_relative"] == pytest.approx(float(expected), rel=1e-4)
        elif value.ndim == 2 and not name.endswith(".bias"):
            layer = found.pop(name.removesuffix(".weight"))
            embedding = name.removesuffix(".weight") in EMBEDDINGS
            assert layer.shape == ((8, 10) if embedding else (10, 8)), name
            assert (layer.role == "embedding") == embedding
            assert (layer.role == "head") == (name in ("output.weight", "cls.output.weight")), name
    assert not found


def test_a_mixture_that_was_not_checked_keeps_its_names(tmp_path):
    """Also where models of that architecture without experts are known."""
    tensors = {"blk.0.ffn_gate_exps.weight": np.ones((2, 8, 8), np.float32), "output.weight": np.eye(8)}
    path = write_gguf(tmp_path / "a.gguf", "mistral3", tensors, [("uint32", "mistral3.expert_count", 2)])
    assert {*open_checkpoint(path).weights} == {
        "blk.0.experts.0.gate_proj.weight", "blk.0.experts.1.gate_proj.weight", "output.weight",
    }  # fmt: skip
    plain = write(tmp_path / "plain", {"lm_head.weight": torch.eye(8)})
    for tuned, base in ((path, plain), (plain, path)):
        with pytest.raises(WrongBaseError, match=r"the GGUF architecture 'mistral3' are called elsewhere"):
            spectra.audit(tuned, base)


def test_names_that_meet_are_malformed(tmp_path):
    tensors = {"blk.0.ffn_gate_exps.weight": np.ones((2, 8, 8), np.float32),
               "blk.0.experts.gate_proj": np.ones((2, 8, 8), np.float32)}  # fmt: skip
    with pytest.raises(CorruptFileError, match="under two names"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", "deepseek2", tensors))


def test_a_lora_upon_a_model_of_its_own_kind(tmp_path):
    """What both have in ggml's order comes out as what neither has."""
    rng = np.random.default_rng(0)
    weights, names = a_model(rng, "llama", torch.float32, 4, 2)
    name = "model.layers.1.self_attn.k_proj.weight"
    A, B = draw(rng, 2, weights[name].shape[1]), draw(rng, weights[name].shape[0], 2)
    stored = {
        f"{own}.weight": weights[key] if count is None else reordered(weights[key], count)
        for key, own in names.items() for count in [heads_of("llama", own, 4, 2)]
    }  # fmt: skip
    fields = [("uint32", "llama.attention.head_count", 4), ("uint32", "llama.attention.head_count_kv", 2)]
    base = write_gguf(tmp_path / "base.gguf", "llama", stored, fields)
    tensors = {"blk.1.attn_k.weight.lora_a": A, "blk.1.attn_k.weight.lora_b": reordered(B, 2)}
    lora = write_gguf(tmp_path / LORA, "llama", tensors, lora_fields(4.0))
    check(base, lora, {name: weights[name].double() + 2 * B.double() @ A.double()})


def test_types_that_are_not_read_are_named(tmp_path, capsys):
    """Of a model and of a base alike: what is stored so is a part that was not looked at."""
    raw = np.zeros((8, 40), np.uint8)
    tensors = {"blk.0.ffn_up.weight": (raw, "Q8_1"), "blk.0.ffn_down.weight": np.ones((8, 8), np.float32)}
    path = write_gguf(tmp_path / "a.gguf", "qwen2", tensors)
    opened = open_checkpoint(path)
    assert {info.dtype for info in opened.tensors.values()} == {"F32", "Q8_1"}
    (skipped,) = plan_updates(opened).skipped
    assert "Q8_1" in skipped.reason
    assert opened.fingerprint(hash_contents=True).covers == "contents", "also of what is not read"
    assert main(["audit", str(path), "--base", str(path)]) == 2
    assert "Q8_1" in capsys.readouterr().out


# What gguf itself knows


def test_types_are_those_of_gguf():
    theirs = {int(kind): (kind.name, block, width) for kind, (block, width) in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == TYPES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_gguf(architecture):
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 3)
    for part, module in MODULES[architecture].items():
        assert table.get_name(f"model.layers.2.{module}") == f"blk.2.{part}"
    assert table.get_name("model.embed_tokens") == "token_embd"
    if architecture not in ("gemma", "gemma2", "command-r", "cohere2"):  # whose head is the embedding
        assert table.get_name("lm_head") == "output"
    known = {
        gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[kinds[architecture]]
        if gguf.TENSOR_NAMES[kind].startswith("blk.") and "norm" not in gguf.TENSOR_NAMES[kind]
    }  # fmt: skip
    left = {name.rpartition(".")[2] for name in known} - MODULES[architecture].keys()
    assert left <= {"attn_rot_embd", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"} | (
        {"attn_qkv"} if architecture == "phi2" else {"attn_q", "attn_k", "attn_v"} if architecture == "phi3" else set()
    )


@each_seed(range(20))
def test_headers_are_read_as_gguf_reads_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tensors = {}
    for index in range(int(rng.integers(1, 7))):
        shape = tuple(int(size) for size in rng.integers(1, 6, size=int(rng.integers(1, 5))))
        kind = (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64)[int(rng.integers(7))]
        tensors[f"a.{index}"] = (10 * rng.normal(size=shape)).astype(kind)
    numbers = list(range(int(rng.integers(1, 2000))))
    fields = [
        ("string", "general.name", "a name"), ("array", "x.texts", [f"token {i}" * (i % 40) for i in range(3000)]),
        ("array", "x.numbers", numbers), ("bool", "x.yes", True),
        ("float64", "x.f", 0.5), ("int64", "x.i", -7), ("string", "x.long", "x" * 400_000),
    ]  # fmt: skip
    alignment = (None, 8, 64, 4096)[seed % 4]
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, fields, alignment=alignment)
    found, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert found.fields["x.yes"] is True
    assert (found.fields["x.f"], found.fields["x.i"]) == (0.5, -7)
    assert "x.texts" not in found.fields
    assert ("x.numbers" in found.fields) == (len(numbers) <= KEPT_ITEMS)
    assert list(found.tensors) == [item.name for item in theirs.tensors]
    for item in theirs.tensors:
        info = found.tensors[item.name]
        assert info.shape == tuple(reversed(item.shape.tolist()))
        assert info.span == (item.data_offset, item.n_bytes)
        assert torch.equal(info.value(), torch.from_numpy(tensors[item.name]))  # type: ignore[attr-defined]


def test_norms_under_ggufs_own_names_are_no_part(tmp_path, rng):
    """Of either side: what a converter calls a norm is not what transformers do."""
    q, norm = draw(rng, 16, 16), draw(rng, 16)
    names = {"model.layers.0.self_attn.q_proj.weight": q, "model.layers.0.input_layernorm.weight": norm}
    plain = write(tmp_path / "plain", names)
    (plain / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2}))
    fields = [("uint32", "llama.attention.head_count", 2), ("uint32", "llama.attention.head_count_kv", 2)]
    own = {"blk.0.attn_q.weight": q, "blk.0.attn_norm.weight": norm, "rope_freqs.weight": draw(rng, 8)}
    converted = write_gguf(tmp_path / "model.gguf", "llama", own, fields)
    for tuned, base in ((converted, plain), (plain, converted)):
        report = spectra.audit(tuned, base, cache=False)
        assert not report.coverage.is_partial, report.to_text()
        assert report.coverage.without_spectrum
