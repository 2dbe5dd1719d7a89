"""Checkpoints edited in place, byte for byte, and adapters merged into their base as peft merges them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.errors import CorruptFileError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.folders import RECORD, write_card, write_record
from spectra.files.orientation import as_stored
from spectra.pairing.carried import Carried
from spectra.pairing.pairs import pair_layers
from spectra.render.card import to_model_card, with_section
from spectra.repairs.merged import beside, carried_tensors, copy_checkpoint
from tests.support.paths import FIXTURES
from tests.support.peft_folders import adapted, loaded, opened, same
from tests.support.peft_models import OPTIONS, Net, option, tiny_gpt2, tiny_llama
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def merge(home, out="out"):
    """What merging does with the parts: every pair's weight, then what goes along."""
    base, tuned, plan, pairing = opened(home)
    carried = carried_tensors(base, tuned, plan, pairing)
    (home / out).mkdir()
    edited = copy_checkpoint(home / out, base, adapter=tuned)
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        edited.put(pair.base.name, as_stored(W1, pair.layout, pair.stored_shape))
    edited.carry(tuned, carried)
    return edited, carried


MORE: dict[str, dict] = {
    "bias all": {"bias": "all"},
    "bias all, attention": {"bias": "all", "target_modules": ["attn", "query"]},
    "lora bias, rslora": {"lora_bias": True, "use_rslora": True, "target_modules": ["query", "conv3"]},
    "lora bias, bias lora_only": {"lora_bias": True, "bias": "lora_only", "target_modules": ["query", "conv3"]},
    "modules to save": {"modules_to_save": ["classifier", "conv1", "head"]},
}


