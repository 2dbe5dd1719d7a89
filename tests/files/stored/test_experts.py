"""Mixtures of experts in every form in which they are stored, against transformers' own models and conversions."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.adapters import plan_updates
from spectra.errors import CorruptFileError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived, Unreadable
from spectra.pairing.pairs import pair_layers
from spectra.runs.cache import SpectrumCache
from spectra.runs.jobs import jobs_of
from spectra.runs.reports import Analysis
from spectra.runs.run import MergedRun, open_run
from spectra.runs.settings import checked_settings

SEEDS = range(20)
NEW = "new module: the base has no such weight"


def model_of(transformers, family, rng):
    """A model of a family with random sizes and values, float64."""
    hidden, inter, count = 8 * int(rng.integers(2, 5)), int(rng.integers(2, 24)), int(rng.integers(1, 6))
    common: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 16,
    }  # fmt: skip
    choose = min(2, count)
    if family == "mixtral":
        kind, options = "Mixtral", {**common, "num_local_experts": count, "num_experts_per_tok": choose}
    elif family == "phimoe":
        kind, options = "Phimoe", {**common, "num_local_experts": count, "num_experts_per_tok": choose}
    elif family == "granitemoe":
        kind, options = "GraniteMoe", {**common, "num_local_experts": count, "num_experts_per_tok": choose}
    elif family == "qwen3_moe":
        kind = "Qwen3Moe"
        options = {**common, "moe_intermediate_size": inter, "num_experts": count, "num_experts_per_tok": choose}
    elif family == "deepseek_v3":
        kind = "DeepseekV3"
        options = {
            **common, "num_key_value_heads": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": inter, "n_routed_experts": count, "num_experts_per_tok": choose,
            "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4,
        }  # fmt: skip
    elif family == "gpt_oss":
        kind, options = "GptOss", {**common, "head_dim": 8, "num_local_experts": count, "num_experts_per_tok": choose}
    elif family == "llama4_text":
        kind = "Llama4"
        options = {**common, "head_dim": 8, "num_local_experts": count, "intermediate_size_mlp": inter}
    elif family == "aria_text":
        kind = "AriaText"
        options = {**common, "moe_num_experts": count, "moe_topk": choose, "moe_num_shared_experts": 1}
    elif family == "dbrx":
        kind = "Dbrx"
        options = {
            "d_model": hidden, "n_heads": 2, "n_layers": 1, "vocab_size": 16,
            "ffn_config": {"ffn_hidden_size": inter, "moe_num_experts": count, "moe_top_k": choose},
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4},
        }  # fmt: skip
    else:
        assert family == "nemotron_h"
        kind = "NemotronH"
        options = {
            "hidden_size": hidden, "vocab_size": 16, "layers_block_type": ["moe", "attention"], "num_hidden_layers": 2,
            "n_routed_experts": count, "moe_intermediate_size": inter + (inter == hidden), "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "n_group": 1, "topk_group": 1, "mamba_num_heads": 4,
            "mamba_head_dim": 8,
        }  # fmt: skip
    config_class = {"Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, config_class)(**options)
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.zero_()
    return model


FAMILIES = (
    "mixtral", "phimoe", "granitemoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "aria_text", "dbrx",
    "nemotron_h",
)  # fmt: skip


def save_memory(model, folder, change=0.0, rng=None):
    """The model as it lies in memory, each value changed a little: what a trainer's own saving leaves."""
    folder.mkdir()
    tensors = {}
    for name, value in model.state_dict().items():
        noise = change * torch.from_numpy(rng.normal(size=value.shape)) if change else 0
        tensors[name] = (value + noise).contiguous().clone() if value.is_floating_point() else value.clone()
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


def experts_of(model):
    return next((name, module) for name, module in model.named_modules() if name.endswith(".experts"))


def forward(family, experts, x, expert):
    """What one expert alone makes of x (t, d), by the model's own code."""
    if family == "llama4_text":
        inputs = torch.zeros(experts.num_experts, *x.shape, dtype=x.dtype)
        inputs[expert] = x
        return experts(inputs.flatten(0, 1)).reshape(inputs.shape)[expert]
    chosen = torch.full((x.shape[0], 1), expert)
    return experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype)).reshape(x.shape)


