"""What else PEFT writes: raw state dicts, trainable tokens, replicated layers, projections that were not stored."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft.lora import KNOWN_FIELDS, OWN_FIELDS
from spectra.cli import main
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.repairs.insertion import carried_beside
from spectra.runs.run import open_run
from spectra.runs.settings import checked_settings
from tests.support.peft_folders import same_updates, save_raw, state
from tests.support.peft_methods import METHODS, all_accounted_for, write
from tests.support.peft_models import (  # fmt: skip
    DTYPES,
    OPTIONS,
    Net,
    check_against_merge,
    llama,
    option,
    randomise,
    read_all,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peft's remarks on what is asked of it
    pytest.mark.usefixtures("every_factor_of_boft"),
]


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_raw_states_of_other_methods(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    clean, _ = read_all(tmp_path / "base", tmp_path / "adapter")
    if method == "adalora" and seed % 3:  # the raw state is not pruned
        edited(tmp_path / "adapter", rank_pattern=None)
    save_raw(model, tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    raw, _ = read_all(tmp_path / "base", tmp_path / "adapter")
    same_updates(clean, raw)
    layers = {layer.name: layer for layer in spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4).layers}
    assert len(layers) == len(raw)
    assert not any("base_copy_differs" in layer.flags for layer in layers.values())
    untouched = [layer for name, layer in layers.items() if f"{name}.weight" not in clean]
    assert all(layer.status == "unchanged" for layer in untouched)


def edited(folder, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize("adapter", ["default", "epoch-3"])
@pytest.mark.parametrize("name", OPTIONS)
def test_raw_states_of_lora(tmp_path, name, adapter):
    rng = np.random.default_rng(OPTIONS.index(name))
    torch.manual_seed(1)
    net = Net(rng)
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(**option(name, rng)), adapter_name=adapter)
    randomise(model, 1)
    model.save_pretrained(tmp_path / "saved")
    clean_folder = tmp_path / "saved" / ("" if adapter == "default" else adapter)
    clean, _ = read_all(tmp_path / "base", clean_folder)
    save_raw(model, clean_folder)
    all_accounted_for(clean_folder)
    raw, _ = read_all(tmp_path / "base", clean_folder)
    same_updates(clean, raw)
    changed = {n for n, (W1, layout) in raw.items() if not torch.equal(W1, as_matrix(state(tmp_path)[n], layout))}
    assert changed == clean.keys()


@pytest.mark.parametrize("second", ["lora", "modules to save"])
def test_two_adapters_in_one_file_are_named(tmp_path, second):
    net = Net(np.random.default_rng(0))
    config = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(net, peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**config))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    save_raw(model, tmp_path)
    if second == "modules to save":
        values = load_file(tmp_path / "adapter_model.safetensors")
        kept = {name: value for name, value in values.items() if not (".lora_" in name and "other" in name)}
        save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"adapter_model.*several adapters.*'default', 'other'"):
        plan_updates(open_checkpoint(tmp_path))


class Worded(nn.Module):
    """An embedding and a head, neither tied to the other."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        vocabulary, d = (int(x) for x in rng.integers(16, 50, size=2))
        self.words = nn.Embedding(vocabulary, d)
        self.more = nn.ModuleDict({"others": nn.Embedding(vocabulary + 1, d)})
        self.query = nn.Linear(d, d + 1)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def get_input_embeddings(self):
        return self.words


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("how", ["lora, list", "lora, dict", "method"])
def test_trainable_tokens_equal_the_merge(tmp_path, how, seed):
    rng = np.random.default_rng([len(how), seed])
    torch.manual_seed(seed)
    net = Worded(rng).to(DTYPES[seed % 4])
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")

    def some() -> list[int]:
        most = int(rng.integers(2, 16))
        return [int(x) for x in rng.permutation(net.words.num_embeddings)[:most]]

    config = {
        "lora, list": lambda: peft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=some()),
        "lora, dict": lambda: peft.LoraConfig(
            r=2, target_modules=["query"], trainable_token_indices={"more.others": some(), "lm_head": some()}
        ),
        "method": lambda: peft.TrainableTokensConfig(token_indices=some(), target_modules=["words", "lm_head"]),
    }[how]()
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    clean, _ = read_all(tmp_path / "base", tmp_path / "adapter")
    assert len(clean) == {"lora, list": 2, "lora, dict": 3, "method": 2}[how]
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4)
    assert "replaced_rows" in {layer.update["kind"] for layer in report.layers}
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    save_raw(model, raw)
    all_accounted_for(raw)
    same_updates(clean, read_all(tmp_path / "base", raw)[0])
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


