"""LoRA of PEFT on parameters (``target_parameters``): stacks of experts and matrices, against peft's own merge."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SEEDS = range(10)


class Experts(nn.Module):
    """A stack of experts as transformers 5 has it: (out, in), or turned."""

    def __init__(self, experts: int, hidden: int, width: int, turned: bool, down_first: bool):
        super().__init__()
        fused, down = (experts, 2 * width, hidden), (experts, hidden, width)
        if turned:
            fused, down = ((e, b, a) for e, a, b in (fused, down))
            self.is_transposed = True
        shapes = {"gate_up_proj": fused, "down_proj": down}
        for name in sorted(shapes, reverse=not down_first):  # the order in which peft wraps them
            setattr(self, name, nn.Parameter(torch.randn(*shapes[name])))


class Net(nn.Module):
    def __init__(self, rng: np.random.Generator, turned: bool, square: bool = False):
        super().__init__()
        experts, hidden, width = int(rng.integers(2, 5)), int(rng.integers(5, 12)), int(rng.integers(12, 20))
        width = hidden if square else width
        down_first = bool(rng.integers(2))
        layers = [nn.Module() for _ in range(2)]
        for layer in layers:
            layer.mlp = nn.Module()
            layer.mlp.experts = Experts(experts, hidden, width, turned, down_first)
            layer.q_proj = nn.Linear(hidden, width)
            layer.router = nn.Module()
            layer.router.matrix = nn.Parameter(torch.randn(width + 3, hidden))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)
        self.sizes = (experts, hidden, width)


def made(folder, net, config, seed):
    (folder / "base").mkdir()
    save_file({name: value.clone() for name, value in net.state_dict().items()}, folder / "base" / "model.safetensors")
    if hasattr(net, "sizes"):
        family = "gpt_oss" if hasattr(net.model.layers[0].mlp.experts, "is_transposed") else "qwen3_moe"
        values = {"model_type": family, "hidden_size": net.sizes[1]}
        (folder / "base" / "config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / "adapter")
    return model


def check(model, folder, count):
    """Every expert that peft's merge changes equals what was read; 1e-6 relative."""
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")
    pairing = pair_layers(base, tuned, plan_updates(tuned))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.double().merge_and_unload()
    after = {}
    save = {name: value.double() for name, value in merged.state_dict().items()}
    (folder / "merged").mkdir()
    save_file(save, folder / "merged" / "model.safetensors")
    if (folder / "base" / "config.json").exists():
        (folder / "merged" / "config.json").write_text((folder / "base" / "config.json").read_text())
    whole = open_checkpoint(folder / "merged")
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0)
        assert W1.low_rank() is not None
        assert W1.parts()[0].shape[1] == pair.update.rank
        assert W1.shape == pair.shape == tuple(W0.shape)
        expected = as_matrix(whole.load(pair.base.name), pair.layout)
        assert torch.linalg.norm(W1.dense() - expected) <= 1e-6 * torch.linalg.norm(expected), pair.name
        assert torch.linalg.norm(W0 - expected) > 1e-3 * torch.linalg.norm(expected), pair.name
        after[pair.base.name] = pair
    assert len(after) == len(pairing.pairs) == count
    assert not pairing.skipped
    used = {name for pair in pairing.pairs for name in pair.update.tensors}
    assert used == set(tuned.tensors)
    return pairing.pairs


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
def test_raw_states_hold_copies_of_parameters(tmp_path, turned):
    torch.manual_seed(0)
    net = Net(np.random.default_rng(1), turned)
    model = made(tmp_path, net, peft.LoraConfig(r=2, target_modules=[], target_parameters=[*BOTH, "router.matrix"]), 1)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    base = open_checkpoint(tmp_path / "base")

    def read():
        tuned = open_checkpoint(tmp_path / "adapter")
        plan = plan_updates(tuned)
        pairing = pair_layers(base, tuned, plan)
        used = {name for update in plan.updates for name in update.tensors} | {item.name for item in plan.skipped}
        assert used == set(tuned.tensors)
        found = {}
        for pair in pairing.pairs:
            W0 = pair.read_base(base, torch.float64, "cpu")
            update = pair.read_update(tuned, torch.float64, "cpu").tuned(W0)
            found[pair.base.name] = update.dense(), pair.update.kind, pair.base_copy_differs(tuned, W0)
        return found, {item.name for item in pairing.skipped if "a copy of the base" in item.reason}

    own, none = read()
    save_file(state, file)
    raw, copies = read()
    assert not none
    assert copies == {name for name in state if ".base_layer." in name and "lora_" not in name}
    assert len(copies) == 6
    for name, (W1, kind, differs) in own.items():
        assert raw[name][1:] == (kind, differs) == ("low_rank", False)
        assert torch.linalg.norm(raw[name][0] - W1) <= 1e-12 * torch.linalg.norm(W1)
    assert all(kind == "dense" for name, (_, kind, _) in raw.items() if name not in own)
    state = {name: value + ("router.base_layer" in name) for name, value in state.items()}
    save_file(state, file)
    assert {name for name, (_, _, differs) in read()[0].items() if differs} == {
        f"model.layers.{layer}.router.matrix" for layer in range(2)
    }


