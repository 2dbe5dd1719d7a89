"""A model and a random LoRA of it in folders: written, opened by us, and loaded by peft."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers
from tests.support.peft_models import randomise

peft = pytest.importorskip("peft")


def adapted(home, model, seed=0, **options):
    """Saves ``model`` as the base and a random adapter of it."""
    base = home / "base"
    base.mkdir()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(base)
    else:
        save_file(model.state_dict(), base / "model.safetensors")
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        randomise(wrapped, seed)
        wrapped.save_pretrained(home / "adapter")
    return home / "adapter"


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what we ask of it
        yield


def loaded(model, folder):
    """peft's model of a folder, in float64."""
    with quiet():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model).double(), folder).double().eval()


def opened(home, name="adapter"):
    base, tuned = open_checkpoint(home / "base"), open_checkpoint(home / name)
    plan = plan_updates(tuned)
    return base, tuned, plan, pair_layers(base, tuned, plan)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = torch.linalg.vector_norm(value.double())
        assert torch.linalg.vector_norm(found[name].double() - value.double()) <= 2e-6 * scale, name


def save_raw(model: nn.Module, folder) -> None:
    """What a training loop keeps after each epoch: the model's whole state, the adapter's name in its keys."""
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "adapter_model.safetensors")


def same_updates(one, other) -> None:
    assert one.keys() <= other.keys()
    for name, (W1, layout) in one.items():
        assert other[name][1] == layout
        assert torch.linalg.norm(other[name][0] - W1) <= 1e-12 * torch.linalg.norm(W1), name


def state(folder) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(folder / "base" / "model.safetensors").items()}
