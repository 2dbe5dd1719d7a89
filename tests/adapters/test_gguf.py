"""LoRAs in GGUF against gguf's own writer and the converter's order of rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AdapterError, AmbiguousFilesError, SpectraError, UnsupportedMethodError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.gguf.headers import in_order
from spectra.pairing.fused import split_apart
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
from tests.support.seeds import each_seed


@each_seed(range(40))
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


@each_seed(range(20))
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


def test_an_architecture_that_was_not_checked_goes_with_its_own_kind_alone(tmp_path):
    """GGUF's names and its order of rows are those of a model of that architecture, and of no other."""
    rng = np.random.default_rng(0)
    lora = small_lora(tmp_path, "gptneox")
    factors = {info.name.rpartition(".")[2]: info.name for info in open_checkpoint(lora).tensors.values()}
    assert factors.keys() == {"lora_a", "lora_b"}
    weights = {"blk.0.attn_q.weight": draw(rng, 8, 8), "token_embd.weight": draw(rng, 20, 8)}
    base = write_gguf(tmp_path / "base" / "model.gguf", "gptneox", weights)
    opened = open_checkpoint(lora)
    A, B = (opened.read(factors[name]).double() for name in ("lora_a", "lora_b"))
    check(base, lora, {"blk.0.attn_q.weight": weights["blk.0.attn_q.weight"].double() + 2 * B @ A})
    other = write_gguf(tmp_path / "other" / "model.gguf", "baichuan", weights)
    for wrong in (other, small_base(tmp_path / "plain", num_attention_heads=2)):
        with pytest.raises(WrongBaseError, match=r"the GGUF architecture '(gptneox|baichuan)' are called elsewhere"):
            spectra.audit(lora, wrong)
    with pytest.raises(WrongBaseError, match="'gptneox' are called elsewhere"):
        spectra.audit(small_lora(tmp_path / "llama"), base)


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
        ([("array", "llama.attention.head_count", [4, 2])], "number of heads"),
        ([], "number of heads"),
    ]):  # fmt: skip
        path = write_gguf(tmp_path / f"{index}.gguf", "llama", values, fields)
        with pytest.raises(UnsupportedMethodError, match=words):
            plan_updates(open_checkpoint(path))
    with pytest.raises(AmbiguousFilesError, match=r"0\.gguf, 1\.gguf"):
        open_checkpoint(tmp_path)


UNKNOWN = (
    "blk.0.attn_q.weight.lora_c", "blk.0.attn_q.gate", "blk.0.unheard.weight", "unheard", "blk.0.attn_q.weight.scale",
)  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("shape", [(8, 8), (5,)])
def test_one_unknown_tensor_is_never_left_out_quietly(tmp_path, capsys, name, shape):
    base = small_base(tmp_path / "base", num_attention_heads=2)
    assert main(["audit", str(small_lora(tmp_path / "plain")), "--base", str(base), "--quiet"]) == 0, "the control"
    capsys.readouterr()
    tuned = small_lora(tmp_path / "tuned", **{name: shape})
    assert main(["audit", str(tuned), "--base", str(base), "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert name in said.err


def test_a_norm_that_lies_beside_is_listed(tmp_path):
    tuned = small_lora(tmp_path / "tuned", **{"blk.0.attn_norm.weight": (8,)})
    report = spectra.audit(tuned, small_base(tmp_path / "base", num_attention_heads=2))
    assert report.coverage.without_spectrum == 1