def config_of(name, rng, **more):
    r, layer = int(rng.integers(1, 4)), int(rng.integers(2))
    specific: dict[str, dict[str, Any]] = {
        "both": {},
        "one": {"target_parameters": [BOTH[int(rng.integers(2))]]},
        "rslora": {"use_rslora": True},
        "rank pattern": {"rank_pattern": {"gate_up_proj": 2, f"layers.{layer}.mlp.experts.down_proj": 4}},
        "alpha pattern": {"alpha_pattern": {"down_proj": 3.5, f"layers.{layer}.mlp.experts.gate_up_proj": 20}},
        "with modules": {"target_modules": ["q_proj"]},
        "matrix": {"target_parameters": [*BOTH, "router.matrix", "q_proj.weight"]},
    }
    common = {"r": r, "lora_alpha": int(rng.integers(1, 33)), "target_modules": [], "target_parameters": BOTH}
    return peft.LoraConfig(**common | specific[name] | more)


COUNTS = {"both": 4, "one": 2, "rslora": 4, "rank pattern": 4, "alpha pattern": 4, "with modules": 4, "matrix": 4}


@each_seed(SEEDS)
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
@pytest.mark.parametrize("name", COUNTS)
def test_equals_the_merge(tmp_path, name, turned, seed):
    rng = np.random.default_rng([list(COUNTS).index(name), turned, seed])
    torch.manual_seed(seed)
    net = Net(rng, turned)
    more = {"with modules": 2, "matrix": 4}.get(name, 0)
    experts = net.sizes[0]
    made_of = made(tmp_path, net, config_of(name, rng), seed)
    check(made_of, tmp_path, COUNTS[name] * experts + more)


def tiny(family: str):
    common = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False, "num_experts_per_tok": 2,
    }  # fmt: skip
    if family == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, num_local_experts=3))
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**common, num_experts=3, moe_intermediate_size=12, decoder_sparse_step=1)
        return transformers.Qwen3MoeForCausalLM(config)
    if family == "gpt_oss":
        values = common | {"intermediate_size": 16}  # down_proj is square, as in the models that there are
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**values, num_local_experts=3))
    config = transformers.Llama4TextConfig(
        **common, num_local_experts=3, intermediate_size_mlp=24, interleave_moe_layer_step=1, moe_layers=[0, 1]
    )
    return transformers.Llama4ForCausalLM(config)


FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4")


