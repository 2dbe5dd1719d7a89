"""GGUF files against gguf's own writer, its table of names, and the converter's order of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AdapterError, AmbiguousFilesError, SpectraError, UnsupportedMethodError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.gguf import KEPT_ITEMS, MODULES, TYPES, in_order, read_gguf
from spectra.pairing.fused import split_apart
from spectra.pairing.precision import quantised_as
from tests.support import hostile
from tests.support.dialects import check, draw, write
from tests.support.gguf_files import (
    ARCHITECTURES,
    LORA,
    STORED,
    a_model,
    heads_of,
    lora_fields,
    reordered,
    small_base,
    small_lora,
    write_gguf,
)
from tests.support.hostile_gguf import CASES, a_file
from tests.support.paths import ROOT

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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    results = folder / "results.json"
    command = [sys.executable, "-m", "tests.support.hostile_gguf", str(folder / "cases"), str(results)]
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
