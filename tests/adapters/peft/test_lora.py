"""Tuned weights read from disk against peft's own merge, both in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from tests.support.peft_models import (
    OPTIONS,
    check_against_merge,
    randomise,
    read_all,
    tiny_gpt2,
    tiny_llama,
    write_lora,
)
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SEEDS = range(20)


@each_seed(SEEDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_merge(tmp_path, name, seed):
    model = write_lora(tmp_path, name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gpt2_with_its_square_transposed_weights(tmp_path, use_dora, with_config):
    torch.manual_seed(0)
    net = tiny_gpt2()
    net.save_pretrained(tmp_path / "base")
    if not with_config:  # then the biases of the non-square siblings tell
        (tmp_path / "base" / "config.json").unlink()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc", "wte"], use_dora=use_dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        randomise(model, 1)
        model.save_pretrained(tmp_path / "adapter")
        found, _ = read_all(tmp_path / "base", tmp_path / "adapter")
        merged = model.double().merge_and_unload().state_dict()
    prefixed = {
        f"transformer.{name}" if f"transformer.{name}" in merged else name: item for name, item in found.items()
    }
    assert len(prefixed) == 2 * 4 + 1
    for name, (W1, layout) in prefixed.items():
        expected = as_matrix(merged[name], layout)
        assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected), name


def test_the_copy_of_an_embedding_is_no_change_but_shows_a_wrong_base(tmp_path):
    torch.manual_seed(0)
    net = tiny_llama()
    net.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
        randomise(model, 1)
        model.save_pretrained(tmp_path / "adapter")
    found, skipped = read_all(tmp_path / "base", tmp_path / "adapter")
    assert list(found) == ["model.embed_tokens.weight"]
    assert any("copy of the base weight" in item.reason for item in skipped)
    assert not any("base_copy_differs" in layer.flags for layer in audited(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "base")  # other random weights of the same shape
    assert all("base_copy_differs" in layer.flags for layer in audited(tmp_path))


def audited(folder):
    return spectra.audit(folder / "adapter", folder / "base").layers


def test_tied_head_falls_back_to_the_embedding_and_says_so(tmp_path):
    torch.manual_seed(0)
    net = tiny_llama()
    net.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "base").tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
        randomise(model, 1)
        model.save_pretrained(tmp_path / "adapter")
        delta = model.double().base_model.model.lm_head.get_delta_weight("default")
        expected = model.base_model.model.lm_head.weight.detach() + delta
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    pair = next(p for p in pair_layers(base, tuned, plan_updates(tuned)).pairs if p.role == "head")
    assert "tied" in pair.notes[0]
    W0 = pair.read_base(base, torch.float64, "cpu")
    W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
    assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_raw_state_dict_keys_with_the_adapters_name(tmp_path, rng, make_base, make_adapter):
    W0 = rng.normal(size=(6, 5)).astype(np.float32)
    B, A = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    base = make_base({"layer.q.weight": W0})
    plain = make_adapter({"layer.q": (B, A)})
    raw = make_adapter(
        {},
        folder="raw",
        extra={
            "base_model.model.layer.q.lora_A.default.weight": A,
            "base_model.model.layer.q.lora_B.default.weight": B,
        },
        r=2,
    )
    one, _ = read_all(base, plain)
    two, _ = read_all(base, raw)
    assert torch.equal(one["layer.q.weight"][0], two["layer.q.weight"][0])