def by_weights(family, x, load):
    """The same from the weights (out, in) that were read."""
    silu = torch.nn.functional.silu
    if family == "nemotron_h":
        return torch.relu(x @ load("up_proj").T).square() @ load("down_proj").T
    if family == "dbrx":
        return (silu(x @ load("w1").T) * (x @ load("v1").T)) @ load("w2").T
    gate, up = x @ load("gate_proj").T, x @ load("up_proj").T
    if family == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ load("down_proj").T
    return (silu(gate) * up) @ load("down_proj").T


def weight(checkpoint, name):
    return checkpoint.load(checkpoint.weights.get(name) or checkpoint.alternatives[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_of_the_model(transformers, tmp_path, family):
    """Read from what save_pretrained writes and from memory's form: the model's own forward pass comes out."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        model = model_of(transformers, family, rng)
        hub, memory = tmp_path / f"hub{seed}", save_memory(model, tmp_path / f"memory{seed}")
        model.save_pretrained(hub)
        place, experts = experts_of(model)
        x = torch.from_numpy(rng.normal(size=(3, model.config.hidden_size)))
        for folder in (hub, memory):
            checkpoint = open_checkpoint(folder)
            prefix = place if folder is memory or family != "nemotron_h" else place.replace("model.", "backbone.", 1)
            count = experts.num_experts
            for expert in {0, count - 1}:
                mine = by_weights(family, x, lambda part: weight(checkpoint, f"{prefix}.{expert}.{part}.weight"))  # noqa: B023
                theirs = forward(family, experts, x, expert)
                assert (mine - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hub_is_base", [True, False])
def test_either_form_can_be_the_base_of_the_other(transformers, tmp_path, family, hub_is_base):
    for seed in SEEDS[:4]:
        rng = np.random.default_rng(seed)
        model = model_of(transformers, family, rng)
        hub, memory = tmp_path / f"hub{seed}", tmp_path / f"memory{seed}"
        model.save_pretrained(hub)
        save_memory(model, memory, 1e-3, rng)
        base, tuned = (open_checkpoint(path) for path in ((hub, memory) if hub_is_base else (memory, hub)))
        pairing = pair_layers(base, tuned, plan_updates(tuned))
        matrices = {name for name, info in tuned.weights.items() if len(info.shape) == 2}
        analysed = {f"{pair.name}.weight" for pair in pairing.pairs}
        assert matrices == analysed
        reasons = {item.reason for item in pairing.skipped}
        assert not {reason for reason in reasons if "only in the base" in reason or reason == NEW}
        sources = {name for pair in pairing.pairs for name in pair.update.tensors}
        assert sources | {item.name for item in pairing.skipped} >= set(tuned.tensors)
        for pair in pairing.pairs:
            W0 = pair.read_base(base, torch.float64, "cpu")
            W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
            assert 0 < (W1 - W0).norm() < 5e-3 * W0.norm()


@pytest.mark.parametrize("form", ["files", "stacked"])
def test_lora_on_the_experts_own_projections(tmp_path, make_base, make_adapter, rng, form):
    """Ordinary LoRA on ``experts.3.gate_proj``, against files an expert and against a stack."""
    E, i, h = 4, 5, 6
    gate, up, down = rng.normal(size=(E, i, h)), rng.normal(size=(E, i, h)), rng.normal(size=(E, h, i))
    home = "model.layers.0.mlp.experts"
    if form == "stacked":
        tensors = {f"{home}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{home}.down_proj": down}
    else:
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        tensors = {f"{home}.{e}.{part}.weight": stack[e] for part, stack in parts.items() for e in range(E)}
    base = make_base(tensors, config={"model_type": "qwen3_moe", "hidden_size": h})
    factors = {
        f"{home}.{e}.{part}": (rng.normal(size=(stack.shape[1], 2)), rng.normal(size=(2, stack.shape[2])))
        for part, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        for e in (1, 3)
    }
    adapter = make_adapter(factors)
    opened, tuned = open_checkpoint(base), open_checkpoint(adapter)
    pairing = pair_layers(opened, tuned, plan_updates(tuned))
    assert {pair.name for pair in pairing.pairs} == set(factors)
    stacks = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    for pair in pairing.pairs:
        expert, part = pair.name.split(".")[-2:]
        W0 = pair.read_base(opened, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        B, A = factors[pair.name]
        assert np.array_equal(W0, stacks[part][int(expert)])
        assert np.allclose(W1, stacks[part][int(expert)] + B @ A, rtol=1e-12)
    report = spectra.audit(adapter, base=base)
    assert len(report.layers) == 6
    assert not report.failed


class Expert(torch.nn.Module):
    def __init__(self, hidden, inter):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(hidden, inter, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(inter, hidden, bias=False)


class Mixture(torch.nn.Module):
    """Experts that are modules of their own, as transformers 4 and remote code have them."""

    def __init__(self, count, hidden, inter):
        super().__init__()
        self.experts = torch.nn.ModuleList([Expert(hidden, inter) for _ in range(count)])


def test_pefts_own_merge_of_experts(tmp_path, make_base):
    """PEFT's LoRA and DoRA on modules of experts, against files an expert, a stack and a stack (in, out)."""
    peft = pytest.importorskip("peft")
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        count, hidden, inter = (int(size) for size in rng.integers(2, 9, size=3))
        model = Mixture(count, hidden, inter).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
        stacks = {
            part: torch.stack([getattr(expert, part).weight.detach().clone() for expert in model.experts])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        fused = torch.cat([stacks["gate_proj"], stacks["up_proj"]], dim=1)
        files = {f"experts.{e}.{part}.weight": stack[e] for part, stack in stacks.items() for e in range(count)}
        turned = {
            "experts.gate_up_proj": fused.transpose(1, 2),
            "experts.down_proj": stacks["down_proj"].transpose(1, 2),
        }
        bases = [
            make_base(files, folder=f"files{seed}"),
            make_base(
                {"experts.gate_up_proj": fused, "experts.down_proj": stacks["down_proj"]},
                folder=f"stacked{seed}", config={"model_type": "qwen3_moe"},
            ),
            make_base(turned, folder=f"turned{seed}", config={"model_type": "llama4_text"}),
        ]  # fmt: skip
        options = {"r": int(rng.integers(1, 4)), "lora_alpha": int(rng.integers(1, 9)), "use_dora": bool(seed % 2)}
        targets = list(rng.choice(["gate_proj", "up_proj", "down_proj"], size=2, replace=False))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.from_numpy(rng.uniform(0.5, 2, size=parameter.shape)))
        wrapped.save_pretrained(tmp_path / f"adapter{seed}")
        merged = wrapped.merge_and_unload().state_dict()
        tuned = open_checkpoint(tmp_path / f"adapter{seed}")
        for folder in bases:
            base = open_checkpoint(folder)
            pairs = pair_layers(base, tuned, plan_updates(tuned)).pairs
            assert len(pairs) == 2 * count
            for pair in pairs:
                W0 = pair.read_base(base, torch.float64, "cpu")
                W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
                wanted = merged[f"{pair.name}.weight"]
                assert (W1 - wanted).norm() <= 1e-6 * wanted.norm()


def test_names_are_no_patterns(make_base, rng):
    """Braces, which a name may hold, mean nothing."""
    home = "{0.__class__}{}.{index}.experts"
    tensors = {f"{home}.gate_up_proj": rng.normal(size=(2, 8, 5)), f"{home}.down_proj": rng.normal(size=(2, 5, 4))}
    tensors |= {"{}.ffn.experts.mlp.w1": rng.normal(size=(6, 5))}
    base = open_checkpoint(make_base(tensors, config={"ffn_config": {"moe_num_experts": 2}}))
    assert f"{home}.1.down_proj.weight" in base.weights
    assert base.load("{}.ffn.experts.1.w1.weight").shape == (3, 5)


def test_a_lone_expert_is_read_by_itself(monkeypatch, make_base, rng):
    """Never the whole stack for one of it."""
    base = open_checkpoint(
        make_base({"experts.gate_up_proj": rng.normal(size=(7, 8, 5)), "experts.down_proj": rng.normal(size=(7, 5, 4))})
    )
    asked = []
    read = type(base).read

    def spy(self, name, **options):
        asked.append((name, options.get("rows")))
        return read(self, name, **options)

    monkeypatch.setattr(type(base), "read", spy)
    assert base.load("experts.3.gate_up_proj.weight").shape == (8, 5)
    assert base.load("experts.6.down_proj.weight", rows=2).shape == (2, 4)
    assert asked == [("experts.gate_up_proj", slice(3, 4)), ("experts.down_proj", slice(6, 7))]


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"experts.w1": (3, 4, 5), "experts.w2": (3, 5, 4)}, {}, "cannot be told"),
        (
            {"experts.w1": (3, 4, 4), "experts.w2": (3, 4, 4)},
            {"model_type": "mine", "hidden_size": 4},
            "cannot be told",
        ),
        ({"experts.up_proj": (3, 4, 5)}, {"hidden_size": 7}, "cannot be told"),
        ({"experts.mixer": (3, 4, 5)}, {"hidden_size": 5}, "a name that is not known"),
        ({"experts.gate_up_proj": (20000, 2, 1), "experts.down_proj": (20000, 1, 1)}, {}, "more than any model has"),
        (
            {"experts.w1": (3, 4, 4), "experts.w2": (3, 4, 4)},
            {"model_type": ["gpt_oss"], "hidden_size": {}},
            "cannot be",
        ),
        ({"experts.w1": (3, 4, 5), "experts.w2": (3, 5, 4)}, {"text_config": 3, "hidden_size": "4"}, "cannot be told"),
        ({"a.ffn.experts.mlp.w1": (12, 5)}, {"model_type": "dbrx"}, "ffn_config.moe_num_experts in config.json is not"),
        ({"a.ffn.experts.mlp.w1": (12, 5)}, {"ffn_config": {"moe_num_experts": 5}}, "= 5 does not fit"),
        ({"a.ffn.experts.mlp.w1": (12, 5)}, {"ffn_config": {"moe_num_experts": "5"}}, "= 5 does not fit"),
        ({"experts.gate_up_proj_bias": (3, 4)}, {}, "biases of experts"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(make_base, rng, tensors, config, says):
    arrays = {name: rng.normal(size=shape) for name, shape in tensors.items()} | {"q.weight": rng.normal(size=(4, 4))}
    base = open_checkpoint(make_base(arrays, config=config))
    for name in tensors:
        info = base.weights[name]
        assert isinstance(info, Unreadable)
        assert says in info.reason
    pairing = pair_layers(base, base, plan_updates(base))
    assert [pair.name for pair in pairing.pairs] == ["q"]
    assert {item.name for item in pairing.skipped} == set(tensors)


def test_a_stack_of_no_experts_was_saved_incompletely(make_base, rng):
    arrays = {"experts.gate_up_proj": np.zeros((0, 8, 5)), "experts.down_proj": np.zeros((0, 5, 4))}
    base = open_checkpoint(make_base({**arrays, "q.weight": rng.normal(size=(4, 4))}))
    assert all(isinstance(base.weights[name], Unreadable) for name in arrays)
    with pytest.raises(CorruptFileError, match=r"gate_up_proj|down_proj.*saved incompletely"):
        plan_updates(base)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("hidden", [8, 4])
def test_the_direction_of_a_stack_shows_by_the_other_one(make_base, rng, turned, hidden):
    """Gate and up together are twice as wide as what down takes, so that even square ones can be told."""
    gate_up, down = rng.normal(size=(3, 8, hidden)), rng.normal(size=(3, hidden, 4))
    turn = (0, 2, 1) if turned else (0, 1, 2)
    tensors = {"experts.gate_up_proj": gate_up.transpose(turn), "experts.down_proj": down.transpose(turn)}
    base = open_checkpoint(make_base(tensors))
    assert np.array_equal(base.load("experts.1.gate_up_proj.weight"), gate_up[1])
    assert np.array_equal(base.load("experts.2.down_proj.weight"), down[2])
    info = base.weights["experts.2.down_proj.weight"]
    assert isinstance(info, Derived)
    assert ("turned" in info.how) is turned


@pytest.mark.parametrize("turned", [False, True])
def test_the_direction_of_three_stacks_shows_by_hidden_size(make_base, rng, turned):
    """Gate and up apart: which dimension is the model's own, config.json says."""
    E, i, h = 3, 5, 7
    stacks = {"w1": (E, i, h), "w3": (E, i, h), "w2": (E, h, i)}
    arrays = {part: rng.normal(size=shape) for part, shape in stacks.items()}
    turn = (0, 2, 1) if turned else (0, 1, 2)
    tensors = {f"experts.{part}": array.transpose(turn) for part, array in arrays.items()}
    base = open_checkpoint(make_base(tensors, config={"model_type": "mixtral", "hidden_size": h}))
    for part, array in arrays.items():
        assert np.array_equal(base.load(f"experts.2.{part}.weight"), array[2])
    fused = base.load(base.alternatives["experts.2.gate_up_proj.weight"])
    assert np.array_equal(fused, np.concatenate([arrays["w1"][2], arrays["w3"][2]]))
    assert np.array_equal(base.load(base.alternatives["experts.0.down_proj.weight"]), arrays["w2"][0])


def test_without_a_family_halves_are_not_named(make_base, make_adapter, rng):
    """Whether gate and up lie one below the other or take turns is the family's own."""
    tensors = {
        "mlp.experts.gate_up_proj": rng.normal(size=(3, 8, 5)),
        "mlp.experts.down_proj": rng.normal(size=(3, 5, 4)),
    }
    adapter = open_checkpoint(
        make_adapter({"mlp.experts.1.gate_proj": (rng.normal(size=(4, 1)), rng.normal(size=(1, 5)))})
    )
    base = open_checkpoint(make_base(tensors))
    pairing = pair_layers(base, adapter, plan_updates(adapter))
    assert not pairing.pairs
    assert [item.name for item in pairing.skipped] == ["mlp.experts.1.gate_proj"]
    assert "no config gives model_type" in pairing.skipped[0].reason


@pytest.mark.parametrize("fused_is_base", [True, False])
@pytest.mark.parametrize(
    ("fused", "apart", "turns"),
    [
        ("gpt_oss", None, True),  # the model that has them in one matrix tells their order
        ("mixtral", None, False),
        ("gpt_oss", "mixtral", True),
        (None, "gpt_oss", True),
        ("somecustom", None, None),
        ("somecustom", "mixtral", None),
        (None, None, None),
    ],
)
def test_the_order_of_gate_and_up_is_that_of_the_model_that_has_both(
    make_base, rng, fused_is_base, fused, apart, turns
):
    gate, up, down = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(6, 4))
    both = np.stack([gate, up], 1).reshape(8, 6) if turns else np.concatenate([gate, up])
    one = make_base(
        {"m.mlp.experts.gate_up_proj": both[None], "m.mlp.experts.down_proj": down[None]},
        "one", config={"model_type": fused} if fused else None,
    )  # fmt: skip
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    two = make_base(
        {f"m.mlp.experts.0.{part}.weight": value for part, value in parts.items()},
        "two", config={"model_type": apart} if apart else None,
    )  # fmt: skip
    base, tuned = (one, two) if fused_is_base else (two, one)
    base, tuned = open_checkpoint(base), open_checkpoint(tuned)
    if turns is None and fused_is_base:  # two of three matrices
        with pytest.raises(WrongBaseError, match="below the other or take turns"):
            pair_layers(base, tuned, plan_updates(tuned))
        return
    pairing = pair_layers(base, tuned, plan_updates(tuned))
    if turns is None:
        (skipped,) = pairing.skipped
        assert "below the other or take turns" in skipped.reason
        assert "'somecustom'" in skipped.reason or not fused
        assert [pair.name for pair in pairing.pairs] == ["m.mlp.experts.0.down_proj"]
        return
    assert not pairing.skipped
    for pair in pairing.pairs:
        assert np.array_equal(base.load(pair.base), tuned.load(pair.update.module + ".weight"))


