"""Ranks of fine-tunes from paths: what peft makes of what is suggested."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.analysis import measures, truncation
from spectra.errors import UsageError
from spectra.records.ranks import RankReport
from spectra.tasks import ranks as ranking
from tests.support.commands import run
from tests.support.paths import FIXTURES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def changes():
    """W1 − W0 of every layer of the full fine-tune, in float64."""
    base, tuned = (load_file(FIXTURES / name / "model.safetensors") for name in ("base", "full"))
    return {name: tuned[name].double() - base[name].double() for name in base}


def test_ranks_of_a_full_fine_tune(changes):
    report = spectra.ranks(FIXTURES / "full", FIXTURES / "base")
    assert report.suggestion is not None
    choices = {choice.name: choice for choice in report.suggestion.choices}
    assert len(choices) == 28
    for layer in report.layers:
        s = np.linalg.svd(changes[f"{layer.name}.weight"].numpy(), compute_uv=False)
        energy = np.cumsum(s**2) / (s**2).sum()
        assert (layer.rank_90, layer.rank_99) == tuple(int((energy < share).sum()) + 1 for share in (0.9, 0.99))
        if layer.name in choices:
            rank = choices[layer.name].rank
            assert rank == min(layer.rank_90, layer.break_even_rank)
            assert choices[layer.name].relative_error == pytest.approx(np.sqrt(1 - energy[rank - 1]), abs=1e-6)
    assert RankReport.from_dict(json.loads(report.to_json())).to_json() == report.to_json()


def test_ranks_of_adapters():
    for member, rank in (("lora-r4", 4), ("lora-r64", 64), ("dora-r16", 16)):
        report = spectra.ranks(FIXTURES / member, energy=0.99)
        assert report.suggestion is not None
        audited = {layer.name: layer.measures for layer in spectra.audit(FIXTURES / member).layers}
        for layer in report.layers:
            assert layer.trained_rank == rank
            assert layer.rank_99 == audited[layer.name]["rank_99"]
            assert layer.effective_rank == pytest.approx(audited[layer.name]["effective_rank"], rel=1e-6)
            assert member == "dora-r16" or layer.rank_99 <= rank
        assert report.tuned["rank"] == rank


def test_each_layer_is_decomposed_once(tmp_path, monkeypatch):
    """By layer, the ranks follow from the decomposition that gives the factors."""
    calls = []

    def counted(name, original):
        def counting(*args):
            calls.append(name)
            return original(*args)

        return counting

    for module, name in ((truncation, "decompose"), (measures, "singular_values")):
        monkeypatch.setattr(module, name, counted(name, vars(module)[name]))
    spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out")
    assert Counter(calls) == {"decompose": 28, "singular_values": 1}  # the embedding gets no factors


def test_inputs_are_never_touched(tmp_path, make_base, rng):
    with pytest.raises(UsageError, match="adapter already"):
        spectra.extract(FIXTURES / "lora-r4", to=tmp_path / "out")
    W = rng.normal(size=(12, 10)).astype("f4")
    base, tuned = make_base({"a.weight": W}), make_base({"a.weight": W + 1}, folder="tuned")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in (base, tuned):
        with pytest.raises(UsageError, match=r"exists and is no PEFT adapter folder.*name another folder"):
            spectra.extract(tuned, base, to=target)
        with pytest.raises(UsageError, match=r"no PEFT adapter|what is being read"):
            spectra.extract(tuned, base, to=target, force=True)
    with pytest.raises(UsageError, match="nothing to extract"):
        spectra.extract(base, base, to=tmp_path / "out")
    bad = make_base({"a.weight": np.full((12, 10), np.nan, "f4")}, folder="bad")
    with pytest.raises(UsageError, match=r"bad.*a.weight.*NaN"):
        spectra.extract(bad, base, to=tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_tensors_are_matched_under_other_prefixes(tmp_path, make_base, rng):
    """A norm that did not change is not carried, whatever its module is called in the base."""
    W, norm = rng.normal(size=(12, 10)).astype("f4"), rng.normal(size=10).astype("f4")
    base = make_base(
        {"bert.layer.0.q.weight": W, "bert.layer.0.norm.weight": norm, "bert.layer.1.norm.weight": norm.copy()}
    )
    tuned = make_base(
        {"layer.0.q.weight": W + 1, "layer.0.norm.weight": norm, "layer.1.norm.weight": norm + 1}, folder="tuned"
    )
    made = spectra.extract(tuned, base, to=tmp_path / "out")
    assert made.whole == ("layer.1.norm",)


def test_a_layer_that_fails_is_named(capsys, make_base, make_adapter, rng):
    base = make_base({name: rng.normal(size=(20, 20)).astype("f4") for name in ("a.weight", "b.weight")})
    B, A = rng.normal(size=(20, 1)).astype("f4"), rng.normal(size=(1, 20)).astype("f4")
    adapter = make_adapter({"a": (B, A), "b": (np.full_like(B, np.inf), A.copy())})
    code, out, err = run(capsys, "ranks", adapter, "--base", base)
    assert code == 2
    assert "Suggestion: LoRA with r = 1" in out
    assert "b: non_finite" in err
    assert ranking.ranks(adapter, base).failed[0]["status"] == "non_finite"


def test_the_schema_of_configs_is_pefts(tmp_path):
    """Every key of the written config is one that peft itself knows."""
    spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", by="type")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config) <= set(peft.LoraConfig(task_type="SEQ_CLS").to_dict())
    assert config["task_type"] == "SEQ_CLS"


def test_what_was_left_out_by_name_stays_out(tmp_path):
    made = spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", include=["q_proj"])
    assert len(made.relative_errors) == 4
    assert "model.layers.0.mlp.up_proj.weight" in made.left_out
    assert not any("mlp" in module for module in made.whole)
    with pytest.raises(UsageError, match="lies in what is being read"):
        spectra.extract(FIXTURES / "full", FIXTURES / "base", to=FIXTURES / "full" / "inside")


def test_a_task_is_named_only_with_its_head(tmp_path):
    """peft asks for the head's tensors where a task is named; a head that did not change is not carried."""
    small = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 50,
        "max_position_embeddings": 16, "num_labels": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "full")
    spectra.extract(tmp_path / "full", tmp_path / "base", to=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert peft.PeftModel.from_pretrained(base, tmp_path / "out") is not None


def test_a_resized_vocabulary_is_said(tmp_path, make_base, rng):
    W, words = rng.normal(size=(12, 10)).astype("f4"), rng.normal(size=(60, 10)).astype("f4")
    base = make_base({"q.weight": W, "model.embed_tokens.weight": words})
    more = np.concatenate([words + 1, words[:4]])
    tuned = make_base({"q.weight": W + 1, "model.embed_tokens.weight": more}, folder="tuned")
    made = spectra.extract(tuned, base, to=tmp_path / "out")
    assert "resize_token_embeddings(64)" in made.remarks[0]
    assert "resize_token_embeddings(64)" in (tmp_path / "out" / "README.md").read_text()


def test_a_config_from_an_adapter_names_modules_of_the_model():
    found = spectra.ranks(FIXTURES / "lora-r16", by="type").suggestion
    assert found is not None
    assert found.exclude_modules == ()
    assert set(found.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def saved(folder, net, config, seed=0):
    """The base and a random adapter of it, as peft saves them; peft's model."""
    net.save_pretrained(folder / "base")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / "adapter")
    return model


def llama(layers=3):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2
        )
    )