@each_seed(range(5))
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(tmp_path, family, seed):
    torch.manual_seed(seed)
    net = tiny(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    home = "feed_forward" if family == "llama4" else "mlp"
    wanted = [f"{home}.experts.gate_up_proj", f"{home}.experts.down_proj"]
    config = peft.LoraConfig(
        r=int(rng.integers(1, 4)), lora_alpha=int(rng.integers(1, 20)), target_modules=["q_proj"],
        target_parameters=wanted, use_rslora=bool(seed % 2),
        rank_pattern={"experts.down_proj": 4} if seed == 2 else {},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "adapter")
        model.double().merge_and_unload().save_pretrained(tmp_path / "merged")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    merged = open_checkpoint(tmp_path / "merged")
    pairing = pair_layers(base, tuned, plan_updates(tuned))
    assert len(pairing.pairs) == 2 * 3 * 2 + 2
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        weights = {**merged.alternatives, **merged.weights}
        expected = as_matrix(merged.load(weights[pair.base.name]), pair.layout).double()
        assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected), pair.name
        assert torch.linalg.norm(W0 - expected) > 1e-3 * torch.linalg.norm(expected), pair.name
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base")
    assert not report.failed
    assert len(report.layers) == 14


def adapted(tmp_path, seed=0, *, turned=False, square=False, **options):
    """base and adapter folders of a small network."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    values = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": BOTH}
    net = Net(rng, turned, square)
    return net, made(tmp_path, net, peft.LoraConfig(**values | options), seed)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten(folder, change):
    """The adapter's tensors changed by a function of their names and values, which gives None for what is to go."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: change(name, value) for name, value in load_file(path).items()}
    save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, path)


def audit(tmp_path):
    return spectra.audit(tmp_path / "adapter", tmp_path / "base")


@each_seed(range(5))
def test_a_square_parameter_follows_the_others(tmp_path, seed):
    net, model = adapted(tmp_path, seed, square=True)
    assert {pair.update.turned for pair in check(model, tmp_path, 4 * net.sizes[0])} == {False}


def test_a_square_parameter_alone_is_refused(tmp_path):
    adapted(tmp_path, square=True, target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterError, match="is square, so that it cannot be told whether its update is turned"):
        audit(tmp_path)


@each_seed(range(5))
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
def test_dimensions_taken_the_other_way_round_show_in_the_shapes(tmp_path, turned, seed):
    """As a peft does that swaps them for other models: the product is transposed, and so is the update."""
    _, model = adapted(tmp_path, seed, turned=turned)
    base = open_checkpoint(tmp_path / "base")

    def read():
        tuned = open_checkpoint(tmp_path / "adapter")
        found = {}
        for pair in pair_layers(base, tuned, plan_updates(tuned)).pairs:
            W0 = pair.read_base(base, torch.float64, "cpu")
            found[pair.name] = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).delta()
        return found

    before, factors = read(), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    experts = model.base_model.model.model.layers[0].mlp.experts.num_experts

    def exchanged(name, value):
        if "lora_A" in name:  # (out, r·E) with experts fastest becomes (E·r, out) with experts slowest
            B = factors[name.replace("lora_A", "lora_B")]
            return B.reshape(B.shape[0], -1, experts).permute(2, 1, 0).flatten(0, 1)
        A = factors[name.replace("lora_B", "lora_A")]
        return A.reshape(experts, -1, A.shape[1]).permute(2, 1, 0).flatten(1)

    rewritten(tmp_path / "adapter", exchanged)
    after = read()
    assert before.keys() == after.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta)


def test_parameters_of_one_shape_are_not_told_apart(tmp_path):
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.gate_proj = nn.Parameter(torch.randn(3, 9, 6))
            self.experts.up_proj = nn.Parameter(torch.randn(3, 9, 6))

    net = nn.ModuleDict({"mlp": Apart()})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_proj", "experts.up_proj"])
    made(tmp_path, net, config, 0)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 6}')
    with pytest.raises(AdapterError, match=r"several are of one shape: gate_proj, up_proj; or up_proj, gate_proj"):
        audit(tmp_path)


