"""Tuned weights read from disk against peft's own merge, both in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402  (after the oracles are known to be there)
from transformers.pytorch_utils import Conv1D  # noqa: E402

SEEDS = range(20)
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


def randomise(model: nn.Module, seed: int) -> None:
    """Gives every trainable parameter a value far from its initial one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))


def read_all(base_folder, adapter_folder):
    """{base tensor's name: (W1 as read, layout)} of every pair, in float64."""
    base, tuned = open_checkpoint(base_folder), open_checkpoint(adapter_folder)
    pairing = pair_layers(base, tuned, plan_updates(tuned))
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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_merge(tmp_path, name, seed):
    rng = np.random.default_rng([OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    net = Net(rng).to(dtype)
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what we ask of it
        model = peft.get_peft_model(net, peft.LoraConfig(**option(name, rng)))
        randomise(model, seed)
        model.save_pretrained(tmp_path / "adapter")
        check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def tiny_gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


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