@each_seed(range(2))
@pytest.mark.parametrize("name", [*(name for name in OPTIONS if name != "modules to save"), *MORE])
def test_equals_the_merge(tmp_path, name, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = Net(rng).to((torch.float32, torch.float64)[seed])
    options = MORE[name] if name in MORE else option(name, rng)
    adapted(tmp_path, net, seed, **{"r": 3, "lora_alpha": 5, "target_modules": ["query", "square"], **options})
    before = load_file(tmp_path / "base" / "model.safetensors")
    edited, carried = merge(tmp_path)
    expected = loaded(net, tmp_path / "adapter").merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    same(found, expected)
    touched = {pair.base.name for pair in opened(tmp_path)[3].pairs} | {item.base for item in carried}
    for key, value in before.items():
        assert found[key].dtype == value.dtype
        assert key in touched or torch.equal(found[key], value)
    assert bool(carried) == ("bias" in name or name == "modules to save")
    assert {not item.added for item in carried} <= {not name.startswith("lora bias")}
    assert edited.checkpoint.tensors.keys() == before.keys()


def test_gpt2_whose_names_differ_from_the_adapters(tmp_path):
    torch.manual_seed(0)
    model = tiny_gpt2()
    adapted(tmp_path, model, 1, r=3, target_modules=["c_attn", "c_proj", "c_fc"], bias="all", modules_to_save=["ln_f"])
    base = open_checkpoint(tmp_path / "base")
    renamed = {name.removeprefix("transformer."): base.read(name) for name in base.tensors}
    save_file(renamed, tmp_path / "base" / "model.safetensors")
    merge(tmp_path)
    expected = loaded(model, tmp_path / "adapter").merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    same(found, {name: expected[f"transformer.{name}"] for name in found})


def test_norms_of_a_llama(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    adapted(
        tmp_path, model, 1, r=3, target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head", "model.norm", "post_attention_layernorm"],
    )  # fmt: skip
    _, carried = merge(tmp_path)
    assert {item.base for item in carried} == {
        "model.norm.weight", *(f"model.layers.{i}.post_attention_layernorm.weight" for i in range(2)),
    }  # fmt: skip
    merged = loaded(model, tmp_path / "adapter").merge_and_unload()
    same(load_file(tmp_path / "out" / "model.safetensors"), merged.state_dict())
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").double().eval()
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(plain(tokens).logits, merged(tokens).logits, rtol=1e-5, atol=1e-5)


# What the base has no place for


def refusal(home):
    opened_base, tuned, plan, pairing = opened(home)
    with pytest.raises(
        UsageError, match=r"adapter: tensor .* cannot be merged into .*base: .*merge that with peft"
    ) as e:
        carried_tensors(opened_base, tuned, plan, pairing)
    return str(e.value)


def test_a_new_head_is_refused(make_base, make_adapter, tmp_path):
    make_base({"bert.layer.0.q.weight": torch.randn(6, 5)})
    factors = {"bert.layer.0.q": (torch.randn(6, 2), torch.randn(2, 5))}
    make_adapter(factors, extra={"base_model.model.classifier.modules_to_save.weight": torch.randn(3, 6)})
    assert "classifier.modules_to_save.weight" in refusal(tmp_path)
    make_adapter(factors, extra={"base_model.model.classifier.bias": torch.randn(3)})
    assert "there is no 'classifier.bias'" in refusal(tmp_path)


def test_other_shapes_and_types_are_refused(make_base, make_adapter, tmp_path):
    make_base({
        "layer.0.q.weight": torch.randn(6, 5), "norm.weight": torch.ones(6), "steps": torch.zeros(2, dtype=torch.int64),
        "layer.0.k.weight": torch.zeros(6, 5, dtype=torch.int8),
    })  # fmt: skip
    factors = {"layer.0.q": (torch.randn(6, 2), torch.randn(2, 5))}
    make_adapter(factors, extra={"base_model.model.norm.weight": torch.ones(7)})
    assert "its shape is [7], that of 'norm.weight' [6]" in refusal(tmp_path)
    make_adapter(factors, extra={"base_model.model.steps": torch.ones(2)})
    assert "stored as F32, 'steps' as I64" in refusal(tmp_path)
    make_adapter(factors | {"layer.0.k": (torch.randn(6, 2), torch.randn(2, 5))})
    assert "integers without scales" in refusal(tmp_path)
    make_adapter(factors, extra={"base_model.model.steps": torch.ones(2, dtype=torch.int64)})
    assert merge(tmp_path)[1] == (Carried("steps", (2,), False, "base_model.model.steps", "steps"),)
    assert load_file(tmp_path / "out" / "model.safetensors")["steps"].tolist() == [1, 1]


def test_grouped_convolutions_are_refused(make_base, make_adapter, tmp_path):
    make_base({"conv.weight": torch.randn(8, 2, 3, 3), "layer.0.q.weight": torch.randn(4, 4)})
    make_adapter({"conv": (torch.randn(8, 1, 1, 1), torch.randn(1, 4, 3, 3)),
                  "layer.0.q": (torch.randn(4, 1), torch.randn(1, 4))})  # fmt: skip
    assert "2 groups" in refusal(tmp_path)


def test_resized_vocabularies_are_refused(make_base, make_adapter, tmp_path):
    make_base({"embed_tokens.weight": torch.randn(30, 8), "q.weight": torch.randn(8, 8)})
    prefix = "base_model.model.embed_tokens."
    make_adapter(
        {}, extra={f"{prefix}lora_embedding_A": torch.randn(2, 32), f"{prefix}lora_embedding_B": torch.randn(8, 2)}, r=2
    )
    assert "resized from 30 to 32 rows" in refusal(tmp_path)
    factors = {"q": (torch.randn(8, 2), torch.randn(2, 8))}
    make_adapter(factors, extra={f"{prefix}weight": torch.randn(32, 8)}, r=2)
    assert "resized from 30 to 32 rows" in refusal(tmp_path)


@pytest.mark.parametrize("options", [
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
], ids=["head", "embedding", "saved embedding", "saved head"])  # fmt: skip
def test_weights_that_are_shared_are_refused(tmp_path, options):
    torch.manual_seed(0)
    adapted(tmp_path, tiny_llama(), r=2, **options)
    refusal(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    refusal(tmp_path)


def test_factors_that_peft_ties_are_refused(tmp_path):
    torch.manual_seed(0)
    adapted(tmp_path, tiny_llama(), r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert "lm_head" in refusal(tmp_path)


def test_a_weight_that_the_adapter_says_is_shared_is_merged(make_base, make_adapter, tmp_path):
    weights = {"embed_tokens.weight": torch.randn(9, 4), "q.weight": torch.randn(4, 4)}
    make_base(weights, config={"tie_word_embeddings": True})
    factors = {"q": (torch.randn(4, 1), torch.randn(1, 4))}
    saved = {"base_model.model.embed_tokens.weight": torch.ones(9, 4)}
    make_adapter(factors, extra=saved)
    assert "share one weight" in refusal(tmp_path)
    make_adapter(factors, extra=saved, ensure_weight_tying=True)
    merge(tmp_path)
    assert load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"].all()


def test_an_adapter_for_some_tokens_is_refused(make_base, make_adapter, tmp_path):
    make_base({"layer.0.q.weight": torch.randn(6, 5)})
    make_adapter({"layer.0.q": (torch.randn(6, 2), torch.randn(2, 5))}, alora_invocation_tokens=[1, 2])
    with pytest.raises(UsageError, match="aLoRA"):
        carried_tensors(*opened(tmp_path))


def test_what_was_left_out_is_not_forgotten(make_base, make_adapter, tmp_path):
    make_base({f"layer.{i}.q.weight": torch.randn(6, 5) for i in range(2)})
    make_adapter({f"layer.{i}.q": (torch.randn(6, 2), torch.randn(2, 5)) for i in range(2)})
    base, tuned, plan, _ = opened(tmp_path)
    with pytest.raises(UsageError, match="left out by --include"):
        carried_tensors(base, tuned, plan, pair_layers(base, tuned, plan, include=["layer.0"]))


# Editing


def sharded(home):
    home.mkdir()
    torch.manual_seed(0)
    shards = {
        "model-1.safetensors": {"a": torch.randn(5, 4).bfloat16(), "n": torch.randn(5), "i": torch.arange(3)},
        "model-2.safetensors": {"b": torch.randn(6, 4).half(), "s": torch.tensor(2.0, dtype=torch.float64)},
    }
    for name, tensors in shards.items():
        save_file(tensors, home / name, metadata={"format": "pt", "of": name})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    (home / "config.json").write_text('{"model_type": "x"}')
    (home / "README.md").write_text("# Model\n")
    (home / "pytorch_model.bin").write_text("x")
    return open_checkpoint(home)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_card_carries_no_audit_of_the_source(tmp_path, end):
    section = to_model_card(spectra.audit(FIXTURES / "lora-r1"))
    card = with_section(f"# Mine{end}{end}Words.{end}".encode(), section, "card") + f"{end}More words.{end}".encode()
    assert b"Spectral audit" in card
    (tmp_path / "before.md").write_bytes(card)
    write_card(tmp_path, tmp_path / "before.md", ["## Repaired"], [])
    made = (tmp_path / "README.md").read_bytes().decode()
    assert "Spectral audit" not in made
    assert "spectra:begin" not in made
    assert made.index("# Mine") < made.index("Words.") < made.index("More words.") < made.index("## Repaired")
    (tmp_path / "before.md").write_text("A line of `<!-- spectra:begin -->` in a text is none.\n")
    write_card(tmp_path, tmp_path / "before.md", ["## Repaired"], [])
    assert "`<!-- spectra:begin -->`" in (tmp_path / "README.md").read_text()


def test_only_the_bytes_of_a_tensor_change(tmp_path):
    source = sharded(tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.path.iterdir()}
    home = tmp_path / "out"
    home.mkdir()
    edited = copy_checkpoint(home, source)
    assert beside(source).left_behind.keys() == {"pytorch_model.bin"}
    copied = {file.name: file.read_bytes() for file in home.iterdir()}
    assert copied == {name: content for name, content in before.items() if name != "pytorch_model.bin"}
    values = {
        "a": torch.randn(4, 5, dtype=torch.float64).T, "n": torch.randn(5, dtype=torch.float64),
        "b": torch.randn(2, 4), "s": torch.tensor(7.0),
    }  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(edited.put, name, value, rows=2 if name == "b" else None) for name, value in values.items()]
        for job in jobs:
            job.result()
    for file in source.files:
        old, new = before[file.name], (home / file.name).read_bytes()
        assert len(old) == len(new)
        spans = [info.span for name, info in source.tensors.items() if info.file == file and name != "i"]
        differ = [at for at in range(len(old)) if old[at] != new[at]]
        assert all(any(start <= at < start + size for start, size in spans) for at in differ)
    found = open_checkpoint(home)
    assert list(found.tensors) == list(source.tensors)
    assert torch.equal(found.read("a"), values["a"].to(torch.bfloat16))
    assert torch.equal(found.read("n"), values["n"].float())
    assert torch.equal(found.read("b"), torch.cat([values["b"].half(), source.read("b")[2:]]))
    assert float(found.read("s")) == 7
    assert torch.equal(edited.checkpoint.read("a"), found.read("a"))
    assert {file.name: file.read_bytes() for file in source.path.iterdir()} == before


def test_large_tensors_are_written_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr("spectra.repairs.merged.SLAB_ELEMENTS", 10)
    source = sharded(tmp_path / "source")
    (tmp_path / "out").mkdir()
    edited = copy_checkpoint(tmp_path / "out", source)
    for name in ("a", "n", "b"):
        value = torch.randn(source.tensors[name].shape)
        edited.put(name, value)
        assert torch.equal(edited.checkpoint.read(name), value.to(source.read(name).dtype))


def test_values_that_do_not_fit_are_refused(tmp_path):
    source = sharded(tmp_path / "source")
    (tmp_path / "out").mkdir()
    edited = copy_checkpoint(tmp_path / "out", source)
    for value, rows in [(torch.ones(4, 5), None), (torch.ones(5, 4), 4), (torch.ones(6, 4), 6), (torch.ones(5), None)]:
        with pytest.raises(UsageError, match=r"source: tensor 'a': values of \["):
            edited.put("a", value, rows=rows)
    with pytest.raises(UsageError, match="stored as I64"):
        edited.put("i", torch.ones(3))
    with pytest.raises(UsageError, match="tensor 'b': its new values are too large for F16"):
        edited.put("b", torch.full((6, 4), 1e5))


def test_a_source_that_changes_is_an_error(tmp_path):
    source = sharded(tmp_path / "source")
    save_file({"b": torch.randn(6, 5).half(), "s": torch.ones(())}, source.files[1])
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptFileError, match="changed while it was being read"):
        copy_checkpoint(tmp_path / "out", source)


def test_cards_and_records(tmp_path):
    source = sharded(tmp_path / "source")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        edited = copy_checkpoint(tmp_path / name, source)
        edited.finish(remarks=["## Repaired"] if name == "one" else ())
        assert not (tmp_path / name / RECORD).exists()
        write_record(tmp_path / name, "{}")
        assert (tmp_path / name / RECORD).read_text() == "{}\n"
    assert (tmp_path / "one" / "README.md").read_text() == "# Model\n\n## Repaired\n"
    assert (tmp_path / "two" / "README.md").read_text() == "# Model\n"


def test_the_adapters_tokenizer_and_no_foreign_card(make_base, make_adapter, tmp_path):
    base = make_base({"layer.0.q.weight": torch.randn(6, 5)}, config={"model_type": "x"})
    adapter = make_adapter({"layer.0.q": (torch.randn(6, 2), torch.randn(2, 5))})
    for folder in (base, adapter):
        for name in ("README.md", "tokenizer.json", "generation_config.json"):
            (folder / name).write_text(f'"{folder.name}"')
    (base / "vocab.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("x")
    (adapter / "optimizer.pt").write_text("x")
    (adapter / "runs").mkdir()
    (base / "pytorch_model.bin").write_text("x")
    edited, _ = merge(tmp_path)
    left_behind = beside(*opened(tmp_path)[:2]).left_behind
    assert left_behind.keys() == {
        "README.md", "pytorch_model.bin", "adapter/README.md", "adapter/generation_config.json",
        "adapter/optimizer.pt", "adapter/runs",
    }  # fmt: skip
    assert left_behind["README.md"] == "the base's model card, not the result's"
    assert left_behind["adapter/README.md"] == "the adapter's, not the model's"
    assert left_behind["adapter/generation_config.json"] == "the adapter's, not the model's"
    assert left_behind["adapter/runs"] == "a sub-folder"
    assert "old values" in left_behind["adapter/optimizer.pt"]
    edited.finish(remarks=["# Merged"])
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "tokenizer.json", "vocab.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_text() == '"adapter"'
    assert (out / "generation_config.json").read_text() == '"base"'
    assert (out / "README.md").read_text() == '---\nbase_model: "../base"\ntags:\n- spectra\n---\n\n# Merged\n'


def test_an_adapter_in_the_models_folder_stays_behind(make_base, make_adapter, tmp_path):
    base = make_base({"layer.0.q.weight": torch.randn(6, 5)}, folder="both")
    make_adapter({"layer.0.q": (torch.randn(6, 2), torch.randn(2, 5))}, folder="both")
    source = open_checkpoint(base, as_base=True)
    (tmp_path / "out").mkdir()
    copy_checkpoint(tmp_path / "out", source)
    assert beside(source).left_behind.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert open_checkpoint(tmp_path / "out").adapter_config is None


# How names correspond


def test_counterparts(make_base, tmp_path):
    norms = {f"layer.{i}.norm.weight": torch.ones(4) for i in range(2)}
    layers = {f"layer.{i}.q.weight": torch.randn(4, 4) for i in range(2)} | norms
    heads = {"classifier.weight": torch.randn(3, 4), "classifier.bias": torch.ones(3), "layer.0.q.bias": torch.ones(4)}
    make_base({f"bert.{name}": value for name, value in layers.items()} | {"cls.bias": torch.ones(3)})
    make_base(layers | heads, "adapter")
    find = opened(tmp_path)[3].counterpart
    for name in layers:
        assert find(name) == f"bert.{name}"
    assert find("layer.0.q.bias") is None
    assert find("classifier.bias") is None
    assert find("cls.bias") == "cls.bias"


def test_counterparts_that_could_be_several_are_none(make_base, make_adapter, tmp_path):
    base = {f"{side}.layer.0.{kind}.weight": torch.randn(4 + at, 4)
            for at, (side, kind) in enumerate([("encoder", "q"), ("decoder", "k")])}  # fmt: skip
    norms = {f"{side}.layer.0.norm.weight": torch.ones(4) for side in ("encoder", "decoder")}
    make_base(base | norms)
    make_adapter({f"layer.0.{kind}": (torch.randn(4 + at, 2), torch.randn(2, 4)) for at, kind in enumerate("qk")})
    pairing = opened(tmp_path)[3]
    assert len(pairing.pairs) == 2
    assert pairing.counterpart("layer.0.norm.weight") is None
    assert pairing.counterpart("layer.0.q.weight") == "encoder.layer.0.q.weight"