def test_a_partly_tuned_mixture_is_unchanged_and_changed(make_base, rng, tmp_path):
    """Frozen experts and layers say so, in a fine-tune whose form is not the base's."""
    E, i, h = 3, 4, 6
    stacks = {
        f"model.layers.{layer}.mlp.experts.{part}": rng.normal(size=shape).astype(np.float32)
        for layer in range(2)
        for part, shape in (("gate_up_proj", (E, 2 * i, h)), ("down_proj", (E, h, i)))
    }
    config = {"model_type": "qwen3_moe", "hidden_size": h}
    base = make_base(stacks, config=config)
    files = {}
    for name, stack in stacks.items():
        home, part = name.rsplit(".", 1)
        for e in range(E):
            if part == "down_proj":
                files[f"{home}.{e}.down_proj.weight"] = stack[e]
            else:
                files[f"{home}.{e}.gate_proj.weight"], files[f"{home}.{e}.up_proj.weight"] = stack[e][:i], stack[e][i:]
    changed = "model.layers.1.mlp.experts.2.up_proj"
    files[f"{changed}.weight"] = files[f"{changed}.weight"] + np.float32(0.1)
    report = spectra.audit(make_base(files, folder="tuned", config=config), base=base)
    statuses = {layer.name: layer.status for layer in report.layers}
    assert len(statuses) == 2 * 3 * E
    assert {name for name, status in statuses.items() if status != "unchanged"} == {changed}
    assert not [item for item in report.skipped if "only in the base" in item["reason"]]


