"""Names in memory that are not those of the files."""

from __future__ import annotations

import pytest
import torch

import spectra
from spectra.sources.live.saving import saved_names
from tests.support.in_memory import adapted, assert_same

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_names_in_memory_that_are_not_those_of_the_files(tmp_path):
    """transformers 5 renames what older checkpoints of models of pictures and text are made of."""
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.LlavaForConditionalGeneration(config)
    net.save_pretrained(tmp_path / "base")
    names = saved_names(net, net.state_dict())
    assert any(new != name for name, new in names.items())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "full")
    expected = spectra.audit(tmp_path / "full", tmp_path / "base", top_k=3)
    assert_same(spectra.audit(net, tmp_path / "base", top_k=3), expected)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert_same(spectra.audit(net, base, top_k=3), expected)
    model = adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    expected = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert_same(spectra.audit(model, top_k=3), expected)
