"""Repaired adapters and checkpoints on disk: read back by peft and transformers, against the formula in float64."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.errors import SpectraError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from tests.support.paths import FIXTURES
from tests.support.peft_models import OPTIONS, Net, option, randomise, tiny_gpt2, tiny_llama
from tests.support.reference import formula, values_after
from tests.support.repaired import BASE, checksums, edit_record, merged, relative, tuned_weights
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

EVERY = {"": [0, 1]}  # the two leading vectors of every layer, intruders or not


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what we ask of it
        yield


def saved(folder, net, **options):
    """Writes a base and a randomised adapter of it; returns the peft model."""
    (folder / "base").mkdir()
    save_file(net.state_dict(), folder / "base" / "model.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(**options))
    randomise(model, 5)
    model.save_pretrained(folder / "adapter")
    return model


@each_seed(range(3))
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_merges_what_was_written_to_the_formula(tmp_path, name, seed):
    rng = np.random.default_rng([OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    net = Net(rng)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    saved(tmp_path, net, **option(name, rng))
    sums = checksums(tmp_path)
    found = spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.3, which=EVERY)
    assert checksums(tmp_path).items() >= sums.items()  # the inputs are as they were

    before = tuned_weights(tmp_path / "base", tmp_path / "adapter")
    fresh = Net(np.random.default_rng([OPTIONS.index(name), seed]))
    fresh.load_state_dict(state)
    after = merged(fresh, tmp_path / "out")
    layouts = {
        pair.base.name: pair.layout
        for one, other in [(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter"))]
        for pair in pair_layers(one, other, plan_updates(other)).pairs
    }
    assert len(before) == len(found.layers) > 0
    for tensor, W1 in before.items():
        chosen = dict.fromkeys(range(min(2, *W1.shape)), 0.3)
        written = as_matrix(after[tensor], layouts[tensor]).numpy()
        assert relative(written, formula(W1, chosen)) <= 1e-5, tensor
        values = np.linalg.svd(written, compute_uv=False)
        np.testing.assert_allclose(values, values_after(W1, chosen), atol=1e-5 * values.max())
    others = merged(fresh_like(name, seed, state), tmp_path / "adapter")
    for tensor, value in others.items():  # biases, modules to save
        if tensor not in before:
            torch.testing.assert_close(after[tensor], value, rtol=0, atol=0, msg=tensor)
    assert spectra.verify(tmp_path / "out").holds


def fresh_like(name: str, seed: int, state: dict[str, torch.Tensor]) -> nn.Module:
    net = Net(np.random.default_rng([OPTIONS.index(name), seed]))
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loaded_model_answers_as_the_edited_one(tmp_path, family, use_dora):
    torch.manual_seed(0)
    make, targets = {
        "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc", "wte"]),
        "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj", "embed_tokens"]),
    }[family]
    net = make()
    net.save_pretrained(tmp_path / "base")
    state = {key: value.clone() for key, value in net.state_dict().items()}
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=use_dora))
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.4, which={"": [0, 2]})

    prefix = "transformer." if family == "gpt2" else ""
    edited = make()
    for name, W1 in tuned_weights(tmp_path / "base", tmp_path / "adapter").items():
        key = name if name in state else prefix + name
        W = torch.from_numpy(formula(W1, {0: 0.4, 2: 0.4}))
        state[key] = (W if W.shape == state[key].shape and "c_" not in key else W.T).to(state[key].dtype)
    if family == "llama":  # peft unties nothing: its adapter changes what the embedding looks up
        edited = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**edited.config.to_dict(), "tie_word_embeddings": False})
        )
    else:
        edited.lm_head.weight = nn.Parameter(edited.lm_head.weight.detach().clone())
    edited.load_state_dict(state)

    loaded = peft.PeftModel.from_pretrained(make().__class__.from_pretrained(tmp_path / "base"), tmp_path / "out")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted, found = edited.eval()(tokens).logits, loaded.eval()(tokens).logits
        source = peft.PeftModel.from_pretrained(
            make().__class__.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).eval()(tokens).logits  # fmt: skip
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (source - wanted).abs().max() > 1e-2 * wanted.abs().max()  # it is another model


@pytest.mark.parametrize("member", ["lora-r4", "rslora-r16", "dora-r16", "full", "full-high"])
def test_the_family_repaired(tmp_path, member):
    """Trained weights: the default choice, the audit of the result, and the check afterwards."""
    sums = checksums(FIXTURES / member), checksums(BASE)
    found = spectra.repair(FIXTURES / member, BASE, to=tmp_path / "out", scale=0.2)
    assert (checksums(FIXTURES / member), checksums(BASE)) == sums
    before = spectra.audit(FIXTURES / member, BASE)
    assert found.intruders_before == before.total("all") == len(found.scaled) > 0
    assert found.audit is not None
    fresh = spectra.audit(tmp_path / "out", BASE)
    assert [layer.intruder_indices for layer in found.audit.layers] == [
        layer.intruder_indices for layer in fresh.layers
    ]
    assert found.intruders_after == fresh.total("all") < found.intruders_before
    for mine, theirs in zip(found.audit.layers, fresh.layers, strict=True):
        assert mine.update == theirs.update
        for one, other in zip(mine.vectors, theirs.vectors, strict=True):
            assert one.sigma == pytest.approx(other.sigma, rel=1e-5)
    W1, after = tuned_weights(BASE, FIXTURES / member), tuned_weights(BASE, tmp_path / "out")
    chosen = {layer.name: {v.index: 0.2 for v in layer.vectors} for layer in found.layers}
    for tensor, W in W1.items():
        which = chosen.get(tensor.removesuffix(".weight"), {})
        assert relative(after[tensor], formula(W, which)) <= 1e-5, tensor
    for layer in found.layers:
        values = np.linalg.svd(W1[layer.name + ".weight"], compute_uv=False)
        new = values_after(W1[layer.name + ".weight"], chosen[layer.name])
        for vector in layer.vectors:
            assert vector.sigma == pytest.approx(values[vector.index], rel=1e-6)
            assert vector.sigma_after == pytest.approx(0.2 * vector.sigma, rel=1e-5)
            assert vector.energy == pytest.approx(vector.sigma**2 / (values**2).sum(), rel=1e-5)
            assert vector.energy_after == pytest.approx(vector.sigma_after**2 / (new**2).sum(), rel=1e-4)
            assert new[vector.index_after] == pytest.approx(vector.sigma_after, rel=1e-5)
        q = len(layer.vectors)
        if layer.rank is not None:
            assert layer.rank_after == min(layer.rank + q, *layer.shape)
    check = spectra.verify(tmp_path / "out")
    assert check.holds, check.problems
    assert max(layer.error or 0 for layer in check.layers) <= 1e-6


def test_a_scale_of_one_copies_byte_for_byte(tmp_path):
    for member in ("lora-r4", "full"):
        source = tmp_path / member
        shutil.copytree(FIXTURES / member, source)
        (source / "tokenizer_config.json").write_text("{}")
        for name, options in (("one", {"scale": 1}), ("none", {"scale": 0.5, "epsilon": 1e-9})):
            out = tmp_path / f"{member}-{name}"
            found = spectra.repair(source, BASE, to=out, **options)
            assert not found.changed
            copied = checksums(out)
            del copied["spectra-repair.json"]
            assert copied == checksums(source)
            assert spectra.verify(out).holds


def test_one_vector_a_matrix_as_in_the_paper(tmp_path):
    found = spectra.repair(FIXTURES / "lora-r4", BASE, scale=0.5, which="top")
    everything = spectra.repair(FIXTURES / "lora-r4", BASE, scale=0.5)
    assert len(found.scaled) == len(everything.layers) < len(everything.scaled)
    firsts = {layer.name: layer.vectors[0].index for layer in everything.layers}
    assert {layer.name: layer.vectors[0].index for layer in found.layers} == firsts


def test_scales_and_vectors_by_name(tmp_path):
    found = spectra.repair(
        FIXTURES / "lora-r4", BASE, to=tmp_path / "out",
        scale={"*": 0.5, "layers.0.": 0.25, "layers.0.mlp": 1}, which={"q_proj": [0, 3], "layers.0.": [1]},
    )  # fmt: skip
    chosen = {layer.name: {v.index: v.scale for v in layer.vectors} for layer in found.layers}
    assert chosen["model.layers.0.self_attn.q_proj"] == {0: 0.25, 1: 0.25, 3: 0.25}
    assert chosen["model.layers.0.self_attn.k_proj"] == {1: 0.25}
    assert chosen["model.layers.1.self_attn.q_proj"] == {0: 0.5, 3: 0.5}
    assert not any("layers.0.mlp" in name or "layers.1.mlp" in name for name in chosen)
    assert spectra.verify(tmp_path / "out").holds


def test_the_kept_rank_says_what_it_lost(tmp_path):
    found = spectra.repair(FIXTURES / "lora-r16", BASE, to=tmp_path / "out", scale=0.5, keep_rank=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    W1, after = tuned_weights(BASE, FIXTURES / "lora-r16"), tuned_weights(BASE, tmp_path / "out")
    base = load_file(BASE / "model.safetensors")
    for layer in found.layers:
        name = layer.name + ".weight"
        wanted = formula(W1[name], {v.index: 0.5 for v in layer.vectors})
        W0 = base[name].double().numpy()
        s = np.linalg.svd(wanted - W0, compute_uv=False)
        assert layer.update_error == pytest.approx(np.linalg.norm(s[16:]) / np.linalg.norm(s), rel=1e-4)
        assert np.linalg.norm(after[name] - wanted) == pytest.approx(np.linalg.norm(s[16:]), rel=1e-4)
        U, values, Vh = np.linalg.svd(W1[name])
        for vector in layer.vectors:
            got = U[:, vector.index] @ after[name] @ Vh[vector.index] / values[vector.index]
            assert vector.scale_achieved == pytest.approx(got, abs=1e-5)
    assert max(layer.update_error or 0 for layer in found.layers) > 0.01
    assert spectra.verify(tmp_path / "out").holds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_request(tmp_path, dtype):
    found = spectra.repair(FIXTURES / "lora-r4", BASE, to=tmp_path / "out", scale=0.5, store_dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    source = load_file(FIXTURES / "lora-r4" / "adapter_model.safetensors")
    changed = {layer.name for layer in found.layers}
    for name, value in tensors.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        assert value.dtype == (getattr(torch, dtype) if module in changed else source[name].dtype)
    worst = max(layer.update_error or 0 for layer in found.layers)
    assert {"bfloat16": 1e-3, "float16": 1e-4}[dtype] < worst < {"bfloat16": 6e-3, "float16": 1e-3}[dtype]
    assert spectra.verify(tmp_path / "out").holds


def test_merged_into_the_base(tmp_path, headless):
    found = spectra.repair(headless, BASE, to=tmp_path / "out", scale=0.5, merged=True, exclude=["mlp"])
    base, out = load_file(BASE / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in out.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    W1 = tuned_weights(BASE, headless)
    chosen = {layer.name + ".weight": {v.index: 0.5 for v in layer.vectors} for layer in found.layers}
    assert chosen
    assert not any("mlp" in name for name in chosen)
    for name, value in out.items():
        if name in W1:  # the excluded ones, too, are tuned
            wanted = torch.from_numpy(formula(W1[name], chosen.get(name, {})))
            assert relative(value.double().numpy(), wanted.numpy()) <= torch.finfo(value.dtype).eps
        else:
            assert torch.equal(value, base[name])
    assert found.audit is not None
    assert found.audit.tuned["format"] == "full"
    fresh = spectra.audit(tmp_path / "out", BASE, exclude=["mlp"])
    assert [layer.intruders for layer in found.audit.layers] == [layer.intruders for layer in fresh.layers]
    assert spectra.verify(tmp_path / "out").holds


def test_several_workers_write_the_same(tmp_path, headless):
    for source, merge in ((headless, False), (FIXTURES / "full-high", False), (headless, True)):
        names = [f"{source.name}-{merge}-{workers}" for workers in (1, 2)]
        for name, workers in zip(names, (1, 2), strict=True):
            spectra.repair(source, BASE, to=tmp_path / name, scale=0.5, workers=workers, threads=1, merged=merge)
        one, two = (checksums(tmp_path / name) for name in names)
        assert one.keys() == two.keys()
        assert [key for key in one if one[key] != two[key]] == ["spectra-repair.json"]


def test_what_cannot_be_done_is_said_before_anything_is_written(tmp_path, make_base, make_adapter, rng):
    out = tmp_path / "out"

    def refused(match, tuned=FIXTURES / "lora-r4", base=BASE, **options):
        with pytest.raises(SpectraError, match=match):
            spectra.repair(tuned, base, to=options.pop("out", out), **{"scale": 0.5, **options})
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))

    refused("scale = -0.1", scale=-0.1)
    refused("scale = nan", scale=float("nan"))
    refused("scale = 1.01; expected a number from 0", scale=1.01)
    refused("'nothing' matches no layer", scale={"nothing": 0.5})
    refused("'nothing' matches no layer", which={"nothing": [0]})
    refused("which = 'some'", which="some")
    refused("expected ranks", which={"q_proj": [-1]})
    refused("vector 160", which={"q_proj": [160]})
    refused("store_dtype = 'int8'", store_dtype="int8")
    refused("keep-rank is for adapters", tuned=FIXTURES / "full", keep_rank=True)
    refused("store-dtype is for adapters", merged=True, store_dtype="bfloat16")
    refused("wrong base", base=make_base({"other.weight": rng.normal(size=(4, 4))}))
    base = make_base({"a.weight": rng.normal(size=(9, 7)), "b.weight": rng.normal(size=(9, 7))}, "two")
    B, A = rng.normal(size=(9, 2)), rng.normal(size=(2, 7))
    bad = make_adapter({"a": (B, A), "b": (B * np.nan, A.copy())})
    refused(r"b.lora_B.*NaN.*with --exclude b", tuned=bad, base=base)
    found = spectra.repair(bad, base, to=out, scale=0.5, which={"a": [0]}, exclude=["b"])
    assert len(found.scaled) == 1
    assert np.isnan(load_file(out / "adapter_model.safetensors")["base_model.model.b.lora_B.weight"].numpy()).all()
    assert spectra.verify(out).problems == ()


POINTS = (
    "spectra.files.folders.copy_file", "spectra.adapters.peft.repaired.save_file",
    "spectra.adapters.peft.repaired._write_config",
    "spectra.adapters.peft.repaired.write_card", "spectra.repairs.forms.write_repaired",
    "spectra.repairs.forms._with_audit",
    "spectra.repairs.forms.files_in", "spectra.repairs.repair.write_record", "spectra.files.folders.os.fsync",
    "spectra.repairs.merged.copy_file", "spectra.repairs.merged.EditedCheckpoint.put",
    "spectra.repairs.merged.EditedCheckpoint.finish",
)  # fmt: skip


@pytest.fixture(scope="module")
def repaired_before(tmp_path_factory):
    """By member, a folder that holds a repaired one."""
    homes = {member: tmp_path_factory.mktemp(member) for member in ("full-high", "lora-r1")}
    for member, home in homes.items():
        spectra.repair(FIXTURES / member, BASE, to=home / "old", scale=0.5, which="top", include=["layers.0."])
    return homes


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_leaves_nothing(repaired_before, monkeypatch, point, error):
    """And with force, what was there."""
    member = "full-high" if ".merged." in point else "lora-r1"
    home = repaired_before[member]
    before = checksums(home)
    reached = []

    def crash(*_, **__):
        reached.append(point)
        raise error

    for name, force in (("new", False), ("old", True)):
        with monkeypatch.context() as patch:
            patch.setattr(point, crash)
            if point == "spectra.files.folders.copy_file":
                patch.setattr("spectra.adapters.peft.repaired.copy_file", crash)
            with pytest.raises((SpectraError, KeyboardInterrupt)):
                spectra.repair(FIXTURES / member, BASE, to=home / name, scale=0.3, force=force, include=["layers.0."])
        assert len(reached) == (1 if name == "new" else 2)
        assert checksums(home) == before
        assert [path.name for path in home.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["factors", "full", "whole"])
def test_rows_that_the_base_does_not_have_are_kept_and_checked(tmp_path, make_base, make_adapter, rng, kind):
    E = rng.normal(size=(30, 12)).astype(np.float32)
    base = make_base({"model.embed_tokens.weight": E[:24].copy(), "q.weight": E[:12].copy()})
    out, name = tmp_path / "out", "base_model.model.model.embed_tokens."
    if kind == "factors":
        A, B = rng.normal(size=(2, 30)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
        extra = {name + "lora_embedding_A": A, name + "lora_embedding_B": B}
        tuned, tensor, column = (
            make_adapter({}, extra=extra, r=2, target_modules=["embed_tokens"]),
            name + "lora_embedding_A",
            True,
        )
    elif kind == "whole":
        tuned = make_adapter({"q": (E[:12, :1].copy(), E[:1, :12].copy())}, extra={name + "weight": E + 1})
        tensor, column = name + "weight", False
    else:
        tuned = make_base({"model.embed_tokens.weight": E + 1, "q.weight": E[:12] + 1}, folder="tuned")
        tensor, column = "model.embed_tokens.weight", False
    found = spectra.repair(tuned, base, to=out, scale=0.5, which={"embed": [0, 1]})
    assert [layer.name for layer in found.layers] == ["model.embed_tokens"]
    assert spectra.verify(out).holds
    weights = next(path for path in out.glob("*.safetensors"))
    tensors = load_file(weights)
    (tensors[tensor][:, 26:] if column else tensors[tensor][26:]).fill_(7)
    save_file(tensors, weights, metadata={"format": "pt"})
    edit_record(out, lambda value: value["output"].update(fingerprint_covers="headers"))
    check = spectra.verify(out)
    assert [layer.name for layer in check.failed] == ["model.embed_tokens"]
    if kind == "factors":
        with pytest.raises(SpectraError, match="old rank"):
            spectra.repair(tuned, base, scale=0.5, which={"embed": [0]}, keep_rank=True)


def test_a_trained_adapter_is_not_replaced(tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(FIXTURES / "lora-r16", mine)
    before = checksums(mine)
    with pytest.raises(SpectraError, match="no earlier result"):
        spectra.repair(FIXTURES / "lora-r1", BASE, to=mine, scale=0.7, force=True)
    assert checksums(mine) == before


def test_moved_together_it_is_still_found(tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(FIXTURES / "lora-r1", home / "tuned")
    shutil.copytree(BASE, home / "base")
    monkeypatch.chdir(home)
    spectra.repair("tuned", "base", to="out", scale=0.7)
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "moved")
    assert spectra.verify("moved/out").holds
    (tmp_path / "moved" / "tuned").rename(tmp_path / "elsewhere")
    with pytest.raises(SpectraError, match="say where it is"):
        spectra.verify("moved/out")
    assert spectra.verify("moved/out", source="elsewhere").holds


def test_what_is_said_of_the_error_covers_vectors_close_to_each_other(tmp_path, make_base, make_adapter):
    """From 1024 up vectors come from float32 products; the bound is on what these are off."""
    p, generator = 1100, torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
    s = torch.linspace(1, 0.1, p, dtype=torch.float64)
    s[:6] = torch.tensor([10, 9.999, 8, 7.9995, 6, 5])
    W0 = ((U * s) @ V.T).float()
    B, A = torch.randn(p, 1, generator=generator) * 1e-4, torch.randn(1, p, generator=generator) * 1e-2
    base, tuned = make_base({"q.weight": W0}), make_adapter({"q": (B, A)})
    for which in ([0], [2, 3], [3]):
        out = tmp_path / f"out{which}"
        found = spectra.repair(tuned, base, to=out, scale=0, which={"q": which})
        W1 = tuned_weights(base, tuned)["q.weight"]
        true = relative(tuned_weights(base, out)["q.weight"], formula(W1, dict.fromkeys(which, 0.0)))
        assert found.layers[0].weight_error is not None
        assert true <= found.layers[0].weight_error <= 2e-5
        assert true <= 1e-5


def test_weights_that_vanish(tmp_path, make_base, make_adapter, rng):
    """Zero weights, and weights of which nothing is left."""
    zero = np.zeros((5, 7), dtype=np.float32)
    B, A = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(2, 7)).astype(np.float32)
    base = make_base({"a.weight": zero, "b.weight": rng.normal(size=(5, 7)).astype(np.float32)})
    tuned = make_adapter({"a": (B * 0, A), "b": (B, A.copy())})
    found = spectra.repair(tuned, base, to=tmp_path / "none", scale=0.5, which={"a": [0]})
    assert spectra.verify(tmp_path / "none").holds
    assert found.layers[0].vectors[0].energy == 0
    found = spectra.repair(tuned, base, to=tmp_path / "gone", scale=0, which={"b": range(5)})
    assert [vector.index_after for vector in found.layers[0].vectors] == [None] * 5
    assert found.layers[0].weight_error is None
    assert spectra.verify(tmp_path / "gone").holds
    assert np.abs(tuned_weights(base, tmp_path / "gone")["b.weight"]).max() < 1e-6
    assert "gone" in spectra.to_text(found)


def test_what_half_precision_cannot_hold_is_said_of_the_layer(tmp_path, make_base, make_adapter, rng):
    B, A = rng.normal(size=(5, 1)), 1e12 * rng.normal(size=(1, 7))
    base = make_base({"a.weight": torch.full((5, 7), 6e4, dtype=torch.float16)})
    tuned = make_adapter({"a": (B, A)})
    with pytest.raises(SpectraError, match="a: float16 cannot hold"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=0.9, which={"a": [0]}, merged=True)
    with pytest.raises(SpectraError, match="a: float16 cannot hold"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=0.9, which={"a": [0]}, store_dtype="float16")


def test_numpy_numbers_are_numbers():
    which: Any = {"q_proj": np.arange(2), "k_proj": iter([np.int64(1)])}
    found = spectra.repair(FIXTURES / "lora-r1", BASE, scale=float(np.float32(0.5)), which=which)
    assert found.settings["which"] == {"q_proj": [0, 1], "k_proj": [1]}
    scale: Any = np.float32(0.5)
    assert spectra.repair(FIXTURES / "lora-r1", BASE, scale=scale).settings["scale"] == 0.5
    json.dumps(found.to_dict())