def test_quantised_stacks_are_cut(make_base, rng):
    """gpt-oss's own form: mxfp4, from which each expert is read by itself."""
    E, i, h = 3, 16, 32
    tensors: dict[str, torch.Tensor] = {}
    for part, (rows, columns) in {"gate_up_proj": (2 * i, h), "down_proj": (h, 2 * i)}.items():
        stored = torch.from_numpy(rng.integers(0, 256, size=(E, rows, columns // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(rng.integers(120, 130, size=(E, rows, columns // 32), dtype=np.uint8))
        tensors |= {f"mlp.experts.{part}_blocks": stored, f"mlp.experts.{part}_scales": scales}
    config = {"model_type": "gpt_oss", "hidden_size": h, "quantization_config": {"quant_method": "mxfp4"}}
    base = open_checkpoint(make_base(tensors, config=config))
    for part, shape in (("gate_up_proj", (2 * i, h)), ("down_proj", (h, 2 * i))):
        whole = base.load(base.derived[f"mlp.experts.{part}"])
        for e in range(E):
            info = base.weights[f"mlp.experts.{e}.{part}.weight"]
            assert isinstance(info, Derived)
            assert (info.shape, info.quantised) == (shape, "mxfp4")
            assert torch.equal(base.load(info), whole[e].T)
            assert torch.equal(base.load(info, rows=3), whole[e].T[:3])
    gate, up = (base.load(base.alternatives[f"mlp.experts.1.{part}_proj.weight"]) for part in ("gate", "up"))
    both = base.load("mlp.experts.1.gate_up_proj.weight")
    assert torch.equal(gate, both[::2])
    assert torch.equal(up, both[1::2])


def test_a_repair_of_experts_is_written_where_it_can_be(tmp_path, make_base, make_adapter, rng):
    """An adapter of experts as an adapter; neither into a stack, nor a stack that was tuned."""
    E, i, h = 2, 40, 14
    stacks = {
        "mlp.experts.gate_up_proj": rng.normal(size=(E, 2 * i, h)).astype(np.float32),
        "mlp.experts.down_proj": rng.normal(size=(E, h, i)).astype(np.float32),
    }
    base = make_base(stacks, config={"model_type": "qwen3_moe", "hidden_size": h})
    factors = {"mlp.experts.1.up_proj": (30 * rng.normal(size=(i, 1)), rng.normal(size=(1, h)))}
    adapter = make_adapter(factors)
    repaired = spectra.repair(adapter, base, to=tmp_path / "repaired", scale=0.5)
    assert [layer.name for layer in spectra.audit(tmp_path / "repaired", base=base).layers] == list(factors)
    assert repaired.summary["vectors_scaled"] >= 1
    with pytest.raises(spectra.SpectraError, match=r"mlp\.experts\.1\.up_proj"):
        spectra.repair(adapter, base, to=tmp_path / "merged", scale=0.5, merged=True)
    changed = {
        name: stack + 10 * rng.normal(size=(E, stack.shape[1], 1)) @ rng.normal(size=(E, 1, stack.shape[2]))
        for name, stack in stacks.items()
    }
    tuned = make_base(changed, folder="tuned", config={"model_type": "qwen3_moe", "hidden_size": h})
    with pytest.raises(spectra.SpectraError, match="expert 0 of"):
        spectra.repair(tuned, base, to=tmp_path / "again", scale=0.5)
    with pytest.raises(spectra.SpectraError, match=r"expert 0 of.*no adapter is written"):
        spectra.extract(tuned, base, to=tmp_path / "extracted")
    assert not [path for path in ("merged", "again", "extracted") if (tmp_path / path).exists()]


def test_sharded_stacks_and_a_lone_head(tmp_path, rng):
    """Stacks in other shards than what goes with them, a tied head and a resized vocabulary."""
    E, i, h = 3, 4, 6
    base = tmp_path / "base"
    base.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": rng.normal(size=(10, h)),
            "model.layers.0.mlp.experts.gate_up_proj": rng.normal(size=(E, 2 * i, h)),
        },
        "model-00002-of-00002.safetensors": {"model.layers.0.mlp.experts.down_proj": rng.normal(size=(E, h, i))},
    }
    for file, tensors in shards.items():
        save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, base / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": h}))
    everything = {name: value for tensors in shards.values() for name, value in tensors.items()}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    made = {name: torch.from_numpy(value + 0.01 * rng.normal(size=value.shape)) for name, value in everything.items()}
    made["model.embed_tokens.weight"] = torch.cat([made["model.embed_tokens.weight"], torch.ones(2, h).double()])
    made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    save_file(made, tuned / "model.safetensors")
    (tuned / "config.json").write_text((base / "config.json").read_text())
    base, tuned = open_checkpoint(base), open_checkpoint(tuned)
    pairing = pair_layers(base, tuned, plan_updates(tuned))
    found = {pair.name: pair for pair in pairing.pairs}
    assert len(found) == 2 * E + 2
    assert found["lm_head"].tied
    assert found["lm_head"].rows == found["model.embed_tokens"].rows == 10
    assert not pairing.skipped
    for pair in found.values():
        W0 = pair.read_base(base, torch.float64, "cpu")
        assert W0.shape == pair.shape
        stacked = re.fullmatch(r"(.+experts)\.(\d)\.(\w+)", pair.name)
        if stacked:
            assert np.array_equal(W0, everything[f"{stacked[1]}.{stacked[3]}"][int(stacked[2])])


def two_forms(make_base, rng, family="mixtral"):
    """A base with stacks, and two changed copies: as stacks, and a file an expert under Mixtral's own names."""
    config = {"model_type": family, "hidden_size": 12}
    stacks = {"gate_up_proj": (2, 16, 12), "down_proj": (2, 12, 8)}
    values = {part: rng.normal(size=shape).astype(np.float32) for part, shape in stacks.items()}
    at = "model.layers.0"
    base = make_base({f"{at}.mlp.experts.{part}": value for part, value in values.items()}, config=config)
    changed = {part: value + 0.1 for part, value in values.items()}
    stacked = make_base(
        {f"{at}.mlp.experts.{part}": value for part, value in changed.items()}, "stacked", config=config
    )
    files = {}
    for index in range(2):
        gate, up = np.split(changed["gate_up_proj"][index], 2)
        for letter, value in {"w1": gate, "w3": up, "w2": changed["down_proj"][index]}.items():
            files[f"{at}.block_sparse_moe.experts.{index}.{letter}.weight"] = value
    return base, stacked, make_base(files, "files", config=config)


def test_fine_tunes_in_different_forms_are_merged_or_refused(make_base, rng):
    """One expert's matrix under two names is one weight; one that is whole here and in halves there is not merged."""
    base, stacked, files = two_forms(make_base, rng)
    options = checked_settings(include=["w2", "down_proj"])
    merged = MergedRun([(1.0, open_run(stacked, base, options)), (1.0, open_run(files, base, options))])
    assert len(merged.pairs) == 2
    for pair in merged.pairs:
        W0 = pair.read_base(merged.base, torch.float64, "cpu")
        assert np.allclose((merged.weight(pair, W0)[0].dense() - W0).numpy(), 0.2)
    options = checked_settings()
    with pytest.raises(UsageError, match="in different forms, so they cannot be merged") as error:
        MergedRun([(1.0, open_run(stacked, base, options)), (1.0, open_run(files, base, options))])
    assert "experts.0.gate_up_proj" in str(error.value)
    assert "experts.0.w1" in str(error.value)


@pytest.mark.parametrize("other", ["gate_proj", "gate_up_proj"])
def test_two_forms_of_one_expert_in_one_fine_tune(make_base, rng, other):
    """Both would be compared with the same rows of the base."""
    base, _, files = two_forms(make_base, rng)
    tuned = open_checkpoint(files)
    tensors = {name: tuned.read(name) for name in tuned.tensors}
    shape = (8, 12) if other == "gate_proj" else (16, 12)
    tensors[f"model.layers.0.block_sparse_moe.experts.1.{other}.weight"] = torch.ones(shape)
    tuned = open_checkpoint(make_base(tensors, "both", config={"model_type": "mixtral"}))
    with pytest.raises(
        WrongBaseError, match=r"both match the base weight '.*experts\.1\.gate_up_proj\.weight'"
    ) as error:
        pair_layers(open_checkpoint(base), tuned, plan_updates(tuned))
    assert f"experts.1.{other}.weight" in str(error.value)


def test_a_kept_spectrum_serves_every_name_of_its_weight(make_base, rng, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "cache"))
    base, _, files = two_forms(make_base, rng)
    assert len(spectra.cache(base).written) == 4
    settings = checked_settings(include=["w2"])
    jobs = jobs_of([open_run(files, base, settings)])
    assert [job.first.base.name.rpartition("experts.")[2] for job in jobs] == ["0.w2.weight", "1.w2.weight"]
    for job in jobs:
        assert Analysis(settings, SpectrumCache())._stored(job, job.read_base()) is not None


