"""What options of LoRA come to in what peft stores: converted, conditional, resized, stored twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.cli import main
from spectra.errors import UsageError
from spectra.files.orientation import as_matrix
from tests.support.peft_methods import all_accounted_for
from tests.support.peft_models import Net, check_against_merge, llama, randomise, read_all

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's remarks on what is asked of it


def test_velora_changes_only_how_it_is_trained(tmp_path):
    torch.manual_seed(0)
    net = Net(np.random.default_rng(0))
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    velora = peft.VeloraConfig(num_groups=1, init_type="random")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["query"], velora_config=velora))
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def test_an_adapter_for_some_tokens_says_so_everywhere(tmp_path, capsys):
    torch.manual_seed(0)
    net = llama(2)
    net.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 5], task_type="CAUSAL_LM")
    model = peft.get_peft_model(net, config)
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    paths = [str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main(["inspect", *paths]) == 0
    assert "on some tokens only" in capsys.readouterr().out
    main(["audit", *paths, "--top-k", "3"])
    assert "conditional: active only after its invocation tokens" in capsys.readouterr().out
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert report.tuned["conditional"] is True
    assert all("active only after" in layer.notes[0] for layer in report.layers)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_converted_adapters_are_plain_lora(tmp_path, how):
    torch.manual_seed(0)
    net = Net(np.random.default_rng(0))
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["query", "square"], init_lora_weights=how))
    model.peft_config["default"].init_lora_weights = True  # as peft asks for
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = how
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
    assert (report.tuned["format"], report.tuned["rank"]) == ("peft-lora", 4)
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def test_a_bias_that_is_stored_twice_with_other_values(make_base, make_adapter):
    base = make_base({"q.weight": np.ones((4, 3), np.float32), "norm.bias": np.ones(4, np.float32)})
    both = {
        f"base_model.model.norm.{name}bias": np.full(4, i, np.float32)
        for i, name in enumerate(["", "modules_to_save."])
    }
    folder = make_adapter({"q": (np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))}, extra=both)
    with pytest.raises(UsageError, match=r"norm\.bias.*other values"):
        spectra.repair(folder, base, to=folder.parent / "new", scale=1.0, merged=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_that_was_trained_as_modules_to_save(tmp_path, tied):
    """peft writes each of them three times; a model that it loads them into has what is read."""
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=tied)
    )
    net.save_pretrained(tmp_path / "base")

    def resized() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(43, mean_resizing=False)
        return model

    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(resized(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.modules_to_save.weight" in stored
    assert "base_model.model.model.embed_tokens.weight" in stored
    loaded = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").double().merge_and_unload().state_dict()
    found, skipped = read_all(tmp_path / "base", tmp_path / "adapter")
    assert {f"{name}.weight" for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj")} <= found.keys()
    for name, (W1, layout) in found.items():
        expected = as_matrix(loaded[name], layout)
        assert torch.linalg.norm(W1 - expected[: W1.shape[0], : W1.shape[1]]) <= 1e-6 * torch.linalg.norm(W1), name
    again = [item.name for item in skipped if "twice" in item.reason]
    assert again == [
        f"base_model.model.{name}.modules_to_save.weight"
        for name in (["lm_head"] * (not tied) + ["model.embed_tokens"])
    ]
    all_accounted_for(tmp_path / "adapter")
