"""Adapter folders as they are written: what goes along whole, and whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectra.adapters.peft.writing import check_folder, whole_modules, write_adapter
from spectra.errors import ConvergenceError, UsageError
from spectra.files.checkpoint import open_checkpoint

# What goes along whole


def test_norms_heads_and_embeddings_go_along_whole():
    names = [
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.q_proj.weight", "score.weight", "score.bias",
        "model.layers.0.norm.weight", "model.layers.1.norm.weight",
    ]  # fmt: skip
    changed = ["score.weight", "model.layers.0.norm.weight", "model.embed_tokens.weight"]
    found = whole_modules(changed, names, ["model.layers.0.q_proj"])
    assert found.modules == ("score", "model.layers.0.norm", "model.embed_tokens")
    assert found.keys == {
        f"base_model.model.{name}": name
        for name in names
        if name in changed or name == "score.bias"  # a module is saved with all it has
    }
    assert not found.biases
    assert not found.refused


def test_biases_of_targets_need_no_module_of_their_own():
    found = whole_modules(["a.q.bias"], ["a.q.bias", "a.q.weight"], ["a.q"])
    assert found.keys == {"base_model.model.a.q.base_layer.bias": "a.q.bias"}
    assert found.biases
    assert found.modules == ()


def test_what_would_take_a_layer_from_its_factors_is_refused():
    names = ["scale", "a.gate", "a.q.weight", "a.q.extra", "b.norm.weight", "c.a.q.weight"]
    found = whole_modules(["scale", "a.gate", "a.q.extra", "b.norm.weight"], names, ["a.q"])
    assert set(found.refused) == {"scale", "a.gate", "a.q.extra"}
    assert found.modules == ("b.norm",)
    # peft saves every module whose name only ends alike, and adapts none whose name has it inside
    for saved, target in [("q", "layers.0.seq"), ("a", "model.a.q"), ("layers.0", "model.layers.0.q")]:
        assert whole_modules([f"{saved}.weight"], [f"{saved}.weight"], [target]).refused
        assert whole_modules([f"z{saved}.weight"], [f"z{saved}.weight"], [target]).modules == (f"z{saved}",)


# Writing


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
TENSORS = {
    "base_model.model.q.lora_A.weight": torch.ones(2, 4),
    "base_model.model.q.lora_B.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
}


def write(folder, **changes):
    return write_adapter(folder, **{"config": CONFIG, "tensors": TENSORS.items(), **changes})


def test_a_folder_is_written(tmp_path):
    home = write(
        tmp_path / "deep" / "out", remarks=["It loses 3%."], config=CONFIG | {"base_model_name_or_path": 'a"b'}
    )
    assert sorted(path.name for path in home.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(path.name for path in home.parent.iterdir()) == ["out"]
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 2
    stored = load_file(home / "adapter_model.safetensors")
    for name, value in TENSORS.items():
        torch.testing.assert_close(stored[name], torch.as_tensor(value), rtol=0, atol=0)
    card = (home / "README.md").read_text()
    assert card.startswith('---\nbase_model: "a\\"b"\nlibrary_name: peft\n')
    assert "It loses 3%." in card
    assert (open_checkpoint(home).adapter_config or {})["lora_alpha"] == 4


def test_one_value_under_two_names(tmp_path):
    value = torch.ones(2, 3)
    home = write(tmp_path / "out", tensors=[("a", value), ("b", value), ("c", value[:1])])
    assert {name: tuple(item.shape) for name, item in load_file(home / "adapter_model.safetensors").items()} == {
        "a": (2, 3),
        "b": (2, 3),
        "c": (1, 3),
    }


def test_nothing_is_overwritten(tmp_path):
    home = write(tmp_path / "out")
    before = (home / "adapter_config.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write(home, config=CONFIG | {"r": 3})
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("x")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "model", "link", "dangling"):
        for force in (False, True):
            with pytest.raises(UsageError, match="not overwritten"):
                write(tmp_path / name, force=force)
    (home / "checkpoint-100").mkdir()
    with pytest.raises(UsageError, match="holds more than an adapter"):
        check_folder(home, force=True)
    assert (home / "adapter_config.json").read_bytes() == before
    (home / "checkpoint-100").rmdir()
    write(home, config=CONFIG | {"r": 3}, force=True)
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link", "model", "out"]


def test_a_failure_leaves_nothing_behind_and_nothing_gone(tmp_path, monkeypatch):
    def interrupted():
        yield next(iter(TENSORS.items()))
        raise ConvergenceError("no")

    home = tmp_path / "out"
    with pytest.raises(ConvergenceError):
        write(home, tensors=interrupted())
    with pytest.raises(UsageError, match="'a' was given twice"):
        write(home, tensors=[("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(UsageError, match="without tensors"):
        write(home, tensors=[])
    with pytest.raises(ValueError, match="JSON compliant"):
        write(home, config=CONFIG | {"lora_alpha": float("nan")})
    assert list(tmp_path.iterdir()) == []

    write(home)
    rename = type(home).rename

    def failing(self, target):
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(home), "rename", failing)
    with pytest.raises(UsageError, match="out: could not be written: No space left"):
        write(home, config=CONFIG | {"r": 3}, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 2
