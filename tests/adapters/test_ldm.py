"""The two names of a U-Net's modules, held against diffusers' own conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectra.adapters.ldm import aliases

diffusers = pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # noqa: E402

CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 8, 8, 8),
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8, 8),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12,
        "class_embed_type": None,
    },
}


def ldm_names(model):
    """{LDM's name: diffusers' name} of every matrix, by what diffusers' conversion does with each LDM name."""
    wanted = [name for name, value in model.state_dict().items() if value.ndim > 1]
    candidates = {alias for name in wanted for _, alias in aliases(name.removesuffix(".weight"))}
    blocks = {name.rpartition(".in_layers")[0] for name in candidates if ".in_layers" in name}
    norms = {f"{block}.{norm}" for block in blocks for norm in ("in_layers.0", "out_layers.0")} | {"out.0"}
    names = dict(enumerate(sorted(candidates | norms)))
    values = {
        f"model.diffusion_model.{name}.{end}": torch.full((1,), float(i))
        for i, name in names.items()
        for end in ("weight", "bias")
    }
    converted = {
        key: value for key, value in convert_ldm_unet_checkpoint(values, dict(model.config)).items() if key in wanted
    }
    return wanted, {names[int(value)]: name for name, value in converted.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_matrix_of_a_unet(kind):
    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=2, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        **CONFIGS[kind],
    )  # fmt: skip
    wanted, converted = ldm_names(model)
    reached = set(converted.values())
    missing = [name for name in wanted if name not in reached]
    assert not missing, "diffusers' conversion makes every matrix of the names that are given"
    for ldm, name in converted.items():
        module = name.removesuffix(".weight")
        found = {alias for _, alias in aliases(ldm)}
        assert found == {module}, ldm
        before = {where for where, _ in aliases(f"model.diffusion_model.{ldm}")}
        assert before == {"model.diffusion_model"}


@pytest.mark.parametrize(
    ("module", "alias"),
    [
        ("conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc", "text_model.encoder.layers.3.mlp.fc1"),
        ("cond_stage_model.model.transformer.resblocks.3.mlp.c_proj", "text_model.encoder.layers.3.mlp.fc2"),
        ("transformer.resblocks.0.attn.out_proj", "text_model.encoder.layers.0.self_attn.out_proj"),
        ("transformer.resblocks.0.attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_open_clips_names(module, alias):
    assert [name for _, name in aliases(module)] == [alias]


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.self_attn.q_proj", "h.0.attn.c_attn", "transformer_blocks.0.attn.to_q", "decoder.up_blocks.0",
     "input_blocks.1.2.to_q", "xinput_blocks.1.1.to_q", "middle_block.0.unheard", "down_blocks.0.others.0.x",
     "transformer.resblocks.0.attn.in_proj_weight", ""],
)  # fmt: skip
def test_what_has_one_name_alone(module):
    assert list(aliases(module)) == []
