"""LoRAs as diffusers writes and reads them: tuned weights against its own in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dialects import check_any, draw, write
from tests.support.diffusers_models import fused, randomise, unet
from tests.support.seeds import each_seed

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SEEDS = range(20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def flux(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def configuration(rng: np.random.Generator, seed: int, targets: list[str]) -> Any:
    return peft.LoraConfig(
        r=int(rng.integers(1, 6)), lora_alpha=int(rng.integers(1, 20)), use_rslora=seed % 3 == 1,
        use_dora=seed % 4 == 2, target_modules=targets, init_lora_weights=False,
        rank_pattern={"to_k": 3} if seed % 2 else {}, alpha_pattern={r".*attn.*\.to_v": 7} if seed % 5 < 3 else {},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["unet", "flux"])
@each_seed(SEEDS)
def test_diffusers_as_its_pipelines_and_models_save(tmp_path, seed, kind):
    rng = np.random.default_rng([seed, len(kind)])
    model = unet(seed) if kind == "unet" else flux(seed)
    convolutions = ["conv1", "conv_in", "proj_in"] if kind == "unet" else ["x_embedder", "proj_mlp", "linear"]
    base = write(tmp_path / "pipeline" / kind, model.state_dict(), "diffusion_pytorch_model.safetensors")
    config = configuration(rng, seed, ATTENTION + convolutions)
    model.add_adapter(config)
    randomise(model, rng, DTYPES[seed % 4])
    component, pipeline, metadata = {
        "unet": ("unet", diffusers.StableDiffusionPipeline, "unet_lora_adapter_metadata"),
        "flux": ("transformer", diffusers.FluxPipeline, "transformer_lora_adapter_metadata"),
    }[kind]
    state = peft.get_peft_model_state_dict(model)
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    pipeline.save_lora_weights(tmp_path / "lora", **{f"{component}_lora_layers": state, metadata: described})
    model.save_lora_adapter(tmp_path / "alone")
    expected = fused(model)
    assert len(expected) > 8
    check_any(base, tmp_path / "lora", expected)
    check_any(base, tmp_path / "alone", expected)


@each_seed(SEEDS)
def test_diffusers_before_peft(tmp_path, seed):
    from diffusers.utils.state_dict_utils import UNET_TO_DIFFUSERS, convert_unet_state_dict_to_peft

    rng = np.random.default_rng(seed)
    model = unet(seed)
    weights = dict(model.state_dict())
    base = write(tmp_path / "unet", weights, "diffusion_pytorch_model.safetensors")
    rank, dtype = int(rng.integers(1, 5)), DTYPES[seed % 4]
    keys = {}
    for name, W in weights.items():
        module = name.removesuffix(".weight")
        host, _, projection = module.removesuffix(".0").rpartition(".")
        if ".attn" in module and name.endswith(".weight") and projection in ("to_q", "to_k", "to_v", "to_out"):
            own = f"{host}.processor.{projection}_lora" if seed % 2 else f"{module}.lora"
            keys[f"{own}.down.weight"] = draw(rng, rank, W.shape[1], dtype=dtype)
            keys[f"{own}.up.weight"] = draw(rng, W.shape[0], rank, dtype=dtype)
    prefix = "" if seed % 4 == 1 else "unet."
    write(tmp_path / "lora", {prefix + key: value for key, value in keys.items()}, "pytorch_lora_weights.safetensors")
    converted = convert_unet_state_dict_to_peft(keys)  # as diffusers reads them
    assert UNET_TO_DIFFUSERS
    expected = {}
    for key, A in converted.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            expected[f"{module}.weight"] = (
                weights[f"{module}.weight"].double() + converted[f"{module}.lora_B.weight"].double() @ A.double()
            )
    assert len(expected) == len(keys) // 2
    check_any(base, tmp_path / "lora", expected)