def test_one_expert_fetches_no_more_than_itself(make_base, rng, monkeypatch):
    """A stack is not fetched whole for each of its experts, nor what of a quantised one is read where nobody knows."""
    base, stacked, files = two_forms(make_base, rng)
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, begin, length, advice: asked.append(length), raising=False)
    for tuned, sizes in ((stacked, {16 * 12 * 4, 12 * 8 * 4}), (files, {8 * 12 * 4, 12 * 8 * 4})):
        run = open_run(tuned, base, checked_settings())
        asked.clear()
        for pair in run.pairs:
            run.prefetch(pair)
        assert set(asked) == sizes
        assert len(asked) == len(run.pairs)
        asked.clear()
        run.base.prefetch([pair.base for pair in run.pairs])
        assert set(asked) == {16 * 12 * 4, 12 * 8 * 4}
    blocks = torch.randint(0, 256, (3, 64, 1, 16), dtype=torch.uint8)
    tensors = {"m.experts.up_proj_blocks": blocks, "m.experts.up_proj_scales": torch.full((3, 64, 1), 120).byte()}
    quantised = open_checkpoint(make_base(tensors, "mx", config={"model_type": "gpt_oss", "hidden_size": 32}))
    asked.clear()
    quantised.prefetch(list(quantised.weights.values()))
    assert not asked


