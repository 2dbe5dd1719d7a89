"""Fine-tunes and adapters of projections that share a matrix: analysed as stored, or split as the base is."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.adapters import formula_of, plan_updates, rescales_base
from spectra.cli import main
from spectra.errors import UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.fused import split_apart
from spectra.pairing.pairs import pair_layers
from spectra.tasks.inspect import inspect
from tests.support.fused_models import FAMILIES, FUSED, model_of, phi_like

SEEDS = range(20)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_fine_tunes_are_split_as_the_base_is(transformers, tmp_path, make_adapter, family):
    """Rows of B and of the tuned weight go with the rows of the base's."""
    for seed in SEEDS[:5]:
        rng = np.random.default_rng(seed)
        model = model_of(transformers, family, rng)
        base, full = tmp_path / f"base{seed}", tmp_path / f"full{seed}"
        model.save_pretrained(base)
        before = open_checkpoint(base)
        name = next(n for n in before.weights if n.split(".")[-2] in FUSED and n.endswith("weight"))
        turned = family == "gpt2"
        W0 = before.load(name)
        m, n = W0.shape[::-1] if turned else W0.shape
        B, A = rng.normal(size=(m, 2)), rng.normal(size=(2, n))
        dW = torch.from_numpy(B @ A)
        with torch.no_grad():
            fused = next(p for own, p in model.named_parameters() if own.split(".")[-2] in FUSED and own.endswith("ht"))
            fused += dW.T if turned else dW
        model.save_pretrained(full)
        adapter = make_adapter({name.removesuffix(".weight"): (B, A)}, folder=f"adapter{seed}", r=2, lora_alpha=2)
        expected: dict[str, torch.Tensor] = {}
        for kind, tuned_path in (("adapter", adapter), ("full", full)):
            split_base, tuned = split_apart(before, open_checkpoint(tuned_path))
            pairs = pair_layers(split_base, tuned, plan_updates(tuned)).pairs
            found = {
                pair.name.split(".")[-1]: pair for pair in pairs if pair.name.endswith(("q_proj", "k_proj", "v_proj"))
            }
            assert len(found) == 3
            for part, pair in found.items():
                W = pair.read_base(split_base, torch.float64, "cpu")
                W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W).dense()
                assert W1.shape == pair.shape
                delta = W1 - W
                assert (delta - expected.setdefault(part, delta)).norm() <= 1e-9 * delta.norm(), kind
        total = sum(float(delta.norm() ** 2) for delta in expected.values())
        assert total == pytest.approx(float(dW.norm() ** 2), rel=1e-9)


def test_dora_and_magnitudes_go_by_rows(rng, make_base, make_adapter):
    base = phi_like(rng, "base", make_base)
    module = "model.layers.0.self_attn.qkv_proj"
    B, A, m = rng.normal(size=(16, 2)), rng.normal(size=(2, 8)), rng.uniform(1, 2, size=16)
    extra = {f"base_model.model.{module}.lora_magnitude_vector": m}
    adapter = make_adapter({module: (B, A)}, extra=extra, use_dora=True)
    opened, tuned = open_checkpoint(base), open_checkpoint(adapter)
    whole = pair_layers(opened, tuned, plan_updates(tuned)).pairs[0]
    W0 = whole.read_base(opened, torch.float64, "cpu")
    W1 = whole.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
    split, tuned = split_apart(opened, tuned)
    parts = []
    for pair in pair_layers(split, tuned, plan_updates(tuned)).pairs:
        W = pair.read_base(split, torch.float64, "cpu")
        parts.append((pair.name.split(".")[-1], pair.read_update(tuned, torch.float64, "cpu").tuned(W).dense()))
    together = dict(parts)
    assert torch.allclose(torch.cat([together[f"{p}_proj"] for p in "qkv"]), W1, rtol=1e-12)


def test_split_and_fused_are_never_compared_silently(rng, make_base, make_adapter):
    base = phi_like(rng, "base", make_base)
    q = {"model.layers.0.self_attn.q_proj": (rng.normal(size=(8, 1)), rng.normal(size=(1, 8)))}
    with pytest.raises(WrongBaseError, match=r"together with others in 'model.*qkv_proj.weight'.*audit.*--split-fused"):
        spectra.audit(make_adapter(q), base=base)
    report = spectra.audit(make_adapter(q), base=base, split_fused=True)
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn.q_proj"]
    assert report.settings["split_fused"] is True
    assert "rows 0:8 of model.layers.0.self_attn.qkv_proj.weight" in " ".join(report.layers[0].notes)
    names = {f"model.layers.0.self_attn.{p}_proj.weight": (8, 8) if p == "q" else (4, 8) for p in "qkv"}
    names |= {f"model.layers.0.mlp.{p}_proj.weight": (6, 8) for p in ("gate", "up")}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    arrays["model.layers.0.mlp.down_proj.weight"] = rng.normal(size=(8, 6)).astype(np.float32)
    apart = make_base(arrays, folder="apart", config={"model_type": "llama"})
    with pytest.raises(WrongBaseError, match=r"only 1 of its 6 matrices.*together with others.*--split-fused"):
        spectra.audit(apart, base=base)
    assert len(spectra.audit(apart, base=base, split_fused=True).layers) == 6
    with pytest.raises(WrongBaseError, match=r"only 1 of its 3 matrices.*apart, as.*--split-fused"):
        spectra.audit(base, base=apart)
    assert len(spectra.audit(base, base=apart, split_fused=True).layers) == 6


