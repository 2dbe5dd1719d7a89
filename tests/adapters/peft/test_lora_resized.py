"""DoRA of an embedding whose vocabulary was resized, against peft's own merge."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers

NAME = "model.embed_tokens.weight"


def by_peft(folder, rows, seed):
    """A base of 40 tokens, and a DoRA of its embedding with ``rows``; the weight as peft merges it, float64."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from tests.support.peft_models import randomise, tiny_llama

    torch.manual_seed(seed)
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(before + rows)
    options = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens"], use_dora=True)
    adapted = peft.get_peft_model(model, options)
    randomise(adapted, seed)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=True)
    whole = adapted.double().merge_and_unload().state_dict()[NAME]
    return whole[: min(before, before + rows)].T


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [-3, 1, 40])
def test_dora_of_a_resized_embedding_equals_the_merge(tmp_path, rows):
    expected = by_peft(tmp_path, rows, 1)
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    (pair,) = pair_layers(base, tuned, plan_updates(tuned)).pairs
    W0 = pair.read_base(base, torch.float64, "cpu")
    W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
    assert (W1 - expected).norm() <= 1e-6 * expected.norm()
    (layer,) = spectra.audit(tmp_path / "adapter", tmp_path / "base", dtype="float64").layers
    assert layer.status == "analysed"
    assert layer.flags == ()
    size = float((expected - W0).norm())
    assert layer.measures["update_norm_fro"] == pytest.approx(size, rel=1e-6)
    (row,) = spectra.ranks(tmp_path / "adapter", tmp_path / "base").layers
    assert row.update_norm_fro == pytest.approx(size, rel=1e-5)
    (compared,) = spectra.compare([tmp_path / "adapter"], tmp_path / "base", quick=True).reports[0].layers
    assert compared.measures["update_norm_fro"] == pytest.approx(size, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy", ["none", "of other rows"])
def test_without_the_other_rows_dora_of_a_resized_embedding_is_skipped(tmp_path, copy):
    by_peft(tmp_path, 5, 1)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{NAME.removesuffix('.weight')}.base_layer.weight"
    value = tensors.pop(name)
    save_file(tensors if copy == "none" else {**tensors, name: value[:-1].clone()}, file)
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    found = pair_layers(base, tuned, plan_updates(tuned))
    assert not found.pairs
    assert any("over all" in item.reason and "holds no copy" in item.reason for item in found.skipped)
