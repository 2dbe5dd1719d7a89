"""Raw state dicts: the whole model's, the adapter's name in its keys."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from tests.support.peft_folders import same_updates, save_raw, state
from tests.support.peft_methods import METHODS, all_accounted_for, write
from tests.support.peft_models import OPTIONS, Net, option, randomise, read_all
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peft's remarks on what is asked of it
    pytest.mark.usefixtures("every_factor_of_boft"),
]


@each_seed([0, 1, 2, 4])
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
