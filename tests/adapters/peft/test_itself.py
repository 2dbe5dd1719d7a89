"""The methods that are read through peft itself, a module at a time, against peft's merge of the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft import itself, refused
from spectra.adapters.peft.methods import METHODS as NATIVE
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.records.report import json_schema
from spectra.render.inspection import render_inspection
from tests.support.paths import ROOT
from tests.support.peft_itself import METHODS, write
from tests.support.peft_methods import all_accounted_for
from tests.support.peft_models import DTYPES, check_against_merge, tiny_gpt2
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402

SEEDS = range(20)


@each_seed(SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_merge_of_the_whole_model(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    all_accounted_for(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def test_every_method_of_peft_is_read_or_refused_by_name():
    known = {*itself.METHODS, *NATIVE, "LORA", *refused.METHODS}
    assert known == set(peft.PeftType.__members__)
    assert set(METHODS) == {*itself.METHODS, *(method.label for method in itself.VARIANTS.values())}
    assert not set(itself.METHODS) & (set(NATIVE) | set(refused.METHODS))
    for method in itself.METHODS:
        assert not PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(method)].uses_shared_state, method


@pytest.mark.parametrize("method", METHODS)
def test_every_engine_and_every_form_of_output(tmp_path, method):
    write(tmp_path, method, 4)
    reports = [
        spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4, engine=engine)
        for engine in ("exact", "cached", "krylov")
    ]
    counts = [[(layer.status, layer.intruders) for layer in report.layers] for report in reports]
    assert counts[0] == counts[1] == counts[2]
    assert {status for status, _ in counts[0]} <= {"analysed", "unchanged"}
    jsonschema.validate(json.loads(reports[0].to_json()), json_schema())
    assert {layer.update["kind"] for layer in reports[0].layers} <= {"by_peft", "dense"}
    inspected = spectra.inspect(tmp_path / "adapter", tmp_path / "base")
    assert "as peft merges" in render_inspection([inspected])


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


@each_seed([seed for seed in range(4) if DTYPES[seed % 4] in (torch.float32, torch.float64)])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_copy_is_the_merge(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    with pytest.raises(UsageError, match="repair writes LoRA and DoRA"):
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0)
    if method in itself.METHODS and itself.METHODS[method].changes_bias:
        with pytest.raises(UsageError, match="changes biases as well"):
            spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0, merged=True)
        return
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0, merged=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.double().merge_and_unload().state_dict()
    assert expected.keys() == written.keys()
    for name, value in expected.items():
        assert torch.linalg.norm(written[name].double() - value) <= 1e-6 * torch.linalg.norm(value), name
    assert spectra.verify(tmp_path / "new").holds


def edited(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("HIRA", {"use_hydra": True}, "the installed peft does not know the option use_hydra"),
        ("HIRA", {"r": 10**12}, "r = 1000000000000; expected at most"),
        ("HIRA", {"rank_pattern": {"query": 10**12}}, "expected at most"),
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
