"""Folders of a training's shards, and whole models beside an adapter's config."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.cli import main
from spectra.errors import MissingFileError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.shards import shards_in


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    ("files", "what", "how"),
    [
        (["global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"], "DeepSpeed", "zero_to_fp32.py . OUT"),
        (["global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed", "zero_to_fp32.py . OUT"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed", "stage3_gather_16bit_weights_on_model_save"),
        (["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "verl", "verl.model_merger"),
        (["actor/model_world_size_8_rank_3.pt"], "verl", "verl.model_merger"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"], "DCP", "accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "DCP", "dcp_to_torch"),
        (["global_step5/mp_rank_00_model_states.pt"], "Megatron", "the converter of the project"),
    ],
)
def test_shards_say_what_makes_a_model_of_them(tmp_path, capsys, files, what, how, allow_pickle):
    for file in (*files, "training_args.bin", "trainer_state.json", "config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(MissingFileError, match="no weights here, only ") as refused:
        open_checkpoint(tmp_path, allow_pickle=allow_pickle)
    assert what in str(refused.value)
    assert how in str(refused.value)
    assert main(["audit", str(tmp_path), "--base", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_beside_shards_are_read(tmp_path):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_text("")
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert shards_in(tmp_path) is not None
    save_file({"a.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a.weight"]


def test_pickled_weights_beside_shards_are_read(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("")
    torch.save({"a.weight": torch.ones(3, 2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path, allow_pickle=True).tensors) == ["a.weight"]


def test_an_ordinary_folder_has_no_shards(tmp_path):
    for file in ("pytorch_model.bin", "optimizer.pt", "rng_state_0.pth", "notes.distcp.txt"):
        (tmp_path / file).write_text("")
    assert shards_in(tmp_path) is None


@pytest.fixture
def merged(make_base, rng):
    """A base, and the model that an adapter of it was merged into, in the folder where its config stayed."""
    tensors = {f"layers.{i}.q.weight": rng.normal(size=(20, 16)).astype("f4") for i in range(2)}
    base = make_base(tensors)
    tuned = make_base({name: value + np.outer(np.ones(20), np.ones(16)) for name, value in tensors.items()}, "tuned")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": None}
    (tuned / "adapter_config.json").write_text(json.dumps(config))
    return base, tuned


def test_a_merged_model_beside_a_stale_adapter_config(merged, capsys):
    base, tuned = merged
    report = spectra.audit(tuned, base)
    assert report.tuned["format"] == "full"
    assert [layer.name for layer in report] == ["layers.0.q", "layers.1.q"]
    assert {item["name"]: item["reason"] for item in report.skipped}["adapter_config.json"].endswith("was read")
    plain = spectra.audit(tuned / "model.safetensors", base)
    assert [layer.intruder_indices for layer in report] == [layer.intruder_indices for layer in plain]
    assert main(["inspect", str(tuned), "--base", str(base)]) == 0
    assert "adapter_config.json" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_beside_a_whole_model_is_what_is_audited(merged, weights):
    _, tuned = merged
    save_file(
        {
            "base_model.model.layers.0.q.lora_A.weight": torch.ones(4, 16),
            "base_model.model.layers.0.q.lora_B.weight": torch.ones(20, 4),
        },
        tuned / weights,
    )
    opened = open_checkpoint(tuned)
    assert opened.adapter_config is not None
    assert not opened.aside
    assert open_checkpoint(tuned, as_base=True).adapter_config is None
    assert not open_checkpoint(tuned, as_base=True).aside


def test_without_any_weights_the_adapter_is_missed(merged):
    _, tuned = merged
    (tuned / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="the adapter's weights are missing"):
        open_checkpoint(tuned)