def test_by_default_the_stored_matrix_is_analysed(rng, make_base):
    base = phi_like(rng, "base", make_base)
    report = spectra.audit(phi_like(rng, "tuned", make_base), base=base)
    assert [layer.name.split(".")[-1] for layer in report.layers] == ["down_proj", "gate_up_proj", "qkv_proj"]
    assert "split_fused" not in report.settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": None}, "does not give model_type"),
        ({"model_type": ["phi3"]}, "does not give model_type"),
        ({"text_config": {"model_type": {}}}, "does not give model_type"),
        ({"model_type": "mine"}, "_proj is ordered is not known of model_type 'mine'"),
        ({"num_key_value_heads": None}, "does not give num_key_value_heads"),
        ({"num_attention_heads": None}, "does not give num_attention_heads"),
        ({"hidden_size": None}, "does not give hidden_size"),
        ({"num_attention_heads": "4"}, "num_attention_heads = '4', where a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads = 'True', where a whole number"),
        ({"num_key_value_heads": 4}, "by config.json it has 24 rows, not 16"),
        ({"num_attention_heads": 3}, "8 hidden dimensions and 3 heads"),
    ],
)
def test_what_cannot_be_told_names_the_field(rng, make_base, make_adapter, config, says, capsys):
    base = phi_like(rng, "base", make_base, **config)
    module = "model.layers.0.self_attn.qkv_proj"
    adapter = make_adapter({module: (rng.normal(size=(16, 1)), rng.normal(size=(1, 8)))})
    with pytest.raises(UsageError, match="--split-fused cannot tell") as error:
        spectra.audit(adapter, base=base, split_fused=True)
    assert says in str(error.value)
    assert "_proj.weight" in str(error.value)
    assert main(["audit", str(adapter), "--base", str(base), "--split-fused", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_methods_without_rows_are_refused(rng, make_base, make_adapter, tmp_path):
    base = phi_like(rng, "base", make_base)
    module = "base_model.model.model.layers.0.self_attn.qkv_proj"
    extra = {f"{module}.lokr_w1": rng.normal(size=(2, 2)), f"{module}.lokr_w2": rng.normal(size=(8, 4))}
    adapter = make_adapter({}, extra=extra, peft_type="LOKR", r=4, alpha=4, lora_alpha=None)
    assert len(spectra.audit(adapter, base=base).layers) == 1
    with pytest.raises(UnsupportedMethodError, match=r"--split-fused cannot split the update of 'model\.layers\.0"):
        spectra.audit(adapter, base=base, split_fused=True)


def lycoris_dora(rng, folder, on_out):
    """A LoHa below DoRA of the fused projection, as LyCORIS writes it."""
    shapes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}
    shapes["dora_scale"] = (16, 1) if on_out else (1, 8)
    stored = {"alpha": torch.tensor(6.0, dtype=torch.float64)}  # before the factors, by its name
    stored |= {name: torch.from_numpy(rng.uniform(0.5, 2, size=shape)) for name, shape in shapes.items()}
    module = "lycoris_model_layers_0_self_attn_qkv_proj"
    save_file({f"{module}.{name}": value for name, value in stored.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def test_dora_of_any_change_goes_by_rows(rng, make_base, tmp_path):
    opened = open_checkpoint(phi_like(rng, "base", make_base))
    tuned = open_checkpoint(lycoris_dora(rng, tmp_path, True))
    (whole,) = pair_layers(opened, tuned, plan_updates(tuned)).pairs
    W0 = whole.read_base(opened, torch.float64, "cpu")
    W1 = whole.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
    split, tuned = split_apart(opened, tuned)
    parts = {}
    for pair in pair_layers(split, tuned, plan_updates(tuned)).pairs:
        W = pair.read_base(split, torch.float64, "cpu")
        parts[pair.name.split(".")[-1]] = pair.read_update(tuned, torch.float64, "cpu").tuned(W).dense()
        assert rescales_base(pair.update)
        assert formula_of(pair.update) == formula_of(whole.update)
    assert torch.allclose(torch.cat([parts[f"{p}_proj"] for p in "qkv"]), W1, rtol=1e-12)
    assert not torch.allclose(W1, W0, rtol=0.1)


def test_dora_by_columns_is_refused_before_anything_is_read(rng, make_base, tmp_path):
    base, adapter = phi_like(rng, "base", make_base), lycoris_dora(rng, tmp_path, False)
    assert len(spectra.audit(adapter, base=base).layers) == 1
    with pytest.raises(UnsupportedMethodError, match=r"cannot split the update of .*hadamard, DoRA by column"):
        spectra.audit(adapter, base=base, split_fused=True)


def test_messages_name_a_factor_rather_than_the_alpha(rng, make_base, tmp_path):
    adapter = lycoris_dora(rng, tmp_path, True)
    (update,) = plan_updates(open_checkpoint(adapter)).updates
    assert not update.tensors[0].endswith("alpha")
    assert update.tensors[-1].endswith("alpha")


def test_torch_attention_is_split_in_thirds(rng, make_base, make_adapter):
    base = make_base({"layers.0.attn.in_proj_weight": rng.normal(size=(12, 4))})
    B, A = rng.normal(size=(12, 1)), rng.normal(size=(1, 4))
    tuned = open_checkpoint(make_adapter({"layers.0.attn": (B, A)}, lora_alpha=1))
    split, tuned = split_apart(open_checkpoint(base), tuned)
    pairs = pair_layers(split, tuned, plan_updates(tuned)).pairs
    assert [pair.name for pair in pairs] == [f"layers.0.attn.{p}_proj" for p in "kqv"]
    for pair in pairs:
        W0 = pair.read_base(split, torch.float64, "cpu")
        at = 4 * "qkv".index(pair.name[-6])
        delta = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense() - W0
        assert np.allclose(delta, (B @ A)[at : at + 4], rtol=1e-9)


def test_a_partly_tuned_matrix_is_unchanged_and_changed(rng, make_base):
    base = phi_like(rng, "base", make_base)
    values = open_checkpoint(base)
    tensors = {name: values.read(name).clone() for name in values.tensors}
    tensors["model.layers.0.self_attn.qkv_proj.weight"][8:12] += 0.1
    tuned = make_base(tensors, folder="tuned", config=json.loads((base / "config.json").read_text()))
    report = spectra.audit(tuned, base=base, split_fused=True)
    changed = {layer.name.split(".")[-1] for layer in report.layers if layer.status != "unchanged"}
    assert changed == {"k_proj"}
    assert len(report.layers) == 6
    assert {
        layer.name.split(".")[-1] for layer in spectra.audit(tuned, base=base).layers if layer.status != "unchanged"
    } == {"qkv_proj"}


def test_the_command_line_splits(rng, make_base, capsys, tmp_path):
    base, tuned = phi_like(rng, "base", make_base), phi_like(rng, "tuned", make_base)
    for command in (["audit"], ["ranks"], ["compare"], ["inspect"]):
        tail = [str(tuned)] * (2 if command == ["compare"] else 1)
        if command == ["compare"]:
            shutil.copytree(tuned, tmp_path / "again")
            tail = [str(tuned), str(tmp_path / "again")]
        options = ["--base", str(base), "--split-fused", "--format", "json"] + ["--quiet"] * (command != ["inspect"])
        assert main([*command, *tail, *options]) == 0
        text = capsys.readouterr().out
        json.loads(text)
        assert "self_attn.q_proj" in text
        assert "mlp.up_proj" in text
    with pytest.raises(SystemExit):  # factors are written for modules as the model has them, not for parts of them
        main(["extract", str(tuned), "--base", str(base), "--split-fused", "--to", str(tmp_path / "x")])


def test_what_is_left_out_need_not_be_known(rng, make_base):
    """One matrix of unknown order ends no run: what is left out of it is not asked about, the rest is skipped."""
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": rng.normal(size=(16, 8)),
        "model.layers.0.mixer.Wqkv.weight": rng.normal(size=(24, 8)),
    }
    config = {"model_type": "phi3", "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = make_base(tensors, config=config)
    tuned = make_base({name: value + 0.1 for name, value in tensors.items()}, "tuned", config=config)
    report = spectra.audit(tuned, base=base, split_fused=True)
    assert [layer.name.split(".")[-1] for layer in report.layers] == ["k_proj", "q_proj", "v_proj"]
    (skipped,) = report.skipped
    assert skipped["name"] == "model.layers.0.mixer.Wqkv"
    assert "how Wqkv is ordered is not known of model_type 'phi3'" in skipped["reason"]


def test_inspect_lists_what_an_audit_would_split(rng, make_base, make_adapter):
    base = phi_like(rng, "base", make_base)
    module = "model.layers.0.self_attn.qkv_proj"
    adapter = make_adapter({module: (rng.normal(size=(16, 1)), rng.normal(size=(1, 8)))})
    found = inspect(adapter, base=base, split_fused=True)
    assert {update["module"].rpartition(".")[2]: update["base_tensor"] for update in found.updates} == {
        f"{part}_proj": f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"
    }