def test_what_is_not_finite_is_the_expert_that_it_is(make_base, rng):
    stack = torch.from_numpy(rng.normal(size=(3, 64, 32)).astype(np.float32))
    changed = stack.clone() + 0.1
    changed[2, 0, 0] = float("nan")
    config = {"model_type": "nemotron_h", "hidden_size": 32}
    base = make_base({"m.experts.up_proj": stack}, config=config)
    report = spectra.audit(make_base({"m.experts.up_proj": changed}, "tuned", config=config), base=base)
    status = {layer.name: (layer.status, layer.error) for layer in report.layers}
    assert [status[f"m.experts.{i}.up_proj"][0] for i in range(3)] == ["analysed", "analysed", "non_finite"]
    assert "m.experts.2.up_proj.weight: holds NaN or infinity" in str(status["m.experts.2.up_proj"][1])


def test_scales_that_are_not_finite_say_so(make_base, rng):
    blocks = torch.randint(0, 256, (3, 64, 1, 16), dtype=torch.uint8)
    scales = torch.full((3, 64, 1), 120, dtype=torch.uint8)
    config = {"model_type": "gpt_oss", "hidden_size": 32}
    stored = {"m.experts.up_proj_blocks": blocks, "m.experts.up_proj_scales": scales}
    base = make_base(stored, config=config)
    broken = scales.clone()
    broken[1, 0, 0] = 255
    tuned = make_base(stored | {"m.experts.up_proj_scales": broken}, "tuned", config=config)
    (layer,) = (layer for layer in spectra.audit(tuned, base=base).layers if layer.status == "non_finite")
    assert layer.name == "m.experts.1.up_proj"
    assert "m.experts.1.up_proj.weight: its stored scales give NaN or infinity" in (layer.error or "")
