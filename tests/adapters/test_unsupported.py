"""Adapters of other writers, which are named."""

from __future__ import annotations

import pytest

import spectra
from spectra.errors import UnsupportedMethodError
from tests.support.paths import FIXTURES
from tests.support.problems import f32


@pytest.mark.parametrize(
    ("tensor", "method"),
    [
        ("layer.down_lora.down.weight", "an early diffusers"),
        ("base_model.model.layer.hada_w1_a", "LoHa"),
        ("base_model.model.layer.lokr_w1", "LoKr"),
        ("lycoris_layer.lambda_layer", "T-LoRA"),
        ("lora_unet_layer.boft_R", "BOFT"),
        ("lora_unet_layer.oft_R.weight", "OFT without"),
        ("layer.lora_a", "MLX"),
        ("model.layers.0.q.lora_A.weight", r"adapter_config\.json"),
    ],
)
def test_other_writers_are_named(rng, make_base, tensor, method):
    other = make_base({tensor: f32(rng, 2, 4)}, "other")
    with pytest.raises(UnsupportedMethodError, match=method):
        spectra.audit(other, FIXTURES / "base")
