"""Weights in the folder of a checkpoint besides those that were read."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.files.beside import EARLIER, OTHER, SAME, TRAINED, UNKNOWN, beside
from spectra.files.checkpoint import open_checkpoint


@pytest.fixture
def adapter(make_adapter):
    return make_adapter({"q": (np.ones((4, 1), "f4"), np.ones((1, 4), "f4"))})


@pytest.mark.parametrize(
    ("name", "reason", "trained"),
    [
        ("non_lora_trainables.bin", TRAINED, True),
        ("trainable_params.bin", TRAINED, True),
        ("mm_projector.bin", TRAINED, True),
        ("mm_projector.fp16.safetensors", TRAINED, True),
        ("v_head.safetensors", TRAINED, True),
        ("new_embeddings.safetensors", TRAINED, True),
        ("unheard_of.safetensors", UNKNOWN, True),
        ("unheard_of.ckpt", UNKNOWN, True),
        ("adapter_model.bin", SAME, False),
        ("pytorch_model-00001-of-00002.bin", SAME, False),
        ("0000100_adapters.safetensors", SAME, False),
        ("consolidated.00.pth", SAME, False),
    ],
)
def test_a_file_beside_an_adapter(adapter, name, reason, trained):
    (adapter / name).write_bytes(b"x")
    (found,) = beside(open_checkpoint(adapter), adapter=True)
    assert (found.name, found.reason, found.trained) == (name, reason, trained)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_3.pth", "training_args.bin", "README.md"])
def test_a_trainers_state_and_texts_are_no_weights(adapter, name):
    (adapter / name).write_bytes(b"x")
    assert beside(open_checkpoint(adapter), adapter=True) == ()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("checkpoint-20", EARLIER), ("global_step100", EARLIER), ("epoch_3", EARLIER), ("original", OTHER)],
)
def test_a_folder_beside_an_adapter(adapter, folder, reason):
    (adapter / folder).mkdir()
    assert beside(open_checkpoint(adapter), adapter=True) == (), "it holds no weights"
    (adapter / folder / "model.safetensors").write_bytes(b"x")
    (found,) = beside(open_checkpoint(adapter), adapter=True)
    assert (found.name, found.reason, found.trained) == (f"{folder}/", reason, False)


def test_beside_a_whole_model_an_unknown_file_is_another(make_base):
    home = make_base({"q.weight": np.ones((4, 4), "f4")})
    (home / "unheard_of.safetensors").write_bytes(b"x")
    (home / "value_head.bin").write_bytes(b"x")
    found = {item.name: item.trained for item in beside(open_checkpoint(home), adapter=False)}
    assert found == {"unheard_of.safetensors": False, "value_head.bin": True}
    assert beside(open_checkpoint(home / "model.safetensors"), adapter=False) == (), "one file was named"
