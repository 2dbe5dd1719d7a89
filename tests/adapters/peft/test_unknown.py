"""What an adapter holds beside the factors of its method and is not understood is refused by name."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft.unknown import PREFIXES
from spectra.cli import main
from spectra.errors import CorruptFileError, SpectraError, UnsupportedMethodError
from spectra.files.checkpoint import open_checkpoint
from tests.support.peft_methods import METHODS, write
from tests.support.peft_models import randomise, tiny_llama

peft = pytest.importorskip("peft")

Q = "base_model.model.q"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(make_base, make_adapter, rng):
    """A LoRA on q and k, and its base; with more tensors."""
    base = make_base({name: rng.normal(size=(12, 10)).astype("f4") for name in ("q.weight", "k.weight", "v.weight")})

    def make(extra, **config):
        B, A = rng.normal(size=(12, 2)).astype("f4"), rng.normal(size=(2, 10)).astype("f4")
        return base, make_adapter({"q": (B, A), "k": (B * 2, A.copy())}, extra=extra, **config)

    return make


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{Q}_lora_latent_mapping.weight", "named as one of an adapter method"),  # LoRA-XS
        (f"{Q}.default_lora_latent_mapping.weight", "named as one of an adapter method"),
        (f"{Q}.lora_route.weight", "named as one of an adapter method"),  # MoE-LoRA
        (f"{Q}.lora_C.weight", "named as one of an adapter method"),
        (f"{Q}.hada_w1_a", "named as one of an adapter method"),
        (f"{Q}.gate", "lies in q, which has factors of LoRA"),
        (f"{Q}.mask", "lies in q, which has factors of LoRA"),
        (f"{Q}.scale.weight", "lies in q, which has factors of LoRA"),
        (f"{Q}.router.experts.0.weight", "lies in q, which has factors of LoRA"),
        ("base_model.model.z.lora_router", "named as one of an adapter method"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 2), (12, 10), (3,), ()])
def test_what_could_change_an_update_is_never_left_out(adapter, capsys, name, words, shape):
    base, folder = adapter({name: np.ones(shape, "f4")})
    with pytest.raises(SpectraError) as refused:
        plan_updates(open_checkpoint(folder))
    assert name in str(refused.value)
    assert words in str(refused.value) or "belongs to" in str(refused.value)
    for command in ("audit", "ranks", "inspect"):
        assert main([command, str(folder), *(["--base", str(base)] if command != "inspect" else [str(base)])]) == 2
        err = capsys.readouterr().err
        assert name in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("all_of_them", [True, False])
def test_an_adapter_that_was_called_lora(adapter, rng, all_of_them):
    names = ("v", "q", "k") if all_of_them else ("v",)
    extra = {f"base_model.model.{name}_A.weight": rng.normal(size=(2, 10)).astype("f4") for name in names}
    extra |= {f"base_model.model.{name}_B.weight": rng.normal(size=(12, 2)).astype("f4") for name in names}
    _, folder = adapter(extra)
    if all_of_them:
        state = {name: value for name, value in load_file(folder / WEIGHTS).items() if ".lora_" not in name}
        save_file(state, folder / WEIGHTS)
    with pytest.raises(UnsupportedMethodError, match=r"an adapter that is called 'lora' is saved so.*'….lora_A'"):
        plan_updates(open_checkpoint(folder))


@pytest.mark.parametrize(
    "extra",
    [
        {"base_model.model.score.weight": (5, 10)},  # a new head
        {"base_model.model.classifier.dense.weight": (5, 10), "base_model.model.classifier.dense.bias": (5,)},
        {f"{Q}.bias": (12,)},  # bias="lora_only"
        {f"{Q}.lora_B.bias": (12,)},
        {f"{Q}.base_layer.weight": (12, 10)},
        {"base_model.model.v.modules_to_save.weight": (12, 10)},
        {"base_model.model.norm_A.weight": (10,)},  # without a B it is only a name
        {"base_model.model.qq.gate": (3,)},  # another module's
        {"base_model.model.flora_field.weight": (5, 10), "base_model.model.explora.weight": (4, 4)},
    ],
)
def test_what_a_model_may_have_of_its_own_is_understood(adapter, extra):
    base, folder = adapter({name: np.ones(shape, "f4") for name, shape in extra.items()})
    report = spectra.audit(folder, base)
    assert {"q", "k"} <= {layer.name for layer in report}


@pytest.mark.usefixtures("every_factor_of_boft")
@pytest.mark.parametrize("method", METHODS)
def test_one_unknown_tensor_in_every_method(tmp_path, rng, method):
    write(tmp_path, method, 0)
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    plan_updates(open_checkpoint(tmp_path / "adapter"))
    factors = [name for name in state if any(f".{prefix}_" in name for prefix in PREFIXES) and "_delta" not in name]
    inside = [name for name in factors if name.removeprefix("base_model.").count(".") > 1]
    for name in rng.choice(inside, size=3):
        module = name[: min(name.index(f".{prefix}_") for prefix in PREFIXES if f".{prefix}_" in name)]
        for new in (f"{module}.gate", f"{module}.extra.weight", f"{module}.default_lora_core.weight"):
            save_file({**state, new: torch.ones(2, 2)}, tmp_path / "adapter" / WEIGHTS)
            with pytest.raises(UnsupportedMethodError, match=r"nothing was analysed|belongs to") as refused:
                plan_updates(open_checkpoint(tmp_path / "adapter"))
            assert new in str(refused.value)


def test_in_memory():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model, 0)
    spectra.inspect(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.default_lora_latent_mapping = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(UnsupportedMethodError, match=r"default_lora_latent_mapping.*nothing was analysed"):
        spectra.audit(model)


@pytest.mark.parametrize("shape", [(0,), (0, 10), (12, 0)])
@pytest.mark.parametrize("saved", [True, False])
def test_saved_modules_without_values(adapter, capsys, shape, saved):
    name = f"base_model.model.v{'.modules_to_save' if saved else ''}.weight"
    base, folder = adapter({name: np.ones(shape, "f4")})
    with pytest.raises(CorruptFileError, match=r"has no values.*saved incompletely.*zero_to_fp32.py"):
        spectra.audit(folder, base)
    assert main(["audit", str(folder), "--base", str(base), "--include", "q"]) == 2, "nor where it is not looked at"
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(0,), (0, 10)])
def test_a_whole_checkpoint_without_some_values(make_base, rng, shape):
    tensors = {name: rng.normal(size=(12, 10)).astype("f4") for name in ("q.weight", "k.weight")}
    base = make_base(tensors)
    tuned = make_base({**tensors, "k.weight": np.ones(shape, "f4")}, folder="tuned")
    with pytest.raises(CorruptFileError, match=r"tensor 'k.weight': has no values \(shape \[0"):
        spectra.audit(tuned, base)


def test_integers_without_values_are_no_weights(make_base, rng):
    tensors = {"q.weight": rng.normal(size=(12, 10)).astype("f4")}
    base = make_base(tensors)
    tuned = make_base({"q.weight": tensors["q.weight"] + 1, "g_idx": np.zeros(0, "i4")}, folder="tuned")
    assert [layer.name for layer in spectra.audit(tuned, base)] == ["q"]
    assert json.loads(spectra.audit(tuned, base).to_json())["skipped"]