def test_the_wrong_base_is_named(tmp_path):
    net, _ = adapted(tmp_path)

    def changed(case, name, value):
        if value.ndim < 3 or case == "nothing":
            return value if value.ndim < 3 else None
        if case == "fewer experts":
            return value[1:]
        return value[:, :, 1:] if "gate_up" in name else value[:, 1:]

    for case in ("fewer experts", "another width", "nothing"):
        tensors = {
            name: changed(case, name, value)
            for name, value in load_file(tmp_path / "base" / "model.safetensors").items()
        }
        (tmp_path / case).mkdir()
        save_file(
            {name: value.contiguous() for name, value in tensors.items() if value is not None},
            tmp_path / case / "model.safetensors",
        )
        values = {"model_type": "qwen3_moe", "hidden_size": net.sizes[1] - (case == "another width")}
        (tmp_path / case / "config.json").write_text(json.dumps(values))
        with pytest.raises(WrongBaseError, match="is this the wrong base") as caught:
            spectra.audit(tmp_path / "adapter", tmp_path / case)
        assert "experts" in str(caught.value)


def test_a_base_whose_experts_are_not_read_is_skipped_with_the_reason(tmp_path):
    adapted(tmp_path, target_modules=["q_proj"])
    (tmp_path / "base" / "config.json").write_text("{}")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if "gate_up" not in name}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    report = audit(tmp_path)
    assert len(report.layers) == 2
    assert any("cannot be told whether they are stored" in item["reason"] for item in report.skipped)


def test_contradictions_are_refused(tmp_path):
    def cases():
        yield r"its partner .*lora_B is missing", lambda name, value: None if "lora_B" in name else value
        yield r"has \d+ columns", lambda name, value: value[:, :-2] if "lora_B" in name else value
        yield r"no multiple of the rank", lambda name, value: value[:-1] if "lora_A" in name else value[:, :-1]
        yield r"expected a matrix of floats", lambda name, value: value.flatten()
        yield r"expected a matrix of floats", lambda name, value: value.to(torch.int32)

    for index, (message, change) in enumerate(cases()):
        folder = tmp_path / str(index)
        folder.mkdir()
        adapted(folder)
        rewritten(folder / "adapter", change)
        with pytest.raises(AdapterError, match=message):
            audit(folder)


def test_options_that_peft_has_not_for_parameters_are_refused(tmp_path):
    adapted(tmp_path)
    edit_config(tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(UnsupportedMethodError, match="target_parameters with init_lora_weights = 'pissa'"):
        audit(tmp_path)
    edit_config(tmp_path / "adapter", init_lora_weights=True, target_parameters="experts.down_proj")
    with pytest.raises(AdapterError, match="no list of names"):
        audit(tmp_path)


def test_bare_names_match_any_module(tmp_path):
    net, model = adapted(tmp_path)
    edit_config(tmp_path / "adapter", target_parameters=["gate_up_proj", "down_proj"])
    check(model, tmp_path, 4 * net.sizes[0])


def test_inspect_says_what_it_would_read_with_and_without_the_base(tmp_path):
    from spectra.tasks.inspect import inspect

    net, _ = adapted(tmp_path)
    found = inspect(tmp_path / "adapter", tmp_path / "base")
    assert found.problem is None
    assert len(found.updates) == 4 * net.sizes[0]
    assert all(update["base_tensor"] == f"{update['module']}.weight" for update in found.updates)
    alone = inspect(tmp_path / "adapter")
    assert {update["kind"] for update in alone.updates} == {"low_rank"}


def test_other_commands_read_experts(tmp_path):
    net, _ = adapted(tmp_path)
    ranks = spectra.ranks(tmp_path / "adapter", tmp_path / "base")
    assert len(ranks.layers) == 4 * net.sizes[0]
    assert {layer.trained_rank for layer in ranks.layers} == {2}
    (report,) = spectra.compare([tmp_path / "adapter"], tmp_path / "base", quick=True).reports
    assert len(report.layers) == 4 * net.sizes[0]
    assert sum(layer.update["parameters"] for layer in report.layers) == sum(
        value.numel() for value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    )
    with pytest.raises(UsageError):  # neither as an adapter nor merged into stacks
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.5)
    with pytest.raises(UsageError):
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.5, merged=True)
    assert not (tmp_path / "out").exists()