def test_experts_of_a_stack_are_no_modules(tmp_path):
    torch.manual_seed(0)
    net = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1,
        )
    )  # fmt: skip
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    saved(tmp_path, net, config)
    report = spectra.ranks(tmp_path / "adapter", tmp_path / "base")
    assert report.suggestion is not None
    assert report.suggestion.target_modules == ("q_proj",)
    assert {choice.name.rpartition(".")[2] for choice in report.suggestion.choices} == {"q_proj"}
    assert len(report.layers) == 2 + 2 * 3 * 2
    assert len(report.suggestion.left_out) == 2 * 3 * 2
    assert all("no module that a config could name" in item["reason"] for item in report.suggestion.left_out)
    assert RankReport.from_dict(json.loads(report.to_json())) == report


def test_parts_of_a_fused_projection_are_no_modules(tmp_path, capsys):
    torch.manual_seed(0)
    net = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
        )
    )
    saved(tmp_path, net, peft.LoraConfig(r=2, target_modules=["query_key_value"]))
    paths = [tmp_path / "adapter", "--base", tmp_path / "base"]
    code, out, _ = run(capsys, "ranks", *paths, "--split-fused")
    assert code == 0
    assert "Suggestion: none — what changed is a part of a weight that the base holds whole" in out
    assert "target_modules" not in out
    code, out, _ = run(capsys, "ranks", *paths)
    assert "query_key_value" in out


