"""Small models of every kind of module that LoRA can wrap, peft's options for them, and what peft's merge makes of
them held against what is read, in float64.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block(nn.Module):
    def __init__(self, rng: np.random.Generator):
        super().__init__()
        a, b, c = (int(x) for x in rng.integers(4, 14, size=3))
        self.query = nn.Linear(a, b)
        self.square = nn.Linear(a, a, bias=False)
        self.c_attn = Conv1D(c + 14, a)  # never square, so that its orientation shows
        self.words = nn.Embedding(int(rng.integers(20, 40)), a)
        self.conv1 = nn.Conv2d(a, b, 1)
        self.conv3 = nn.Conv2d(b, c, (3, 2))
        self.attn = nn.MultiheadAttention(4, 2)
        self.classifier = nn.Linear(a, 3)


class Net(nn.Module):
    """Two blocks of every kind of module that LoRA can wrap."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        self.layers = nn.ModuleList([Block(rng), Block(rng)])
        self.head = nn.Linear(5, 4)


def option(name: str, rng: np.random.Generator) -> dict:
    """A random peft configuration that exercises one option."""
    r = int(rng.integers(1, 9))
    common = {"r": r, "lora_alpha": int(rng.integers(1, 33)), "target_modules": ["query", "square"]}
    some = float(rng.uniform(0.5, 40))
    layer = int(rng.integers(2))
    specific: dict[str, dict] = {
        "alpha over r": {},
        "rslora": {"use_rslora": True},
        "rank pattern": {"rank_pattern": {f"layers.{layer}.query": int(rng.integers(1, 9)), r".*\d\.square": 2}},
        "alpha pattern": {"alpha_pattern": {"query": some, f"^layers.{layer}.square": some / 3}},
        "both patterns, rslora": {
            "rank_pattern": {"square": 3, "layers.0.query": 5},
            "alpha_pattern": {f"{layer}.query": some},
            "use_rslora": True,
        },
        "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "conv1d and linear": {"target_modules": ["c_attn", "query"]},
        "embedding": {"target_modules": ["words", "query"]},
        "conv2d": {"target_modules": ["conv1", "conv3"]},
        "attention": {"target_modules": ["attn"]},
        "attention, patterns": {
            "target_modules": ["attn"],
            "rank_pattern": {"attn": 2},
            "alpha_pattern": {f"layers.{layer}.attn": some, "out_proj": 64},
        },
        "lora bias": {"lora_bias": True, "target_modules": ["query"]},
        "bias lora_only": {"bias": "lora_only"},
        "modules to save": {"modules_to_save": ["classifier"]},
        "dora": {"use_dora": True},
        "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"square": 2}},
        "dora conv1d": {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "dora embedding": {"use_dora": True, "target_modules": ["words"]},
        "dora conv2d": {"use_dora": True, "target_modules": ["conv1", "conv3"]},
    }
    return common | specific[name]


OPTIONS = (
    "alpha over r", "rslora", "rank pattern", "alpha pattern", "both patterns, rslora", "conv1d",
    "conv1d and linear", "embedding", "conv2d", "attention", "attention, patterns", "lora bias", "bias lora_only",
    "modules to save", "dora", "dora, rslora, patterns", "dora conv1d", "dora embedding", "dora conv2d",
)  # fmt: skip


def write_lora(folder: Path, name: str, seed: int) -> Any:
    """A base and an adapter of it with one of ``OPTIONS``, random in every parameter; the model that peft has."""
    rng = np.random.default_rng([OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    net = Net(rng).to(DTYPES[seed % len(DTYPES)])
    (folder / "base").mkdir()
    save_file(net.state_dict(), folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what is asked of it
        model = peft.get_peft_model(net, peft.LoraConfig(**option(name, rng)))
        randomise(model, seed)
        model.save_pretrained(folder / "adapter")
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Gives every trainable parameter a value far from its initial one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))


def read_all(base_folder, adapter_folder, plan=None):
    """{base tensor's name: (W1 as read, layout)} of every pair, in float64."""
    base, tuned = open_checkpoint(base_folder), open_checkpoint(adapter_folder)
    pairing = pair_layers(base, tuned, plan or plan_updates(tuned))
    found = {}
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0)
        assert W1.shape == pair.shape == tuple(W0.shape)
        found[pair.base.name] = W1.dense(), pair.layout
    return found, pairing.skipped


def check_against_merge(model, base_folder, adapter_folder):
    """Every weight that peft's merge changes, and no other, equals what was read; 1e-6 relative."""
    before = {name: value.double() for name, value in open_state(base_folder).items()}
    found, skipped = read_all(base_folder, adapter_folder)
    model = model.double()
    merged = model.merge_and_unload().state_dict()
    changed = 0
    for name, value in merged.items():
        if value.ndim < 2 or name not in before:
            continue
        if name in found:
            W1, layout = found[name]
            expected = as_matrix(value, layout)
            assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected), name
            changed += 1
        else:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=f"{name} changed unseen")
    assert changed == len(found) > 0
    return skipped


def open_state(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def tiny_gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def llama(layers: int) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2
        )
    )


def classifier(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.LlamaForSequenceClassification.from_pretrained(folder, num_labels=5, dtype=torch.float32)
