"""MLX adapters as mlx_lm writes and fuses them: tuned weights against its own in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spectra.files.checkpoint import open_checkpoint
from spectra.sources.resolve import open_base_of
from tests.support.dialects import check_any, write
from tests.support.seeds import each_seed

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from mlx.utils import tree_flatten  # noqa: E402  (after the oracles are known to be there)
from mlx_lm.models import llama, qwen3_moe  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import save_config  # noqa: E402

SEEDS = range(20)
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
@each_seed(SEEDS)
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
