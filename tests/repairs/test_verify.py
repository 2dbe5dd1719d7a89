"""Checks of a repair: what is not as recorded is found."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
from safetensors.torch import load_file, save_file

import spectra
from spectra.errors import SpectraError
from tests.support.paths import FIXTURES
from tests.support.repaired import BASE, edit_record


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what we ask of it
        yield


def test_a_check_finds_what_is_not_as_recorded(tmp_path):
    out = tmp_path / "out"
    spectra.repair(FIXTURES / "lora-r4", BASE, to=out, scale=0.5)
    assert spectra.verify(out).holds
    weights = out / "adapter_model.safetensors"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    changed = sorted(name for name in tensors if "lora_B" in name)

    def check(**edits):
        save_file({**tensors, **edits}, weights, metadata={"format": "pt"})
        found = spectra.verify(out)
        weights.write_bytes(kept)
        return found

    for name in (changed[0], changed[-1]):
        found = check(**{name: tensors[name] * 1.001})
        assert not found.holds
        assert [layer.name for layer in found.failed] == [name.removeprefix("base_model.model.").partition(".lora_")[0]]
    config = out / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "lora_dropout": 0.5}))
    assert "lora_dropout" in spectra.verify(out).problems[0]
    config.write_text(before)
    assert spectra.verify(out).holds
    other = tmp_path / "other"
    shutil.copytree(FIXTURES / "lora-r4", other)
    assert spectra.verify(out, source=other).holds
    source = load_file(other / "adapter_model.safetensors")
    name = next(iter(source))
    source[name] = source[name] + 0.01
    save_file(source, other / "adapter_model.safetensors", metadata={"format": "pt"})
    found = spectra.verify(out, source=other)
    assert not found.holds
    assert any("other values" in problem for problem in found.problems)
    with pytest.raises(SpectraError, match="nowhere"):
        spectra.verify(out, tmp_path / "nowhere", source=FIXTURES / "lora-r4")
    with pytest.raises(SpectraError, match=r"spectra-repair\.json"):
        spectra.verify(FIXTURES / "lora-r4")


RECORDS = {
    "a singular value": lambda value: value["layers"][0]["vectors"][0].update(sigma=99.0),
    "what it got": lambda value: value["layers"][0]["vectors"][0].update(scale_achieved=0.1),
    "the scale in the settings": lambda value: value["settings"].update(scale=0.1),
    "merged": lambda value: value["settings"].update(merged=True),
    "the result's fingerprint": lambda value: value["output"].update(fingerprint="sha256:0"),
    "the source's fingerprint": lambda value: value["source"].update(fingerprint="sha256:0"),
    "the base's headers": lambda value: value["base"].update(fingerprint_headers="sha256:0"),
    "another layer": lambda value: value["layers"].append({**value["layers"][0], "name": "nosuch"}),
    "a layer less": lambda value: value["layers"].pop(),
    "another index": lambda value: value["layers"][0]["vectors"][0].update(index=7),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_says_otherwise_does_not_hold(tmp_path, what):
    out = tmp_path / "out"
    spectra.repair(FIXTURES / "lora-r1", BASE, to=out, scale=0.7)
    edit_record(out, RECORDS[what])
    assert not spectra.verify(out).holds


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["layers"][0].update(vectors=[]),
        lambda value: value["layers"][0]["vectors"][0].update(index="a"),
        lambda value: value["layers"][0]["vectors"][0].update(index=-1),
        lambda value: value["layers"][0]["vectors"][0].update(scale=-1),
        lambda value: value["layers"][0].update(name=3),
        lambda value: value.pop("source"),
        lambda value: value.update(schema="other"),
    ],
)
def test_a_damaged_record_is_an_error(tmp_path, change):
    out = tmp_path / "out"
    spectra.repair(FIXTURES / "lora-r1", BASE, to=out, scale=0.7)
    edit_record(out, change)
    with pytest.raises(SpectraError, match=r"spectra-repair\.json"):
        spectra.verify(out)


def test_untouched_tensors_must_be_the_same_to_the_bit(tmp_path):
    for member in ("lora-r4", "full"):
        out = tmp_path / member
        found = spectra.repair(FIXTURES / member, BASE, to=out, scale=0.5)
        changed = {layer.name for layer in found.layers}
        weights = out / ("adapter_model.safetensors" if member == "lora-r4" else "model.safetensors")
        tensors = load_file(weights)
        for part in ("lora_A.weight" if member == "lora-r4" else "proj.weight", "norm.weight", "score.weight"):
            names = [n for n in tensors if n.endswith(part) and not any(layer in n for layer in changed)]
            if not names:
                continue
            value = tensors[names[0]].clone()
            value.view(-1)[0] *= 1 + 1e-6
            save_file({**tensors, names[0]: value}, weights, metadata={"format": "pt"})
            check = spectra.verify(out)
            assert not check.holds, names[0]
            assert any(layer.name in names[0] for layer in check.failed) or any(
                names[0] in problem for problem in check.problems
            )


def test_files_beside_the_weights_must_be_the_same(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "lora-r1", source)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_own.py").write_text("")
    out = tmp_path / "out"
    spectra.repair(source, BASE, to=out, scale=0.7)
    (out / "README.md").write_text("the card is its owner's to edit")
    assert spectra.verify(out).holds
    for name, text in (
        ("tokenizer.json", "{} "),
        ("modeling_own.py", "import os"),
        ("added.bin", ""),
        ("config.json", "{}"),
    ):
        before = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_text(text)
        problems = spectra.verify(out).problems
        assert len(problems) == 1
        assert name in problems[0]
        (out / name).unlink() if before is None else (out / name).write_bytes(before)
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in spectra.verify(out).problems[0]


def test_a_merge_that_was_not_repaired_does_not_hold(tmp_path, headless):
    """However small the change is beside what the base's half precision rounds."""
    for scale in (0.5, 0.99):
        out, plain = tmp_path / f"out{scale}", tmp_path / f"plain{scale}"
        spectra.repair(headless, BASE, to=out, scale=scale, merged=True)
        spectra.repair(headless, BASE, to=plain, scale=1, merged=True)
        assert spectra.verify(out).holds
        shutil.copy(plain / "model.safetensors", out / "model.safetensors")
        assert not spectra.verify(out).holds
        shutil.copy(BASE / "model.safetensors", out / "model.safetensors")
        assert not spectra.verify(out).holds
