"""GGUF files against gguf's own writer, its table of names, and the converter's order of rows.

``python -m tests.files.test_gguf FOLDER RESULTS`` runs the files that are broken or made to harm.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AdapterError, AmbiguousFilesError, SpectraError, UnsupportedMethodError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.gguf import KEPT_ITEMS, MAX_ITEMS, MODULES, REORDERED, TYPES, in_order, read_gguf
from spectra.pairing.fused import split_apart
from spectra.pairing.precision import quantised_as
from tests.adapters.test_kohya import check, draw, write
from tests.support import hostile
from tests.support.hostile import Case
from tests.support.paths import ROOT

LORA = "lora.gguf"
ARCHITECTURES = tuple(sorted(MODULES))
STORED = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16,
          torch.float64: gguf.GGMLQuantizationType.F64, torch.bfloat16: gguf.GGMLQuantizationType.BF16}  # fmt: skip


def reordered(weights, heads):
    """The converter's ``LlamaModel.permute``, written out."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2)
        .reshape(weights.shape)
    )  # fmt: skip


def write_gguf(path, architecture, tensors, fields=(), *, alignment=None):
    """A file by gguf's own writer; ``fields`` are (method, key, value)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for method, key, value in fields:
        getattr(writer, f"add_{method}")(key, value)
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            raw = value.contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=STORED[value.dtype])
        else:
            writer.add_tensor(name, value.contiguous().numpy() if isinstance(value, torch.Tensor) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora_fields(alpha):
    fields = [("string", "general.type", "adapter"), ("string", "adapter.type", "lora")]
    return fields + ([] if alpha is None else [("float32", "adapter.lora.alpha", alpha)])


def a_model(rng, architecture, dtype, heads, key_heads):
    """{name in transformers: weight} of two layers, and how GGUF calls each module."""
    width, hidden, inner, words = 4, 2 * heads * 2, int(rng.integers(5, 20)), int(rng.integers(20, 40))
    shapes = {
        "attn_q": (heads * width, hidden), "attn_k": (key_heads * width, hidden), "attn_v": (key_heads * width, hidden),
        "attn_qkv": ((heads + 2 * key_heads) * width, hidden), "attn_output": (hidden, heads * width),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": draw(rng, words, hidden, dtype=dtype)}
    names = {"model.embed_tokens.weight": "token_embd", "lm_head.weight": "output"}
    weights["lm_head.weight"] = draw(rng, words, hidden, dtype=dtype)
    for layer in range(2):
        for part, module in MODULES[architecture].items():
            name = f"model.layers.{layer}.{module}.weight"
            weights[name] = draw(rng, *shapes[part], dtype=dtype)
            names[name] = f"blk.{layer}.{part}"
    weights["model.norm.weight"] = draw(rng, hidden, dtype=dtype)
    return weights, names


def heads_of(architecture, name, heads, key_heads):
    """How many heads the rows of a weight are reordered by, or None."""
    part = name.rpartition(".")[2]
    return {"attn_q": heads, "attn_k": key_heads}[part] if part in REORDERED.get(architecture, ()) else None


# A LoRA


@pytest.mark.parametrize("seed", range(40))
def test_updates_are_those_of_the_formula(tmp_path, seed):
    rng = np.random.default_rng(seed)
    architecture = "llama" if seed % 2 else ARCHITECTURES[seed // 2 % len(ARCHITECTURES)]
    key_heads = int(rng.integers(1, 4))
    heads = key_heads * int(rng.integers(1, 4))
    dtype = tuple(STORED)[int(rng.integers(4))]
    weights, names = a_model(rng, architecture, dtype, heads, key_heads)
    config = {"model_type": architecture, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    if key_heads == heads and seed % 3 == 0:
        del config["num_key_value_heads"]
    base = write(tmp_path / "base", weights)
    (base / "config.json").write_text(json.dumps({"text_config": config} if seed % 5 == 4 else config))
    alpha = (None, 0.0, -3.5, 16.0, 8.0)[seed % 5]
    tensors: dict[str, torch.Tensor] = {}
    expected = {}
    for name, own in names.items():
        if rng.integers(5) == 0 and tensors:
            continue
        out, columns = weights[name].shape
        rank = int(rng.integers(1, 5))
        stored = tuple(STORED)[int(rng.integers(4))]
        scaling = alpha / rank if alpha else 1.0
        if own == "token_embd":  # (V, r) and (d, r)
            A, B = draw(rng, out, rank, dtype=stored), draw(rng, columns, rank, dtype=stored)
            dW = A.double() @ B.double().T
        else:
            A, B = draw(rng, rank, columns, dtype=stored), draw(rng, out, rank, dtype=stored)
            dW = B.double() @ A.double()
        expected[name] = weights[name].double() + scaling * dW
        count = heads_of(architecture, own, heads, key_heads)
        tensors[f"{own}.weight.lora_a"], tensors[f"{own}.weight.lora_b"] = (
            A,
            B if count is None else reordered(B, count),
        )
    tensors["blk.0.attn_norm.weight"] = draw(rng, 5)
    alignment = (None, 8, 64, 256)[seed % 4]
    path = write_gguf(tmp_path / LORA, architecture, tensors, lora_fields(alpha), alignment=alignment)
    pairs, skipped = check(base, path, expected)
    assert [item.name for item in skipped if "attn_norm" in item.name] == ["blk.0.attn_norm.weight"]
    for pair in pairs.values():
        assert pair.update.alpha == (alpha or None)
        assert ("scaling is 1" in pair.notes[0]) == (not alpha)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_rows_is_that_of_the_rotary_embedding(seed):
    """Scores with neighbours rotated, from reordered weights, are those with halves rotated, from the original ones."""
    rng = np.random.default_rng(seed)
    heads, half, columns = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(2, 9))
    W, V, x, y = (draw(rng, *shape).double() for shape in [(heads * 2 * half, columns)] * 2 + [(columns,)] * 2)
    angles = [torch.from_numpy(rng.normal(size=half)), torch.from_numpy(rng.normal(size=half))]

    def halves(vector, angle):
        first, second = vector[..., :half], vector[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    def neighbours(vector, angle):
        even, odd = vector[..., ::2], vector[..., 1::2]
        return torch.stack(
            [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1
        ).flatten(-2)

    def scores(rotate, A, B):
        a, b = (rotate((M @ v).reshape(heads, -1), angle) for M, v, angle in zip((A, B), (x, y), angles, strict=True))
        return (a * b).sum(-1)

    ours = scores(halves, W, V)
    assert torch.allclose(scores(neighbours, reordered(W, heads), reordered(V, heads)), ours, atol=1e-12)
    assert torch.equal(in_order(reordered(W, heads), heads), W)
    assert torch.equal(reordered(in_order(W, heads), heads), W)


def small_lora(folder, architecture="llama", fields=None, **tensors):
    shapes = {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_q.weight.lora_b": (8, 2)} | tensors
    values = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    return write_gguf(folder / LORA, architecture, values, lora_fields(4.0) if fields is None else fields)


def small_base(folder, **config):
    write(folder, {"model.layers.0.self_attn.q_proj.weight": torch.eye(8), "lm_head.weight": torch.eye(8)})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


def test_a_lora_is_audited_and_told_of(tmp_path, capsys):
    path, base = small_lora(tmp_path), small_base(tmp_path / "base", num_attention_heads=2)
    report = spectra.audit(path, base)
    assert report.tuned["format"] == "gguf-lora"
    assert (report.tuned["rank"], report.tuned["alpha"]) == (2, 4.0)
    assert main(["inspect", str(tmp_path), "--base", str(base)]) == 0
    said = capsys.readouterr().out
    assert "gguf-lora" in said
    assert "1 matched" in said


def test_an_adapter_without_a_config_is_no_whole_model(tmp_path):
    """What a quantised base means for a whole model is not said of it, nor is it split as one."""
    path, folder = small_lora(tmp_path), small_base(tmp_path / "base", num_attention_heads=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    write(folder, {name: torch.eye(8).to(torch.float8_e4m3fn), "lm_head.weight": torch.eye(8)})
    report = spectra.audit(path, folder)
    assert (
        report.base["caveat"] == "the base is stored as fp8: intruders are counted relative to its dequantised weights"
    )
    base, tuned = open_checkpoint(folder), open_checkpoint(path)
    assert split_apart(base, tuned)[1] is tuned
    assert split_apart(base, base)[1].split_fused


def test_what_switches_an_adapter_on_makes_it_conditional(tmp_path):
    path = small_lora(tmp_path, fields=[*lora_fields(4.0), ("array", "adapter.alora.invocation_tokens", [3, 4])])
    assert plan_updates(open_checkpoint(path)).facts["conditional"] is True
    assert plan_updates(open_checkpoint(small_lora(tmp_path / "plain"))).facts["conditional"] is False


def test_stacked_experts_are_skipped(tmp_path):
    extra = {"blk.0.ffn_up_exps.weight.lora_a": (3, 2, 8), "blk.0.ffn_up_exps.weight.lora_b": (3, 9, 2)}
    plan = plan_updates(open_checkpoint(small_lora(tmp_path, **extra)))
    assert len(plan.updates) == 1
    assert {item.name for item in plan.skipped} == set(extra)


@pytest.mark.parametrize(("architecture", "words"), [("gptneox", "'gptneox'"), ("baichuan", "llama, phi2")])
def test_an_architecture_that_was_not_checked_is_refused(tmp_path, architecture, words):
    with pytest.raises(UnsupportedMethodError, match=words):
        plan_updates(open_checkpoint(small_lora(tmp_path, architecture)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blk.0.attn_q.weight.lora_b": None}, "lora_b is missing"),
        ({"blk.0.attn_q.weight.lora_a": None}, "lora_a is missing"),
        ({"blk.0.attn_q.weight.lora_b": (8, 3)}, "rank"),
        ({"blk.0.attn_q.weight.lora_a": (2,)}, "expected a matrix"),
        ({"blk.0.attn_q.weight": (8, 8)}, "neither lora_a nor lora_b"),
        ({"blk.0.attn_x.weight.lora_a": (2, 8), "blk.0.attn_x.weight.lora_b": (8, 2)}, "no module"),
        ({"v.blk.0.attn_q.weight.lora_a": (2, 8), "v.blk.0.attn_q.weight.lora_b": (8, 2)}, "no module"),
    ],
)
def test_a_lora_that_contradicts_itself(tmp_path, changes, words):
    with pytest.raises(AdapterError, match=words) as caught:
        plan_updates(open_checkpoint(small_lora(tmp_path, **changes)))
    assert "blk.0.attn" in str(caught.value)


def test_quantised_factors_are_named(tmp_path):
    raw = gguf.quants.quantize(np.ones((2, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / LORA, "llama")
    for _, key, value in lora_fields(None):
        writer.add_string(key, value)
    writer.add_tensor("output.weight.lora_a", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight.lora_b", np.ones((8, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError, match="floating dtype, found Q8_0"):
        plan_updates(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [({}, "num_attention_heads"), ({"num_attention_heads": "2"}, "config.json"),
     ({"num_attention_heads": 3}, "3 heads"), ({"num_attention_heads": 0}, "0 heads")],
)  # fmt: skip
def test_rows_whose_order_is_not_known_are_refused(tmp_path, config, words):
    with pytest.raises(SpectraError, match=words):
        spectra.audit(small_lora(tmp_path), small_base(tmp_path / "base", **config))


def test_a_lora_is_no_base(tmp_path):
    path, base = small_lora(tmp_path), small_base(tmp_path / "base")
    with pytest.raises(WrongBaseError, match="adapter"):
        spectra.audit(base, path)


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    values = {"blk.0.attn_q.weight": np.ones((8, 8), np.float32)}
    for index, (fields, words) in enumerate([
        ([("string", "general.type", "mmproj")], "mmproj"),
        ([("string", "general.type", "adapter"), ("string", "adapter.type", "control_vector")], "control_vector"),
        ([("uint16", "split.count", 3)], "3 parts"),
        ([("uint32", "llama.expert_count", 8)], "experts"),
        ([("array", "llama.attention.head_count", [4, 2])], "number of heads"),
        ([], "number of heads"),
    ]):  # fmt: skip
        path = write_gguf(tmp_path / f"{index}.gguf", "llama", values, fields)
        with pytest.raises(UnsupportedMethodError, match=words):
            plan_updates(open_checkpoint(path))
    with pytest.raises(AmbiguousFilesError, match=r"0\.gguf, 1\.gguf"):
        open_checkpoint(tmp_path)


# A model


@pytest.mark.parametrize("seed", range(24))
def test_a_model_is_what_was_converted(tmp_path, seed):
    rng = np.random.default_rng(seed)
    architecture = "llama" if seed % 2 else ARCHITECTURES[seed // 2 % len(ARCHITECTURES)]
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
    assert opened.fingerprint() == open_checkpoint(tmp_path).fingerprint(verify=True), "in the order of transformers"
    report = spectra.audit(base, path)
    assert all(layer.status == "unchanged" for layer in report.layers)


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


def test_quantised_weights_of_a_model_are_skipped(tmp_path):
    weights = {"blk.0.ffn_up.weight": np.ones((8, 32), np.float32)}
    path = write_gguf(tmp_path / "a.gguf", "qwen2", weights)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen2")
    raw = gguf.quants.quantize(weights["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_checkpoint(tmp_path / "b.gguf")
    assert {info.dtype for info in opened.tensors.values()} == {"F32", "Q8_0"}
    (skipped,) = plan_updates(opened).skipped
    assert "Q8_0" in skipped.reason
    assert opened.fingerprint(verify=True).covers == "contents", "also of what is not read"
    assert (quantised_as(opened), quantised_as(open_checkpoint(path))) == ("Q8_0", None)
    report = spectra.audit(tmp_path / "b.gguf", tmp_path / "b.gguf", verify=True)
    assert report.base["quantised"] == "Q8_0"
    assert report.base["caveat"] == "weights that the base stores as Q8_0 are not read"
    assert open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"].shape == (8, 32)


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
    if architecture not in ("gemma", "gemma2"):  # whose head is the embedding
        assert table.get_name("lm_head") == "output"
    known = {
        gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[kinds[architecture]]
        if gguf.TENSOR_NAMES[kind].startswith("blk.") and "norm" not in gguf.TENSOR_NAMES[kind]
    }  # fmt: skip
    left = {name.rpartition(".")[2] for name in known} - MODULES[architecture].keys()
    assert left <= {"attn_rot_embd", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"} | (
        {"attn_qkv"} if architecture == "phi2" else {"attn_q", "attn_k", "attn_v"} if architecture == "phi3" else set()
    )


@pytest.mark.parametrize("seed", range(20))
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


# What is broken, or made to harm


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return len(raw).to_bytes(8, "little") + raw


def field(key, kind=8, value=None):
    return text(key) + struct.pack("<I", kind) + (text(value) if kind == 8 and value is not None else value or b"")


def tensor(name="blk.0.attn_q.weight.lora_a", shape=(8, 2), kind=0, offset=0):
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


ADAPTER = field("general.architecture", value="llama") + field("general.type", value="adapter")
ADAPTER += field("adapter.type", value="lora")
BOTH = tensor() + tensor("blk.0.attn_q.weight.lora_b", (2, 8), 0, 64)


def a_file(fields=ADAPTER, tensors=BOTH, *, magic=b"GGUF", version=3, count=2, fields_count=3, data=128, alignment=32):
    head = magic + struct.pack("<IQQ", version, count, fields_count) + fields + tensors
    return head + b"\0" * (-len(head) % alignment) + b"\0" * data


def array(inner, count, content=b""):
    return struct.pack("<IQ", inner, count) + content


CASES: dict[str, Case] = {}


def case(name, words, content):
    def build(box):
        (box / LORA).write_bytes(content)

    assert name not in CASES
    CASES[name] = Case(name, build, (LORA, *words))


HUGE = 2**64 - 1
for _name, _words, _content in (
    ("an empty file", ("truncated",), b""),
    ("four letters", ("truncated",), b"GGUF"),
    ("another file", ("no GGUF file",), b"\x7fELF" + b"\2" * 200),
    ("a pickle", ("no GGUF file",), b"\x80\x04\x95" + b"\0" * 60),
    ("version 1", ("version 1",), a_file(version=1)),
    ("version 99", ("version 99",), a_file(version=99)),
    ("big-endian", ("big-endian",), a_file(version=3 << 24)),
    ("no tensors", ("no tensors",), a_file(tensors=b"", count=0)),
    ("tensors, 2 to the 64th", ("tensors",), a_file(count=HUGE)),
    ("tensors, a million", ("tensors",), a_file(count=10**6)),
    ("fields, 2 to the 64th", ("fields",), a_file(fields_count=HUGE)),
    ("fields, 20,000", ("fields",), a_file(fields=b"".join(field(f"{i}", 0, b"\1") for i in range(20_000)),
                                           fields_count=20_000)),
    ("half a header", ("truncated",), a_file()[:150]),
    ("half of its values", ("truncated", "lora_b"), a_file(data=100)),
    ("a key of 4 GB", ("a key of",), a_file(fields=struct.pack("<Q", 2**32) + b"x" * 60, fields_count=1)),
    ("a key of nothing", ("a key of 0",), a_file(fields=field(""), fields_count=1)),
    ("a key that is no text", ("no text",), a_file(fields=field(b"\xff\xfe", 0, b"\1"), fields_count=1)),
    ("a key with a line of its own", ("no text",),
     a_file(fields=field("a\nspectra: error: fine", 0, b"\1"), fields_count=1)),
    ("a key twice", ("'general.type'", "twice"),
     a_file(fields=ADAPTER + field("general.type", value="model"), fields_count=4)),
    ("a text of 16 EB", ("truncated",), a_file(fields=text("x") + struct.pack("<IQ", 8, HUGE), fields_count=1)),
    ("a value of type 77", ("type 77",), a_file(fields=field("x", 77, b"\1" * 8), fields_count=1)),
    ("an array of 16 EB", ("truncated",), a_file(fields=field("x", 9, array(10, HUGE)), fields_count=1)),
    ("an array of texts without end", ("texts",), a_file(fields=field("x", 9, array(8, HUGE)), fields_count=1)),
    ("an array of empty texts", ("texts",), a_file(fields=field("x", 9, array(8, MAX_ITEMS + 1, b"\0" * 8 * MAX_ITEMS)),
                                                   fields_count=1)),
    ("as many empty texts as there may be", ("neither a model", "'x'"),
     a_file(fields=field("x", 9, array(8, MAX_ITEMS, b"\0" * 8 * MAX_ITEMS)) + field("general.type", value="x"),
            fields_count=2)),
    ("texts that lead out", ("truncated",), a_file(fields=field("x", 9, array(8, 3, struct.pack("<QQQ", 5, 2**40, 1))),
                                                   fields_count=1)),
    ("arrays within arrays", ("arrays within",), a_file(fields=field("x", 9, array(9, 1) * 50), fields_count=1)),
    ("arrays of many arrays", ("arrays within",), a_file(fields=field("x", 9, array(9, 10**9) * 2), fields_count=1)),
    ("numbers, 9 million", ("general.architecture",),
     a_file(fields=field("x", 9, array(10, 9 * 10**6, b"\0" * 72 * 10**6)) + field("general.type", value="adapter")
            + field("adapter.type", value="lora"))),
    ("a header of 120 MB", ("100,000,000",), a_file(fields=field("x", 9, array(10, 15 * 10**6, b"\0" * 120 * 10**6)))),
    ("texts of 60 kB, a thousand of them", ("neither a model",),
     a_file(fields=b"".join(field(f"x{i}", value="y" * 60_000) for i in range(1000)), fields_count=1000)),
    ("short texts, 9,000 of them", ("neither a model",),
     a_file(fields=b"".join(field(f"x{i}", value="y" * 255) for i in range(9000)) + field("general.type", value="x"),
            fields_count=9001)),
    ("a name that is no text", ("no text",), a_file(tensors=tensor(b"\xff\xfe\xfd") + BOTH, count=3)),
    ("a name of a million letters", ("a tensor's name of",), a_file(tensors=tensor("x" * 10**6) + BOTH, count=3)),
    ("a name twice", ("lora_a", "twice"), a_file(tensors=tensor() + tensor(offset=64))),
    ("9 dimensions", ("9 dimensions",), a_file(tensors=tensor(shape=(1,) * 9) + BOTH, count=3)),
    ("dimensions, 2 to the 32nd", ("dimensions",),
     a_file(tensors=text("x") + struct.pack("<I", 2**32 - 1) + BOTH, count=3)),
    ("an enormous shape", ("lora_a", "takes"), a_file(tensors=tensor(shape=(2**40, 2**40)), count=1)),
    ("a shape that overflows", ("lora_a", "takes"), a_file(tensors=tensor(shape=(2**63, 2**63, 2)), count=1)),
    ("a type nobody knows", ("lora_a", "type 99"), a_file(tensors=tensor(kind=99), count=1)),
    ("a type that is gone", ("lora_a", "type 4"), a_file(tensors=tensor(kind=4), count=1)),
    ("rows that are no blocks", ("lora_a", "blocks of 32"), a_file(tensors=tensor(kind=8), count=1)),
    ("an offset that overlaps", ("lora_b", "begins at 32"), a_file(tensors=tensor() + tensor("lora_b", (2, 8), 0, 32))),
    ("an offset that leaves a gap", ("lora_b", "begins at 96"),
     a_file(tensors=tensor() + tensor("lora_b", (2, 8), 0, 96))),
    ("an offset behind the end", ("lora_a", "begins at"), a_file(tensors=tensor(offset=HUGE - 31), count=1)),
    ("an alignment of 3", ("alignment of 3",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\3\0\0\0"), fields_count=4)),
    ("an alignment of 0", ("alignment of 0",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\0" * 4), fields_count=4)),
    ("an alignment of 2 GB", ("alignment of",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\0\0\0\x80"), fields_count=4)),
    ("an alignment that is a text", ("alignment of",),
     a_file(fields=ADAPTER + field("general.alignment", value="32\n"), fields_count=4)),
    ("an alpha that is NaN", ("adapter.lora.alpha",),
     a_file(fields=ADAPTER + field("adapter.lora.alpha", 6, b"\0\0\xc0\x7f"), fields_count=4)),
    ("an alpha that is a text", ("adapter.lora.alpha",),
     a_file(fields=ADAPTER + field("adapter.lora.alpha", value="8"), fields_count=4)),
    ("a kind with a line of its own", ("adapter.type",),
     a_file(fields=field("general.type", value="adapter") + field("adapter.type", value="x\nspectra: error: fine"),
            fields_count=2)),
    ("an architecture with a line of its own", ("architecture",),
     a_file(fields=field("general.architecture", value="x\x1b[2J\nspectra: error: fine")
            + field("general.type", value="adapter") + field("adapter.type", value="lora"))),
    ("an architecture that is a number", ("general.architecture",),
     a_file(fields=field("general.architecture", 4, b"\7\0\0\0") + field("general.type", value="adapter")
            + field("adapter.type", value="lora"))),
    ("no module of the base", ("wrong base", "output"),
     a_file(tensors=tensor("output.weight.lora_a") + tensor("output.weight.lora_b", (2, 8), 0, 64))),
    ("a block of a million digits", ("a tensor's name of",),
     a_file(tensors=tensor(f"blk.{'1' * 10**6}.attn_q.weight.lora_a"), count=1)),
    ("a block of 400 digits", ("no module",), a_file(tensors=tensor(f"blk.{'1' * 400}.attn_q.weight.lora_a")
     + tensor(f"blk.{'1' * 400}.attn_q.weight.lora_b", (2, 8), 0, 64))),
):  # fmt: skip
    case(_name, _words, _content)


def _whole_file(box):
    (box / LORA).write_bytes(a_file())


_name = "a base that does not tell its heads"
CASES[_name] = Case(_name, _whole_file, ("q_proj", "num_attention_heads"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    results = folder / "results.json"
    command = [sys.executable, "-m", "tests.files.test_gguf", str(folder / "cases"), str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file(outcomes, name):
    found = outcomes[name]
    assert found["code"] == 2, found["err"]
    assert found["err"].startswith("spectra: error: ")
    assert found["err"][:-1].isprintable()
    for word in CASES[name].words:
        assert word in found["err"]
    assert found["seconds"] <= hostile.SECONDS
    assert found["mib"] <= hostile.MIB
    assert found["events"] == []
    assert found["changed"] == []


def test_the_builders_own_file_is_read(tmp_path):
    (tmp_path / LORA).write_bytes(a_file())
    theirs = gguf.GGUFReader(tmp_path / LORA)
    assert [item.name for item in theirs.tensors] == list(open_checkpoint(tmp_path).tensors)
    assert len(plan_updates(open_checkpoint(tmp_path)).updates) == 1


def test_any_bytes_after_the_magic(tmp_path):
    rng = np.random.default_rng(0)
    good, place = a_file(), tmp_path / LORA
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            content[int(rng.integers(4, len(content)))] = int(rng.integers(256))
        place.write_bytes(
            bytes(content[: int(rng.integers(20, len(content) + 1))]) if rng.integers(3) == 0 else content
        )
        said = str(place)
        try:
            plan_updates(open_checkpoint(place))
        except SpectraError as error:
            said = str(error)
        assert said.startswith(str(place))


if __name__ == "__main__":
    jobs = {name: partial(hostile.prepare, one=CASES[name]) for name in sys.argv[3:] or CASES}
    Path(sys.argv[2]).write_text(json.dumps(dict(hostile.run_all(Path(sys.argv[1]), jobs))))


def test_a_base_of_quantised_types_alone_is_refused_with_a_remedy(tmp_path, capsys):
    raw = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedMethodError, match=r"base\.gguf: .*Q8_0: GGUF's quantised types are not read; .*F16"):
        spectra.audit(ROOT / "fixtures" / "full", tmp_path / "base.gguf")
    assert main(["inspect", str(tmp_path / "base.gguf")]) == 0
    out = capsys.readouterr().out
    assert "matrices   none that can be read" in out
    assert out.count("Q8_0") == 2  # what it holds, and why that is not read
