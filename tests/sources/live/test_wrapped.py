"""Models of peft in memory: adapters of every kind, and bases that an initialisation changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spectra
from spectra.errors import UsageError
from tests.support.in_memory import Unchanged, adapted, assert_same
from tests.support.peft_models import tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS: dict[str, Any] = {
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"]),
    "lora and tokens": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [2, 3]}
    ),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "k_proj"]),
    "head": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "replicated": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], layer_replication=[[0, 2], [1, 2]]),
    "whole": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["layers.0.mlp.up_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True, use_rslora=True),
    "olora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_a_llama(tmp_path, name, tied):
    torch.manual_seed(1)
    config = tiny_llama().config
    config.tie_word_embeddings = tied
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIGS[name]())
    model.save_pretrained(tmp_path / "adapter")
    before = Unchanged(model)
    found = spectra.audit(model, top_k=3)
    before.check()
    expected = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert_same(found, expected)


def test_a_base_that_an_initialisation_changed_is_not_in_memory():
    model = adapted(tiny_llama(), CONFIGS["pissa"]())
    with pytest.raises(UsageError, match=r"took a part out of the base weights.*name it \(base=…\)"):
        spectra.audit(model)
    with pytest.raises(UsageError, match="took a part out of the base weights"):
        spectra.audit(spectra.checkpoint_of(model), model)
    torch.manual_seed(0)
    original = tiny_llama()
    assert spectra.audit(model, original, top_k=2).layers


def test_parameters_without_a_module_of_their_own(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(net, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    model.save_pretrained(tmp_path / "adapter")
    before = Unchanged(model)
    found = spectra.audit(model, top_k=3)
    before.check()
    expected = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.status, one.intruder_indices, one.shape) == (other.status, other.intruder_indices, other.shape)
