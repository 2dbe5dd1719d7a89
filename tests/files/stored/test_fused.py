"""Projections that share a matrix: its rows as the models themselves split what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived, Unreadable
from tests.support.fused_models import FAMILIES, FUSED, model_of, phi_like

SEEDS = range(20)


def seen(monkeypatch, family, model, token):
    """(input of the fused module, q, k, v) as the model has them for one token, where rotary embeddings do nothing."""
    kept: dict[str, Any] = {}
    name, fused = next((n, m) for n, m in model.named_modules() if n.split(".")[-1] in FUSED)
    attention = model.get_submodule(name.rpartition(".")[0])
    code = __import__(type(model).__module__, fromlist=["x"])
    fused.register_forward_hook(lambda _, inputs, output: kept.update(x=inputs[0].flatten(), y=output))
    if hasattr(code, "eager_attention_forward"):
        eager = code.eager_attention_forward

        def capture(module, query, key, value, *args, **options):
            kept.setdefault("qkv", [item.detach().flatten() for item in (query, key, value)])
            return eager(module, query, key, value, *args, **options)

        monkeypatch.setattr(code, "eager_attention_forward", capture)
    model(input_ids=torch.tensor([[token]]))
    y = kept["y"].reshape(1, 1, -1)
    if family == "bloom":
        kept["qkv"] = [item.flatten() for item in attention._reshape(y)]
    elif family.startswith("falcon"):
        q, k, v = attention._split_heads(y)
        if family == "falcon-40b":  # there every query has its own copy
            times = attention.num_heads // attention.num_kv_heads
            k, v = (item[:, :, ::times] for item in (k, v))
        kept["qkv"] = [item.flatten() for item in (q, k, v)]
    elif family == "codegen":
        inner: dict[str, Any] = {}
        attend = attention._attn
        attention._attn = lambda q, k, v, mask: (inner.update(qkv=(q, k, v)), attend(q, k, v, mask))[1]
        model(input_ids=torch.tensor([[token]]))
        kept["qkv"] = [item.detach().flatten() for item in inner["qkv"]]
    elif family == "mpt":
        kept["qkv"] = [item.flatten() for item in y.chunk(3, dim=2)]
    return name, kept["x"].detach(), [item.detach() for item in kept["qkv"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_the_models_own(transformers, monkeypatch, tmp_path, family):
    """q, k and v of one token by the model's own code, and by the weights that were split."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        model = model_of(transformers, family, rng)
        folder = tmp_path / str(seed)
        model.save_pretrained(folder)
        with monkeypatch.context() as patch:
            name, x, qkv = seen(patch, family, model, int(rng.integers(3, 12)))
        checkpoint = replace(open_checkpoint(folder), split_fused=True)
        home = name.rpartition(".")[0]
        home = next(item for item in (home, home.partition(".")[2]) if f"{item}.q_proj.weight" in checkpoint.weights)
        for part, expected in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            info = checkpoint.weights[f"{home}.{part}.weight"]
            mine = checkpoint.load(info) @ x
            assert mine.shape == expected.shape
            tolerance = 1e-6 if family == "modernbert" else 1e-12  # its rotary embedding turns them in float32
            assert (mine - expected).norm() <= tolerance * expected.norm()
            assert torch.equal(checkpoint.load(info, rows=1), checkpoint.load(info)[:1])
        assert not [weight for weight in checkpoint.weights if weight.split(".")[-2] in FUSED and "bias" not in weight]


@pytest.mark.parametrize("family", ["phi3", "glm4"])
def test_gate_and_up_are_the_models_own(transformers, tmp_path, family):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        if family == "phi3":
            model = model_of(transformers, family, rng)
        else:
            config = transformers.Glm4Config(
                hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_hidden_layers=1,
                intermediate_size=int(rng.integers(2, 30)), vocab_size=12, pad_token_id=0,
            )  # fmt: skip
            model = transformers.Glm4ForCausalLM(config).double()
        model.save_pretrained(tmp_path / str(seed))
        mlp = model.model.layers[0].mlp
        checkpoint = replace(open_checkpoint(tmp_path / str(seed)), split_fused=True)
        x = torch.from_numpy(rng.normal(size=model.config.hidden_size))
        gate, up, down = (checkpoint.load(f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        mine, theirs = down @ (torch.nn.functional.silu(gate @ x) * (up @ x)), mlp(x)
        assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


def test_quantised_projections_are_split(rng, make_base):
    """fp8 in blocks of 128 rows, of which a projection begins amid one."""
    base = phi_like(rng, "plain", make_base, q=96, kv=48, hidden=256, head_dim=24)
    tensors = {name: open_checkpoint(base).read(name) for name in open_checkpoint(base).tensors}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.from_numpy(rng.uniform(1, 2, size=(2, 2)).astype(np.float32))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    quantised = open_checkpoint(make_base(tensors, folder="fp8", config=config))
    whole, split = quantised.load(name), replace(quantised, split_fused=True)
    for part, rows in (("q", slice(0, 96)), ("k", slice(96, 144)), ("v", slice(144, 192))):
        info = split.weights[f"model.layers.0.self_attn.{part}_proj.weight"]
        assert torch.equal(split.load(info), whole[rows])
        assert isinstance(info, Derived)
        assert "fp8" in info.how


@pytest.mark.parametrize(("family", "turns"), [("mixtral", False), ("gpt_oss", True), ("mine", None)])
def test_gate_and_up_of_experts_are_split_in_their_familys_order(rng, make_base, family, turns):
    stacks = {"mlp.experts.gate_up_proj": (2, 8, 6), "mlp.experts.down_proj": (2, 6, 4)}
    tensors = {name: rng.normal(size=shape) for name, shape in stacks.items()}
    base = replace(open_checkpoint(make_base(tensors, config={"model_type": family})), split_fused=True)
    fused = tensors["mlp.experts.gate_up_proj"]
    if turns is None:
        assert isinstance(base.weights["mlp.experts.1.gate_up_proj.weight"], Unreadable)
        assert set(base.weights) == {
            f"mlp.experts.{i}.{part}.weight" for i in (0, 1) for part in ("gate_up_proj", "down_proj")
        }
        return
    gate, up = (fused[1, ::2], fused[1, 1::2]) if turns else (fused[1, :4], fused[1, 4:])
    assert np.array_equal(base.load("mlp.experts.1.gate_proj.weight"), gate)
    assert np.array_equal(base.load("mlp.experts.1.up_proj.weight"), up)