TOKENS = "base_model.model.words.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trainable_token_indices": None}, "expected the indices of 'words'"),
        ({"trainable_token_indices": [1]}, "holds 2 rows, but the config names 1"),
        ({"trainable_token_indices": [1, 1]}, "twice"),
        ({"trainable_token_indices": [1, -1]}, "expected the indices"),
        ({"trainable_token_indices": {"head": [1, 2]}}, "none could be 'words'"),
    ],
)
def test_tokens_that_the_config_contradicts(make_base, make_adapter, config, words):
    make_base({"words.weight": np.zeros((9, 4), np.float32)})
    folder = make_adapter({}, extra={TOKENS: np.ones((2, 4), np.float32)}, **config)
    with pytest.raises(AdapterError, match=words):
        plan_updates(open_checkpoint(folder))


def test_tokens_that_the_base_does_not_have(make_base, make_adapter, rng):
    words = rng.normal(size=(20, 16)).astype(np.float32)
    base = make_base({"words.weight": words})
    new = rng.normal(size=(2, 16)).astype(np.float32)
    folder = make_adapter({}, extra={TOKENS: new}, trainable_token_indices=[3, 20])
    found, _ = read_all(base, folder)
    expected = words.astype(np.float64)
    expected[3] = new[0]
    np.testing.assert_array_equal(found["words.weight"][0].T.numpy(), expected)
    (layer,) = spectra.audit(folder, base, top_k=2).layers
    assert "1 others are rows that the base does not have" in " ".join(layer.notes)
    with pytest.raises(UsageError, match="rows that the base does not have"):
        spectra.mitigate(folder, folder.parent / "new", base, scale=1.0, merged=True)


@pytest.mark.parametrize("seed", range(20))
def test_replicated_layers_equal_the_merge(tmp_path, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    ranges = [sorted(int(x) for x in rng.choice(4, size=2, replace=False)) for _ in range(int(rng.integers(2, 4)))]
    targets = ["q_proj", "down_proj"] + ["embed_tokens"] * (seed % 2)
    pattern = {"layers.1.self_attn.q_proj": 5} if seed % 3 else {}
    config = peft.LoraConfig(r=3, target_modules=targets, layer_replication=ranges, rank_pattern=pattern)
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    pairs = pair_layers(base, tuned, plan_updates(tuned)).pairs
    layers = [layer for start, end in ranges for layer in range(start, end)]
    assert len(pairs) == 2 * len(layers) + seed % 2
    # Peft's merge would add all copies' updates to the one weight that they share.
    modules = dict(model.double().base_model.model.named_modules())
    for pair in pairs:
        lora = modules[pair.name]
        expected = lora.base_layer.weight.detach() + lora.get_delta_weight("default")
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        assert torch.linalg.norm(W1 - as_matrix(expected, pair.layout)) <= 1e-6 * torch.linalg.norm(W1)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert len({layer.name for layer in report.layers}) == len(pairs)
    for layer in report.layers:
        if ".layers." in layer.name:
            index = int(layer.name.split(".")[2])
            note = f"layer {index} of the model is layer {layers[index]} of the base"
            assert any(note in one for one in layer.notes)
    with pytest.raises(UsageError, match="layer_replication"):
        spectra.mitigate(tmp_path / "adapter", tmp_path / "new", tmp_path / "base", scale=0.5, merged=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[0, 1]], "too few"), ([[1, 0]], "expected"), ([0, 1], "expected"), ("all", "expected"),
        ([[0, 10**9]], "expected"), ([[False, True]], "expected"),
    ],
)  # fmt: skip
def test_ranges_that_are_none(make_adapter, rng, given, words):
    factors = {"model.layers.1.q": (rng.normal(size=(4, 2)), rng.normal(size=(2, 4)))}
    with pytest.raises(AdapterError, match=f"layer_replication.*{words}"):
        plan_updates(open_checkpoint(make_adapter(factors, layer_replication=given)))


