"""The methods that are read through peft itself, a module at a time, against peft's merge of the whole model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft import itself, one_module, refused
from spectra.adapters.peft.methods import METHODS as NATIVE
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import open_checkpoint
from tests.support.paths import ROOT
from tests.support.peft_itself import METHODS
from tests.support.peft_methods import write
from tests.support.peft_models import DTYPES, OPTIONS, read_all, tiny_gpt2, write_lora
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402


def test_every_method_of_peft_is_read_or_refused_by_name():
    known = {*itself.METHODS, *NATIVE, "LORA", *refused.METHODS}
    assert known == set(peft.PeftType.__members__)
    assert set(METHODS) == {*itself.METHODS, *(method.label for method in itself.VARIANTS.values())}
    assert not set(itself.METHODS) & (set(NATIVE) | set(refused.METHODS))
    for method in itself.METHODS:
        assert not PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(method)].uses_shared_state, method


# A module by itself tells neither the size of VeRA's shared matrices, nor that a row of tokens is an embedding's, nor
# peft's MultiheadAttention; and a layer without a bias takes no bias of a LoRA.
NATIVE_MODULES = [
    *(("LORA", name) for name in OPTIONS if "attention" not in name and name != "lora bias"),
    *((method, method.lower()) for method in NATIVE if method not in ("VERA", "TRAINABLE_TOKENS")),
]


config_of = one_module.config_of


def config_of_one(values, module):
    """Without what of a native method's config is about other modules, which peft would look for in vain."""
    own, prefix = dict(values), f"{module}."
    if "feedforward_modules" in own:
        named = own["feedforward_modules"] or []
        matches = re.fullmatch(named, module) if isinstance(named, str) else module.split(".")[-1] in named
        own["feedforward_modules"] = [module] if matches else []
    if own["peft_type"] == "ADALORA" and own.get("rank_pattern"):
        own["rank_pattern"] = {key: kept for key, kept in own["rank_pattern"].items() if key.startswith(prefix)}
    return config_of(own, module)


@each_seed(range(6))
@pytest.mark.parametrize(("method", "name"), NATIVE_MODULES)
@pytest.mark.usefixtures("every_factor_of_boft")
def test_what_spectra_reads_by_itself_is_what_peft_merges(tmp_path, monkeypatch, method, name, seed):
    """The methods that Spectra knows, read through peft as well, a module at a time."""
    if method == "LORA":
        write_lora(tmp_path, name, seed)
        monkeypatch.setitem(itself.VARIANTS, "peft_type", itself._Method("LoRA"))
    else:
        write(tmp_path, name, seed)
        monkeypatch.setitem(itself.METHODS, method, itself._Method(method))
    monkeypatch.setattr(one_module, "config_of", config_of_one)
    plan = itself.PeftItself().plan(open_checkpoint(tmp_path / "adapter"))
    assert {update.kind for update in plan.updates} <= {"by_peft", "dense"}
    found, skipped = read_all(tmp_path / "base", tmp_path / "adapter")
    through, also_skipped = read_all(tmp_path / "base", tmp_path / "adapter", plan)
    assert found.keys() == through.keys()
    for name, (W1, layout) in found.items():
        expected, other = through[name]
        assert layout == other
        # What AdaLoRA pruned, peft makes anew in the precision of the base, into which it rounds what was stored.
        rounding = 1e-2 if method == "ADALORA" and DTYPES[seed % 4].itemsize == 2 else 1e-6
        assert torch.linalg.norm(W1 - expected) <= rounding * torch.linalg.norm(expected), name
    assert {item.name for item in skipped} >= {item.name for item in also_skipped}


def test_gpt2_with_its_square_transposed_weights(tmp_path):
    torch.manual_seed(0)
    net = tiny_gpt2()
    net.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, peft.HiraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"]))
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "adapter")
        report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
        before = {name: value.clone() for name, value in load_file(tmp_path / "base" / "model.safetensors").items()}
        after = model.merge_and_unload().state_dict()
    assert len(report.layers) == 2 * 4
    for layer in report.layers:
        name = next(name for name in after if name.endswith(f"{layer.name}.weight"))
        mine = next(value for key, value in before.items() if name.endswith(key) or key.endswith(name))
        change = (after[name] - mine).norm() / mine.norm()
        assert layer.measures["update_norm_relative"] == pytest.approx(float(change), rel=1e-3)


def edited(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("HIRA", {"use_hydra": True}, "the installed peft does not know the option use_hydra"),
        ("HIRA", {"r": 10**12}, "r = 1000000000000 in the config is more than the weight has entries"),
        ("HIRA", {"rank_pattern": {"query": 10**12}}, "rank_pattern = 1000000000000 in the config is more"),
        ("WAVEFT", {"proportional_parameters": True}, "spreads the update over all modules"),
        ("HIRA", {"r": 9, "rank_pattern": {}}, "peft cannot load the HiRA of layers.0"),
        ("C3A", {"block_size": "x", "block_size_pattern": {}}, "peft cannot load the C3A of layers.0"),
        ("MISS", {"r": -3}, "r = -3; expected a whole number"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(tmp_path, method, values, message):
    write(tmp_path, method, 0)
    edited(tmp_path / "adapter", **values)
    try:
        report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
    except (AdapterError, UnsupportedMethodError) as error:
        said = str(error)
    else:
        said = str(next(layer.error for layer in report.layers if layer.status == "failed"))
    assert message in said


@pytest.mark.parametrize("change", ["gone", "more", "cut"])
def test_tensors_that_do_not_fit(tmp_path, change):
    write(tmp_path, "HIRA", 0)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "query.hira_A" in name)
    if change == "gone":
        del tensors[name]
    elif change == "more":
        tensors[name.replace("hira_A", "hira_C")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
    failed = {layer.name: layer.error for layer in report.layers if layer.status == "failed"}
    (reason,) = failed.values()
    assert {"gone": "its partner", "more": "no place for", "cut": "size mismatch"}[change] in str(reason)
    assert report.coverage.failed == 1


def test_sizes_in_the_config_take_no_memory(tmp_path):
    """Nothing is made of the config's sizes before they are held against what is stored."""
    write(tmp_path, "HIRA", 0)
    edited(tmp_path / "adapter", r=1 << 20, rank_pattern={})
    code = (
        "import resource, spectra, sys; spectra.inspect(sys.argv[1], sys.argv[2])\n"
        "import peft, torch; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "spectra.audit(sys.argv[1], sys.argv[2], top_k=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "adapter"), str(tmp_path / "base")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, "KiB"


def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, "MISS", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedMethodError, match=r"MiSS is read through peft, which is not installed: .*\[peft\]"):
        plan_updates(open_checkpoint(tmp_path / "adapter"))


def test_the_global_generator_is_left_alone(tmp_path):
    write(tmp_path, "FOURIERFT", 0)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
    assert torch.equal(torch.rand(3), wanted)


def test_a_head_of_its_own_is_analysed_beside(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path, "SHIRA", 1)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("head.weight"))
    save_file(tensors | {name: torch.from_numpy(rng.normal(size=(4, 5)).astype(np.float32))}, file)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=2)
    assert {layer.update["kind"] for layer in report.layers} == {"by_peft", "dense"}
