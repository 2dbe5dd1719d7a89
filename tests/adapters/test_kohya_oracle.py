"""LoRAs of kohya's sd-scripts as diffusers reads them: tuned weights against its own in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dialects import check_any, draw, write
from tests.support.diffusers_models import fused, unet
from tests.support.seeds import each_seed

diffusers = pytest.importorskip("diffusers")

SEEDS = range(20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kohya_keys(rng: np.random.Generator, prefix: str, weights: Any, rank: int, alpha: float | None, dtype: Any) -> Any:
    keys = {}
    for name, W in weights.items():
        called = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
        keys[f"{called}.lora_down.weight"] = draw(rng, rank, *W.shape[1:], dtype=dtype)
        keys[f"{called}.lora_up.weight"] = draw(rng, W.shape[0], rank, *[1] * (W.ndim - 2), dtype=dtype)
        if alpha is not None:
            keys[f"{called}.alpha"] = torch.tensor(alpha)
    return keys


@each_seed(SEEDS)
def test_kohya_as_diffusers_reads_it(tmp_path, seed):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    rng = np.random.default_rng(seed)
    model = unet(seed)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=8,
    ))  # fmt: skip
    base = write(tmp_path / "unet", model.state_dict(), "diffusion_pytorch_model.safetensors")
    text_base = write(tmp_path / "text_encoder", text.state_dict())
    alpha = [None, 1.0, 4.0, 0.5, 2.25][seed % 5]
    of_denoiser = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", "proj_in.weight", "conv1.weight",
                   "time_emb_proj.weight", "ff.net.2.weight")  # fmt: skip
    denoiser = {name: value for name, value in model.state_dict().items() if name.endswith(of_denoiser)}
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    encoder = {name: value for name, value in text.state_dict().items() if name.endswith(ends)}
    rank, dtype = int(rng.integers(1, 6)), DTYPES[seed % 4]
    keys = kohya_keys(rng, "lora_unet", denoiser, rank, alpha, dtype)
    model_of = "" if any(name.startswith("text_model.") for name in encoder) else "text_model."
    keys |= kohya_keys(
        rng, ["lora_te", "lora_te1"][seed % 2], {model_of + k: v for k, v in encoder.items()}, rank, alpha, dtype
    )
    write(tmp_path / "lora", keys, "mine.safetensors")
    state, alphas = _convert_non_diffusers_lora_to_diffusers(dict(keys))
    pipeline = diffusers.StableDiffusionPipeline
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    pipeline.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=text, prefix="text_encoder")
    lora = tmp_path / "lora" / "mine.safetensors"
    of_unet = fused(model)
    assert set(of_unet) == set(denoiser)
    check_any(base, lora, of_unet)
    of_text = fused(text)
    assert set(of_text) == set(encoder)
    check_any(text_base, lora, of_text)


@each_seed(SEEDS)
def test_kohya_s_flux_as_diffusers_reads_it(tmp_path, seed):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    rng = np.random.default_rng(seed)
    block, single = "double_blocks.0", "single_blocks.0"
    weights = {
        f"{block}.img_attn.qkv.weight": (24, 8), f"{block}.txt_attn.qkv.weight": (24, 8),
        f"{block}.img_attn.proj.weight": (8, 8), f"{block}.img_mlp.0.weight": (32, 8),
        f"{block}.img_mod.lin.weight": (48, 8), f"{single}.linear1.weight": (21504, 4),
        f"{single}.linear2.weight": (8, 40), f"{single}.modulation.lin.weight": (24, 8),
    }  # fmt: skip
    single_parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    targets = {
        f"{block}.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        f"{block}.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        f"{block}.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        f"{block}.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
        f"{block}.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        f"{single}.linear1": [f"single_transformer_blocks.0.{x}" for x in single_parts],
        f"{single}.linear2": ["single_transformer_blocks.0.proj_out"],
        f"{single}.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    }  # fmt: skip
    model = {name: draw(rng, *shape) for name, shape in weights.items()}
    keys = kohya_keys(rng, "lora_unet", model, 6, [None, 3.0, 12.0][seed % 3], DTYPES[seed % 2])
    if seed % 4 > 1:  # block by block, as networks of split projections are saved
        up = keys["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
        up *= torch.block_diag(*[torch.ones(8, 2)] * 3).to(up.dtype)
    dotted = seed % 5 == 4  # as other tools name them
    if dotted:
        names = {
            f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name.removesuffix(".weight")
            for name in model
        }
        stored = {
            f"diffusion_model.{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value
            for key, value in keys.items()
        }
    write(tmp_path / "lora", stored if dotted else keys)
    converted = _convert_kohya_flux_lora_to_diffusers({key: value.double() for key, value in keys.items()})
    expected = {}
    for name, parts in targets.items():
        factors = [
            (converted[f"transformer.{part}.lora_B.weight"], converted[f"transformer.{part}.lora_A.weight"])
            for part in parts
        ]
        expected[f"{name}.weight"] = model[f"{name}.weight"].double() + torch.cat([B @ A for B, A in factors])
    check_any(write(tmp_path / "base", model), tmp_path / "lora", expected)
