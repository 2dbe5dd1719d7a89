"""LoRAs as diffusers writes and reads them, MLX adapters as mlx_lm does: tuned weights against theirs in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spectra.files.checkpoint import open_checkpoint
from spectra.sources.resolve import open_base_of
from tests.support.dialects import check_any, draw, write
from tests.support.diffusers_models import fused, randomise, unet

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


# MLX

mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten  # noqa: E402  (after the oracles are known to be there)
from mlx_lm.models import llama, qwen3_moe  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import save_config  # noqa: E402

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
@pytest.mark.parametrize("seed", SEEDS)
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


@pytest.mark.parametrize("seed", SEEDS)
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


# kohya's files as diffusers reads them


def kohya_keys(rng: np.random.Generator, prefix: str, weights: Any, rank: int, alpha: float | None, dtype: Any) -> Any:
    keys = {}
    for name, W in weights.items():
        called = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
        keys[f"{called}.lora_down.weight"] = draw(rng, rank, *W.shape[1:], dtype=dtype)
        keys[f"{called}.lora_up.weight"] = draw(rng, W.shape[0], rank, *[1] * (W.ndim - 2), dtype=dtype)
        if alpha is not None:
            keys[f"{called}.alpha"] = torch.tensor(alpha)
    return keys


@pytest.mark.parametrize("seed", SEEDS)
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


@pytest.mark.parametrize("seed", SEEDS)
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


pytest.importorskip("mlx_lm")

mx.set_default_device(mx.cpu)


def of_mlx(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value.astype(mx.float64)))


def leaves(tree: Any) -> list[tuple[str, Any]]:
    found: Any = tree_flatten(tree)
    return list(found)


def mlx_model(kind: str) -> Any:
    common: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 32, "num_key_value_heads": 1,
    }  # fmt: skip
    if kind == "llama":
        return llama.Model(llama.ModelArgs(model_type="llama", tie_word_embeddings=False, **common))
    return qwen3_moe.Model(qwen3_moe.ModelArgs(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
        moe_intermediate_size=12, head_dim=8, rope_theta=1e4, tie_word_embeddings=False, max_position_embeddings=64,
        norm_topk_prob=True, **common,
    ))  # fmt: skip


def randomised(model: Any, rng: np.random.Generator, dtype: Any) -> None:
    drawn = []
    for name, value in leaves(model.trainable_parameters()):
        made = rng.normal(size=value.shape)
        drawn.append(
            (name, mx.array(np.abs(made) + 0.1 if name.endswith(".m") else made, dtype=mx.float64).astype(dtype))
        )
    model.load_weights(drawn, strict=False)


def unstacked(name: str, value: torch.Tensor, files: bool) -> dict[str, torch.Tensor]:
    """A weight under its names: experts stacked as MLX has them, or each by itself."""
    if value.ndim < 3 or not files:
        return {name: value}
    return {name.replace("switch_mlp", f"experts.{expert}"): matrix for expert, matrix in enumerate(value)}


@pytest.mark.parametrize("kind", ["lora", "dora", "experts", "full"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mlx_as_it_fuses(tmp_path, seed, kind):
    rng = np.random.default_rng([seed, len(kind)])
    mx.random.seed(seed)
    model = mlx_model("qwen3_moe" if kind == "experts" or (kind == "full" and seed % 2) else "llama")
    dtype = [mx.float32, mx.bfloat16, mx.float16][seed % 3]
    model.load_weights([(name, value.astype(dtype)) for name, value in leaves(model.parameters())])
    weights = {name: of_mlx(value) for name, value in leaves(model.parameters())}
    files = bool(seed % 2)  # the base as others store it
    stored = {key: part for name, value in weights.items() for key, part in unstacked(name, value, files).items()}
    base = write(tmp_path / "base", {name: value.float() for name, value in stored.items()})
    (base / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 16}')
    of_experts = ["mlp.gate", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"]
    feed_forward = of_experts if kind == "experts" else ["mlp.down_proj"]
    parameters: dict[str, Any] = {
        "rank": int(rng.integers(1, 6)), "scale": float(rng.uniform(-1, 20)), "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.o_proj", "model.embed_tokens", *feed_forward],
    }  # fmt: skip
    settings: dict[str, Any] = {
        "fine_tune_type": "lora" if kind == "experts" else kind,
        "num_layers": 2 - seed % 2,
        "model": "../base",
    }
    model.freeze()
    if kind == "full":
        for layer in model.layers[-settings["num_layers"] :]:
            layer.unfreeze()
        settings["lora_parameters"] = None
    else:
        linear_to_lora_layers(model, settings["num_layers"], parameters, use_dora=kind == "dora")
        settings["lora_parameters"] = parameters
    randomised(model, rng, [mx.float32, mx.bfloat16][seed // 2 % 2])
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), dict(leaves(model.trainable_parameters())))
    save_config(dict(settings), tmp_path / "mlx" / "adapter_config.json")
    model.load_weights([(name, value.astype(mx.float64)) for name, value in leaves(model.parameters())])
    if kind == "full":
        tuned = {name: of_mlx(value) for name, value in leaves(model.trainable_parameters()) if value.ndim > 1}
    else:
        fused_modules = {name: module for name, module in model.named_modules() if hasattr(module, "fuse")}
        tuned = {f"{name}.weight": of_mlx(module.fuse().weight) for name, module in fused_modules.items()}
    expected = {key: part for name, value in tuned.items() for key, part in unstacked(name, value, True).items()}
    assert len(expected) > 2
    pairing = check_any(base, tmp_path / "mlx", expected, shared=True)
    assert open_base_of(open_checkpoint(tmp_path / "mlx")).path.samefile(base)
    assert pairing
