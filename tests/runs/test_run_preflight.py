"""Everything about a run that headers can tell is found out before the first tensor is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.cli import main
from spectra.files.checkpoint import Checkpoint

LAYERS, WIDTH, RANK = 4, 12, 2
LAST = f"layers.{LAYERS - 1}"


def base_tensors():
    return {f"layers.{i}.{name}.weight": torch.randn(WIDTH, WIDTH) for i in range(LAYERS) for name in ("q", "v")}


def adapter_tensors():
    found = {}
    for name in base_tensors():
        key = "base_model.model." + name.removesuffix("weight")
        found[key + "lora_A.weight"] = torch.randn(RANK, WIDTH)
        found[key + "lora_B.weight"] = torch.randn(WIDTH, RANK)
    return found


def write(folder, tensors, config=None):
    folder.mkdir()
    name = "model.safetensors" if config is None else "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def config(**values):
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, **values}


A, B = f"base_model.model.{LAST}.v.lora_A.weight", f"base_model.model.{LAST}.v.lora_B.weight"

# What is wrong with the last layer of an adapter or its base → what the message names.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "another width": ({A: torch.ones(RANK, WIDTH + 1)}, {}, {}, [A, "wrong base"]),
    "another rank": ({A: torch.ones(RANK + 1, WIDTH)}, {}, {}, [A, "r = 2"]),
    "a rank by pattern": ({}, {"rank_pattern": {f"{LAST}.v": 3}}, {}, [A, "r = 3"]),
    "integers": ({B: torch.ones(WIDTH, RANK, dtype=torch.int32)}, {}, {}, [B, "I32"]),
    "no partner": ({B: None}, {}, {}, [A, f"{LAST}.v.lora_B is missing"]),
    "no base weight": ({}, {}, {f"{LAST}.v.weight": None}, [A, "not in"]),
    "a base of another shape": ({}, {}, {f"{LAST}.v.weight": torch.ones(WIDTH, WIDTH + 2)}, [A, f"{LAST}.v.weight"]),
    "an unknown option": ({}, {"florp_config": {"x": 1}}, {}, ["florp_config"]),
    "magnitudes that are too few": (
        {f"base_model.model.{LAST}.v.lora_magnitude_vector": torch.ones(WIDTH - 1)},
        {"use_dora": True, "target_modules": ["v"]}, {}, ["lora_magnitude_vector"],
    ),
}  # fmt: skip


@pytest.fixture
def reads(monkeypatch):
    found: list[str] = []
    read = Checkpoint.read

    def noted(self, name, **how):
        found.append(name)
        return read(self, name, **how)

    monkeypatch.setattr(Checkpoint, "read", noted)
    return found


def changed(tensors, changes):
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


@pytest.mark.parametrize("what", ADAPTERS)
@pytest.mark.parametrize("command", ["audit", "compare", "ranks", "repair"])
def test_nothing_is_read_where_the_last_layer_is_wrong(tmp_path, reads, capsys, what, command):
    own, options, base, named = ADAPTERS[what]
    folder = write(tmp_path / "adapter", changed(adapter_tensors(), own), config(**options))
    model = write(tmp_path / "base", changed(base_tensors(), base))
    arguments = {
        "audit": [], "compare": [], "ranks": [], "repair": ["--scale", "0.5", "--to", str(tmp_path / "out")],
    }[command]  # fmt: skip
    assert main([command, str(folder), "--base", str(model), "--quiet", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("spectra: error:") == 1
    assert all(part in told for part in named), told
    assert reads == []
    assert not (tmp_path / "out").exists()


def test_full_checkpoints_too(tmp_path, reads):
    model = write(tmp_path / "base", base_tensors())
    tuned = write(tmp_path / "tuned", changed(base_tensors(), {f"{LAST}.v.weight": torch.ones(WIDTH, WIDTH + 2)}))
    with pytest.raises(spectra.SpectraError, match=rf"{LAST}\.v\.weight"):
        spectra.audit(tuned, model)
    assert reads == []


def test_all_fine_tunes_of_a_run_before_the_first(tmp_path, reads):
    """The last of several is looked at before the first is decomposed."""
    model = write(tmp_path / "base", base_tensors())
    right = write(tmp_path / "right", adapter_tensors(), config())
    wrong = write(tmp_path / "wrong", changed(adapter_tensors(), {A: torch.ones(RANK, WIDTH + 1)}), config())
    with pytest.raises(spectra.SpectraError, match="wrong base"):
        spectra.audit_many([right, wrong], base=model)
    with pytest.raises(spectra.SpectraError, match="wrong base"):
        spectra.compare([right, wrong], base=model)
    assert reads == []


def test_what_is_right_is_read(tmp_path, reads):
    """The counter-check: the same run without a fault does read."""
    model = write(tmp_path / "base", base_tensors())
    assert spectra.audit(write(tmp_path / "right", adapter_tensors(), config()), model).layers
    assert len(set(reads)) == 3 * 2 * LAYERS