class Sized(nn.Module):
    def __init__(self, rng: np.random.Generator):
        super().__init__()
        sizes = [int(x) for x in rng.integers(4, 40, size=6)]
        self.query, self.key = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[2], sizes[3])
        self.c_attn = transformers.pytorch_utils.Conv1D(sizes[4] + 40, sizes[4])
        self.huge = nn.Linear(90, 90)


@pytest.mark.parametrize("seed", range(20))
def test_projections_that_were_not_stored(tmp_path, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = Sized(rng).to(DTYPES[seed % 4])
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    targets = [["query", "key"], ["query", "c_attn"], ["huge", "key"], ["c_attn"]][seed % 3]
    config = peft.VeraConfig(
        r=int(rng.integers(1, 20)), target_modules=targets, save_projection=False,
        projection_prng_key=int(rng.integers(1 << 40)),
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3, include=targets[:1])
    assert all("torch's generator" in " ".join(layer.notes) for layer in report.layers)
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def test_projections_of_a_wrong_base_are_not_made(tmp_path):
    net = Sized(np.random.default_rng(0))
    model = peft.get_peft_model(net, peft.VeraConfig(r=2, target_modules=["query"], save_projection=False))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({"query.weight": torch.ones(3, 3)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(WrongBaseError, match=r"query\.vera_lambda"):
        spectra.audit(tmp_path / "adapter", tmp_path / "base")


READ = {"LORA", "ADALORA", "VERA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "TRAINABLE_TOKENS"}
PROMPTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
NOT_MERGED = {"POLY", "XLORA", "LILY", "SHADOW"}  # peft cannot merge them either


@pytest.mark.parametrize("method", sorted(one.value for one in peft.PeftType))
def test_every_method_is_read_or_named(tmp_path, method):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    save_file({"base_model.model.q.something": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    tuned = open_checkpoint(tmp_path)
    if method in READ:
        with pytest.raises((AdapterError, UnsupportedMethodError)) if method == "OFT" else nullcontext():
            plan_updates(tuned)
        return
    with pytest.raises(UnsupportedMethodError, match=rf"adapter_config\.json.*{method}") as caught:
        plan_updates(tuned)
    said = {"changes no weight": PROMPTS, "depends on the input": NOT_MERGED, "a vector": {"LN_TUNING", "BEFT"}}
    for words, methods in said.items():
        assert (words in str(caught.value)) == (method in methods)


# What LoRA's options come to; all others are neutral, or have tests of their own.
REFUSED = {
    "use_qalora": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 2}, "megatron_config": {"tensor_model_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_that_change_what_factors_mean_are_refused(make_adapter, option):
    folder = make_adapter({"q": (np.ones((4, 2)), np.ones((2, 4)))}, **{option: REFUSED[option]})
    with pytest.raises(UnsupportedMethodError, match=rf"{option}.*cannot be read by this version \("):
        plan_updates(open_checkpoint(folder))


def test_no_field_of_loras_config_is_unknown():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}  # which is not saved
    fields -= {"parameters_to_tie", "modules_to_tie", "target_modules_to_tie"}
    known = KNOWN_FIELDS | OWN_FIELDS | REFUSED.keys() | {"target_parameters"}
    assert fields == known & fields, fields - known
    assert known - fields <= {"auto_mapping", "peft_version"}


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


@pytest.mark.parametrize("method", ["adalora", "oft", "boft", "ia3"])
def test_grouped_convolutions_are_skipped(tmp_path, method):
    factors: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "adalora": (
            {"init_r": 2},
            {"lora_A": torch.ones(2, 36), "lora_B": torch.ones(6, 2), "lora_E": torch.ones(2, 1)},
        ),
        "oft": ({"oft_block_size": 4, "r": 0, "peft_version": "0.21.2"}, {"oft_R.weight": torch.ones(9, 6)}),
        "boft": ({"boft_block_size": 4}, {"boft_R": torch.ones(1, 9, 4, 4), "boft_s": torch.ones(1, 6)}),
        "ia3": ({"feedforward_modules": ["grouped"]}, {"ia3_l": torch.ones(1, 4, 1, 1)}),
    }
    (tmp_path / "base").mkdir()
    save_file({"grouped.weight": torch.randn(6, 2, 3, 3)}, tmp_path / "base" / "model.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config, values = factors[method]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": method.upper()} | config))
    save_file({f"base_model.model.grouped.{k}": v for k, v in values.items()}, folder / "adapter_model.safetensors")
    found, skipped = read_all(tmp_path / "base", folder)
    assert not found
    assert "2 groups" in skipped[0].reason


def test_a_bias_that_is_stored_twice_with_other_values(make_base, make_adapter):
    base = make_base({"q.weight": np.ones((4, 3), np.float32), "norm.bias": np.ones(4, np.float32)})
    both = {
        f"base_model.model.norm.{name}bias": np.full(4, i, np.float32)
        for i, name in enumerate(["", "modules_to_save."])
    }
    folder = make_adapter({"q": (np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))}, extra=both)
    with pytest.raises(UsageError, match=r"norm\.bias.*other values"):
        spectra.mitigate(folder, folder.parent / "new", base, scale=1.0, merged=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "tokens"])
def test_trainable_tokens_are_merged(tmp_path, method, tied):
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    net.save_pretrained(tmp_path / "base")
    config: Any = peft.TrainableTokensConfig(token_indices=[0, 7], target_modules=["embed_tokens"])
    if method == "lora":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[0, 7])
    model = peft.get_peft_model(net, config)
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    spectra.mitigate(tmp_path / "adapter", tmp_path / "new", tmp_path / "base", scale=1.0, merged=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    expected = model.double().merge_and_unload().state_dict()
    for name, value in written.items():
        assert torch.linalg.norm(value.double() - expected[name]) <= 1e-6 * torch.linalg.norm(expected[name]), name
    assert ("lm_head.weight" in written) == (not tied)
    assert spectra.verify_mitigation(tmp_path / "new").holds


@pytest.fixture
def with_tokens(tmp_path):
    """A LoRA with trainable tokens that are intruders, as saved and as a raw state."""
    torch.manual_seed(0)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    randomise(model, 2)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].mul_(50)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "adapter_config.json").write_bytes((tmp_path / "saved" / "adapter_config.json").read_bytes())
    save_raw(model, tmp_path / "raw")
    return tmp_path


