"""Where peft's own function (peft.tuners.lora.intruders, 0.21) is wrong, and this is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectra
from tests.support.peft_models import randomise
from tests.support.reference import formula
from tests.support.repaired import merged, relative, tuned_weights

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what we ask of it
        yield


def theirs(model, scale: float, epsilon: float) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    reduce_intruder_dimension(model, threshold_epsilon=epsilon, mitigation_lambda=scale, logging_sink=None)


def literal(W0, W1, scale, epsilon):
    """The formula with the intruders among the top ten, by full SVDs."""
    U0, U1 = np.linalg.svd(W0, full_matrices=False)[0], np.linalg.svd(W1, full_matrices=False)[0]
    cosines = np.abs(U0.T @ U1[:, :10]).max(0)
    return formula(W1, {int(i): scale for i in np.flatnonzero(cosines < epsilon)})


class One(nn.Module):
    """A single module, whose weight shall be looked at."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.c_attn = layer


EPSILON = 0.8


def both(tmp_path, make, *, turned: bool, seed: int = 0, convert: bool = False, **options):
    """(W0, W1, literal repair, ours through peft, peft's own or its error), as (out, in), float64."""
    torch.manual_seed(seed)
    layer = make()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) / layer.weight.shape[1] ** 0.5)
    net = One(layer)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    if options.get("fan_in_fan_out"):
        (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["c_attn"], **options))
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    randomise(model, seed)
    if convert:
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    else:
        model.save_pretrained(tmp_path / "adapter")

    def matrix_of(value):
        value = value.detach().double().numpy()
        return value.T if turned else value

    W0 = matrix_of(state["c_attn.weight"])
    W1 = tuned_weights(tmp_path / "base", tmp_path / "adapter")["c_attn.weight"]
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.3, epsilon=EPSILON)
    fresh = One(make())
    fresh.load_state_dict(state)
    ours = matrix_of(merged(fresh, tmp_path / "out")["c_attn.weight"])
    held = model.base_model.model.c_attn.get_base_layer().weight.detach().clone()
    try:
        theirs(model, 0.3, EPSILON)
        their = matrix_of(model.merge_and_unload().state_dict()["c_attn.weight"])
    except Exception as error:
        return W0, W1, literal(W0, W1, 0.3, EPSILON), ours, error, held
    return W0, W1, literal(W0, W1, 0.3, EPSILON), ours, their, held


def is_wrong(found, wanted) -> bool:
    return isinstance(found, Exception) or found.shape != wanted.shape or relative(found, wanted) > 1e-2


def test_peft_truncates_to_the_old_rank(tmp_path):
    W0, W1, wanted, ours, their, _ = both(tmp_path, lambda: nn.Linear(40, 30), turned=False, r=2, lora_alpha=8)
    assert relative(wanted, W1) > 0.05
    assert relative(ours, wanted) <= 1e-5
    assert is_wrong(their, wanted)
    s = np.linalg.svd(wanted - W0, compute_uv=False)
    assert np.linalg.norm(their - wanted) == pytest.approx(np.linalg.norm(s[2:]), rel=1e-3)  # it is only truncated


def test_peft_turns_a_square_conv1d_over(tmp_path):
    from transformers.pytorch_utils import Conv1D

    *_, wanted, ours, their, _ = both(
        tmp_path, lambda: Conv1D(30, 30), turned=True, r=2, lora_alpha=8, fan_in_fan_out=True
    )
    assert relative(ours, wanted) <= 1e-5
    assert is_wrong(their, wanted)


def test_peft_breaks_embeddings(tmp_path):
    *_, wanted, ours, their, _ = both(tmp_path, lambda: nn.Embedding(50, 20), turned=True, r=2, lora_alpha=8)
    assert relative(ours, wanted) <= 1e-5
    assert is_wrong(their, wanted)


def test_peft_loses_the_magnitudes_of_dora(tmp_path):
    *_, W1, wanted, ours, their, _ = both(
        tmp_path, lambda: nn.Linear(40, 30), turned=False, r=2, lora_alpha=8, use_dora=True
    )
    assert relative(wanted, W1) > 0.05
    assert relative(ours, wanted) <= 1e-5
    assert is_wrong(their, wanted)


def test_peft_damages_a_base_that_pissa_shares(tmp_path):
    torch.manual_seed(1)
    *_, wanted, ours, _, _ = both(
        tmp_path, lambda: nn.Linear(40, 30), turned=False, r=2, lora_alpha=2, init_lora_weights="pissa", convert=True
    )
    assert relative(ours, wanted) <= 1e-5
    # Theirs adds a second adapter, whose initialisation takes its part out of the weight that both stand on.
    net = One(nn.Linear(40, 30))
    model = peft.get_peft_model(
        net, peft.LoraConfig(target_modules=["c_attn"], r=2, lora_alpha=2, init_lora_weights="pissa")
    )
    randomise(model, 0)
    before = model.base_model.model.c_attn.get_base_layer().weight.detach().clone()
    first = model.base_model.model.c_attn.get_delta_weight("default").detach() + before
    theirs(model, 0.3, EPSILON)
    model.set_adapter("default")
    after = model.base_model.model.c_attn.get_base_layer().weight.detach()
    second = model.base_model.model.c_attn.get_delta_weight("default").detach() + after
    assert relative(second.numpy(), first.numpy()) > 1e-2  # the adapter that was there is no longer what it was
