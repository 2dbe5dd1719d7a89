"""Small models of diffusers, random LoRAs on them, and what peft merges of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dialects import draw

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


def unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def randomise(model: Any, rng: np.random.Generator, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = draw(rng, *parameter.shape, dtype=dtype)
            if "magnitude" in name:
                parameter.data = parameter.data.abs() + 0.1


def fused(model: Any) -> dict[str, torch.Tensor]:
    """The weights that carry a LoRA, merged by peft in float64, by the model's own names."""
    model.double()
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            found[f"{name}.weight"] = module.get_base_layer().weight.data.clone()
    return found
