"""Models in memory against the folders that they were loaded from, or are saved to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.errors import MissingFileError, SpectraError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.render.inspection import render_inspection
from spectra.tasks.inspect import inspect
from tests.support import peft_itself
from tests.support.in_memory import Unchanged, assert_same, but_for_where, nearly
from tests.support.paths import FIXTURES
from tests.support.peft_methods import EVERY, METHODS, write
from tests.support.peft_models import OPTIONS, Net, randomise, tiny_llama, write_lora
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peft's and transformers' remarks on what is asked of them
    pytest.mark.usefixtures("every_factor_of_boft"),
]


ADAPTERS = sorted(file.parent.relative_to(FIXTURES).as_posix() for file in FIXTURES.glob("**/adapter_config.json"))


def load(folder: str) -> Any:
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(FIXTURES / folder, num_labels=5, dtype="auto")


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_fixture_as_a_peft_model(name):
    model = peft.PeftModel.from_pretrained(load("base"), FIXTURES / name)
    model.train()
    before = Unchanged(model)
    found, expected = spectra.audit(model), spectra.audit(FIXTURES / name)
    before.check()
    assert but_for_where(found) == but_for_where(expected)
    assert found.base["named_by_adapter"] is True
    assert found.tuned["path"] == "PeftModel (LlamaForSequenceClassification), adapter default"
    assert found.base["path"] == "LlamaForSequenceClassification in memory"


@pytest.mark.parametrize("name", ["full", "full-high"])
def test_full_fine_tunes_as_modules_and_as_state_dicts(name):
    tuned, base = load(name), load("base")
    before = [Unchanged(tuned), Unchanged(base)]
    expected = but_for_where(spectra.audit(FIXTURES / name, FIXTURES / "base"))
    stored = load_file(FIXTURES / "base" / "model.safetensors")
    for one, other in [
        (tuned, base),
        (tuned, FIXTURES / "base"),
        (tuned.state_dict(), base),
        (FIXTURES / name, stored),
    ]:
        nearly(but_for_where(spectra.audit(one, other)), expected)  # of float32, which is not copied
    for item in before:
        item.check()


def test_verified_fingerprints_are_those_of_the_folder():
    tuned, base = load("full"), load_file(FIXTURES / "base" / "model.safetensors")
    found = spectra.audit(tuned, base, hash_contents=True)
    expected = spectra.audit(FIXTURES / "full", FIXTURES / "base", hash_contents=True)
    for side in ("tuned", "base"):
        assert getattr(found, side)["fingerprint"] == getattr(expected, side)["fingerprint"]
        assert getattr(found, side)["fingerprint_covers"] == "contents"


@each_seed(range(4))
@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    before = Unchanged(model)
    found = spectra.audit(model, top_k=4)
    before.check()
    expected = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4)
    assert_same(found, expected)


@each_seed(range(4))
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_lora(tmp_path, name, seed):
    model = write_lora(tmp_path, name, seed)
    before = Unchanged(model)
    found = spectra.audit(model, top_k=4)
    before.check()
    assert_same(found, spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4))


@each_seed(range(4))
@pytest.mark.parametrize("method", peft_itself.METHODS)
def test_every_method_through_peft(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    before = Unchanged(model)
    if method == "KaSA":  # whose initialisation truncates the weights of the model
        with pytest.raises(UsageError, match="its initialisation took a part out"):
            spectra.audit(model, top_k=4)
    found = spectra.audit(model, tmp_path / "base" if method == "KaSA" else None, top_k=4)
    before.check()
    assert_same(found, spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora", "loha", "lokr", "SHIRA"])
def test_a_scaling_at_run_time_is_used_and_said(tmp_path, method):
    """``scale_layer`` and ``set_scale`` change what peft merges, and no config says so."""
    if method in EVERY:
        model = write(tmp_path, method, 0)
    else:
        torch.manual_seed(0)
        net = Net(np.random.default_rng(3))
        (tmp_path / "base").mkdir()
        save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
        config = peft.LoraConfig(
            r=4, lora_alpha=3, target_modules=["query", "square"], use_rslora=method == "rslora",
            use_dora=method == "dora",
        )  # fmt: skip
        model = peft.get_peft_model(net, config)
        randomise(model, 0)
    plain = spectra.audit(model, top_k=4)
    changed = []
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "scaling") and "layers.1" in name and "default" in layer.scaling:
            if method == "SHIRA":
                layer.set_scale("default", 2.5)
            else:
                layer.scale_layer(2.5)
            changed.append(name)
    assert changed
    scaled = spectra.audit(model, top_k=4)
    merged = model.double().merge_and_unload().state_dict()
    base = load_file(tmp_path / "base" / "model.safetensors")
    for before, after in zip(plain.layers, scaled.layers, strict=True):
        said = [note for note in after.notes if "is scaled by 2.5 in the running model" in note]
        assert bool(said) == (after.name in changed)
        if after.name not in changed:
            assert after.measures == before.measures
            continue
        W0, W1 = base[f"{after.name}.weight"].double(), merged[f"{after.name}.weight"]
        relative = float((W1 - W0).norm() / W0.norm())
        assert after.measures["update_norm_relative"] == pytest.approx(relative, rel=1e-5)


def test_a_scaling_at_run_time_is_not_lost_in_a_repair(lora, tmp_path):
    for layer in lora.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    with pytest.raises(UsageError, match="scaled in the running model"):
        spectra.repair(lora, FIXTURES / "base", to=tmp_path / "new", scale=0.5)


@pytest.fixture
def lora() -> Any:
    return peft.PeftModel.from_pretrained(load("base"), FIXTURES / "lora-r4")


def test_everything_that_takes_a_path_takes_a_model(lora, tmp_path):
    base, full = load("base"), load("full")
    before = [Unchanged(model) for model in (lora, base, full)]
    paths, models = [FIXTURES / "lora-r4", FIXTURES / "full"], [lora, full]
    home = FIXTURES / "base"
    some: dict[str, Any] = {"include": ["layers.1.mlp"]}
    compared = [spectra.compare(given, home, draws=2, **some) for given in (paths, models)]
    for one, other in zip(compared[1].reports, compared[0].reports, strict=True):
        assert but_for_where(one) == but_for_where(other) | {"base": but_for_where(one)["base"]}
    assert compared[1].overlaps == compared[0].overlaps
    arrays = [spectra.layer_spectra(given, home, size=8, **some) for given in (paths, models)]
    for mine, theirs in zip(arrays[1], arrays[0], strict=True):
        assert mine.name == theirs.name
        assert np.array_equal(mine.cosines, theirs.cosines)
    ranks = [spectra.ranks(given, given_base, **some) for given, given_base in ((full, base), (paths[1], home))]
    assert ranks[0].layers == ranks[1].layers
    assert ranks[0].suggestion == ranks[1].suggestion
    for given, given_base, folder in ((full, base, "one"), (paths[1], home, "other")):
        spectra.extract(given, given_base, to=tmp_path / folder, energy=0.5, **some)
    extracted = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "other")]
    assert extracted[0].keys() == extracted[1].keys()
    assert all(torch.equal(extracted[0][name], extracted[1][name]) for name in extracted[0])
    seen = [inspect(given, **some) for given in (lora, paths[0])]
    assert seen[0].updates == seen[1].updates
    assert seen[0].skipped == seen[1].skipped
    assert seen[0].files == ()
    assert "holds      peft adapter in memory\n" in render_inspection([seen[0]])
    planned = [spectra.repair(given, scale=0.5, **some) for given in (lora, paths[0])]
    assert planned[0].layers == planned[1].layers
    assert spectra.repair(load("full-high"), base, scale=0.5, which="top").layers
    for item in before:
        item.check()


def test_a_repair_of_a_live_adapter_is_written(lora, tiny, tmp_path):
    before = Unchanged(lora)
    done: Any = spectra.repair(lora, to=tmp_path / "live", scale=0.5)
    spectra.repair(FIXTURES / "lora-r4", to=tmp_path / "folder", scale=0.5, store_dtype="float32")
    before.check()
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "folder"))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        rounded = "score" in name  # by loading it into a model of bfloat16
        assert torch.allclose(value.float(), theirs[name].float(), rtol=4e-3 if rounded else 0, atol=0), name
    assert done.output["source_from_here"] is None
    assert spectra.verify(tmp_path / "live", lora, source=lora).holds
    again = peft.PeftModel.from_pretrained(load("base"), tmp_path / "live")
    assert spectra.audit(again).total("all") == done.audit.total("all")
    with pytest.raises(UsageError, match="in memory is not written"):
        spectra.repair(load("full"), load("base"), to=tmp_path / "no", scale=0.5)
    with pytest.raises(UsageError, match="in memory is not written"):
        spectra.repair(tiny, to=tmp_path / "no", scale=0.5, merged=True)
    assert not (tmp_path / "no").exists()


def test_a_sweep_needs_a_model_of_its_own(lora):
    given: dict[str, Any] = {
        "scales": (1, 0),
        "controls": (),
        "include": ["layers.1.mlp.up_proj"],
        "evaluate": lambda _: 1.0,
    }
    before = Unchanged(lora)
    found = spectra.sweep(lora, model=load("base"), **given)
    expected = spectra.sweep(FIXTURES / "lora-r4", model=load("base"), **given)
    assert found.equals(expected)
    for model in (lora, lora.get_base_model()):
        with pytest.raises(UsageError, match="shares its values with it"):
            spectra.sweep(lora, model=model, **given)
    before.check()


def test_spectra_kept_of_a_base_in_memory(lora, tmp_path):
    some: dict[str, Any] = {"include": ["layers.1.mlp"]}
    plan = spectra.cache(lora, cache=tmp_path, dry_run=True, **some)
    assert len(plan.layers) == 3
    done = spectra.cache(lora, cache=tmp_path, **some)
    assert len(done.written) == 3
    assert not done.stale
    again = spectra.cache(load("base"), cache=tmp_path, **some)
    assert len(again.there) == 3
    found = spectra.audit(lora, cache=tmp_path, engine="cached", **some)
    assert not found.base["changed_since_cached"]
    other = load("full")  # of the same form: what was kept is held against the weights, and not used
    others = [
        spectra.audit(load("full-high"), other, cache=cache, engine="cached", **some) for cache in (tmp_path, False)
    ]
    assert but_for_where(others[0]) == but_for_where(others[1])


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_one_adapter_of_several(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    tiny.get_base_model()
    report = spectra.audit(tiny, top_k=2)
    assert {layer.module_type for layer in report.layers} == {"self_attn.q_proj", "self_attn.v_proj"}
    second = spectra.checkpoint_of(tiny, adapter="second")
    named = spectra.audit(second, top_k=2)
    assert {layer.module_type for layer in named.layers} == {"self_attn.o_proj"}
    tiny.set_adapter("second")
    assert but_for_where(spectra.audit(tiny, top_k=2)) == but_for_where(named)
    both = spectra.compare(
        [spectra.checkpoint_of(tiny, adapter=name) for name in ("default", "second")], top_k=2, quick=True
    )
    assert [row["label"].rpartition(" ")[2] for row in both.rows()] == ["default", "second"]
    merge = spectra.compare([], merge=[[(0.5, tiny), (0.5, second)]], top_k=2, quick=True)
    assert merge.reports[0].tuned["format"] == "merged"
    tiny.base_model.set_adapter(["default", "second"])
    with pytest.raises(UsageError, match=r"several adapters are active \(default, second\)"):
        spectra.audit(tiny)
    with pytest.raises(UsageError, match="no adapter 'third'; it has default, second"):
        spectra.checkpoint_of(tiny, adapter="third")


def test_adapters_without_a_peft_model(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    randomise(model, 0)
    wrapped = spectra.audit(model, top_k=2)
    assert {layer.module_type for layer in wrapped.layers} == {"self_attn.q_proj"}
    assert wrapped.tuned["path"] == "LlamaForCausalLM, adapter mine"
    part = model.model.layers[0]
    with pytest.raises(UsageError, match="not their config"):
        spectra.audit(part, part)


def test_a_merged_adapter_has_no_base(tiny):
    tiny.merge_adapter()
    before = Unchanged(tiny)
    with pytest.raises(UsageError, match=r"the adapter default is merged into .*unmerge_adapter"):
        spectra.audit(tiny)
    with pytest.raises(UsageError, match="is merged into"):
        spectra.audit(FIXTURES / "lora-r4", tiny)
    before.check()
    tiny.unmerge_adapter()
    assert spectra.audit(tiny, top_k=2).layers


def test_what_cannot_be_read_in_memory_is_named(lora, tmp_path):
    home = FIXTURES / "base"
    with torch.device("meta"):
        empty = tiny_llama()
    with pytest.raises(MissingFileError, match=r"'model.embed_tokens.weight': on the meta device"):
        spectra.audit(FIXTURES / "lora-r4", empty)
    with pytest.raises(UsageError, match=r"int is no model; expected a path"):
        spectra.audit(3, home)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing in it"):
        spectra.audit({}, home)
    with pytest.raises(UsageError, match="1 in it, which is no name"):
        spectra.audit({1: torch.ones(2, 2)}, home)  # type: ignore[dict-item]
    with pytest.raises(SpectraError, match="holds no tensors"):
        spectra.audit({"a": 1}, home)  # type: ignore[dict-item]
    with pytest.raises(UnsupportedMethodError, match="its layout is"):
        spectra.audit({"a.weight": torch.ones(2, 2).to_sparse()}, home)
    with pytest.raises(UsageError, match="does not record its base"):
        spectra.audit(load("full"))
    with pytest.raises(WrongBaseError, match="this is an adapter"):
        spectra.audit(lora, spectra.checkpoint_of(lora))
    with pytest.raises(UsageError, match="resume is for models on a disk"):
        spectra.audit(lora, resume=tmp_path / "journal")
    with pytest.raises(UsageError, match="executor is for models on a disk"):
        spectra.audit(FIXTURES / "lora-r4", load("base"), executor=object())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="different bases"):
        spectra.compare([lora, peft.PeftModel.from_pretrained(load("base"), FIXTURES / "lora-r1")])