def test_a_suggestion_for_replicated_layers_builds_the_same_model(tmp_path):
    ranges = [[0, 2], [1, 3]]
    made = {"r": 2, "target_modules": ["q_proj"], "layer_replication": ranges, "rank_pattern": {"layers.3.*": 5}}
    saved(tmp_path, llama(), peft.LoraConfig(**made))
    with torch.no_grad():  # so that not all layers of the model get a LoRA
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        save_file(
            {name: value * (0 if "layers.1." in name else 1) for name, value in stored.items()},
            tmp_path / "adapter" / "adapter_model.safetensors",
        )
    report = spectra.ranks(tmp_path / "adapter", tmp_path / "base", energy=0.999)
    assert report.suggestion is not None
    config = report.suggestion.peft_config()
    assert config["layer_replication"] == ranges
    assert RankReport.from_dict(json.loads(report.to_json())) == report
    model = peft.get_peft_model(llama(), peft.LoraConfig(**config))
    adapted = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == {choice.name: choice.rank for choice in report.suggestion.choices}
    assert sorted(name.split(".")[2] for name in adapted) == ["0", "2", "3"]


def test_a_conditional_adapter_is_said_to_be_one(tmp_path, capsys):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    saved(tmp_path, llama(2), config)
    code, out, _ = run(capsys, "ranks", tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0
    assert "conditional: active only after its invocation tokens" in out


@pytest.mark.parametrize("on_out", [False, True])
def test_dora_of_any_change_is_counted(tmp_path, on_out):
    written = pytest.importorskip("lycoris").modules
    net = torch.nn.ModuleDict({name: torch.nn.Linear(24, 16) for name in "abc"})
    save_file({name: value.clone() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    state: dict[str, torch.Tensor] = {}
    for name, make in (("a", written.LohaModule), ("b", written.LokrModule), ("c", written.LoConModule)):
        options = {"lora_dim": 2, "weight_decompose": name != "c", "wd_on_out": on_out}
        module = make(f"lycoris_{name}", net[name], multiplier=1.0, **options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        state |= {f"lycoris_{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    report = spectra.ranks(tmp_path / "x.safetensors", tmp_path / "base.safetensors")
    assert report.suggestion is not None
    assert report.suggestion.rescaled == 2
    assert [layer.rescaled for layer in report.layers] == [True, True, False]


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("T5ForConditionalGeneration", None),  # several kinds of model are called so
        (None, None),
    ],
)
def test_the_task_where_the_class_tells(make_base, rng, architecture, task_type):
    weight = rng.normal(size=(32, 16)).astype("float32")
    base = make_base({"a.weight": weight})
    config = {} if architecture is None else {"architectures": [architecture]}
    tuned = make_base({"a.weight": weight + 0.1 * rng.normal(size=(32, 1)).astype("float32")}, "tuned", config)
    suggestion = spectra.ranks(tuned, base).suggestion
    assert suggestion is not None
    config = suggestion.peft_config()
    assert config.get("task_type") == task_type
    assert peft.LoraConfig(**config).task_type == task_type