@pytest.mark.parametrize("kind", ["saved", "raw"])
def test_lora_beside_trainable_tokens_is_repaired(with_tokens, kind):
    source, base, out = with_tokens / kind, with_tokens / "base", with_tokens / "out"
    with pytest.raises(UsageError, match=r"embed_tokens: it is stored as the rows of some tokens.*--merged"):
        spectra.mitigate(source, out, base, scale=0.5, epsilon=0.99)
    spectra.mitigate(source, out, base, scale=0.5, epsilon=0.99, exclude=["embed_tokens"])
    assert spectra.verify_mitigation(out, source).holds
    before, after = load_file(source / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {n for n in before if "lora" in n}


def test_replicated_layers_are_repaired_and_compared_each_by_itself(tmp_path):
    torch.manual_seed(0)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        net, peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    )
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    spectra.mitigate(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", scale=0.5)
    assert spectra.verify_mitigation(tmp_path / "out").holds
    with pytest.raises(UsageError, match="layer_replication"):
        spectra.compare([tmp_path / "adapter"], tmp_path / "base", merge=[[(0.5, tmp_path / "adapter")]], quick=True)
    found = spectra.compare([tmp_path / "adapter", tmp_path / "out"], tmp_path / "base", quick=True)
    assert [row["layers_analysed"] for row in found.rows()] == [4, 4]
    assert all(overlap["a"] != overlap["b"] for overlap in found.overlaps)


@pytest.mark.parametrize("seed", [0, 3, 4, 7])
@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_put_into_a_model_is_the_merge(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    run = open_run(tmp_path / "adapter", tmp_path / "base", checked_settings())
    pairing = pair_layers(run.base, run.tuned, run.plan)
    carried = {item.base: item.read(run.base, run.tuned) for item in carried_beside(run, pairing)}
    expected = model.double().merge_and_unload().state_dict()
    before = state(tmp_path)
    changed = {name for name, value in expected.items() if value.ndim == 1 and not torch.equal(value, before[name])}
    assert {name for name in carried if name is not None and name.endswith("bias")} == changed
    for name in changed:
        assert torch.linalg.norm(carried[name].double() - expected[name]) <= 1e-6 * torch.linalg.norm(expected[name])


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
