"""Small models of every family whose projections share a matrix."""

from __future__ import annotations

import numpy as np
import torch


def phi3(rng):
    keys, groups, size = (int(rng.integers(1, 4)) for _ in range(3))
    heads, size = keys * groups, 2 * size
    return "Phi3", {
        "hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": size,
        "intermediate_size": int(rng.integers(3, 20)), "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    }  # fmt: skip


def by_head(kind, **options):
    def family(rng):
        heads, size = int(rng.integers(1, 6)), 8 * int(rng.integers(1, 4))
        return kind, {
            "hidden_size": heads * size, "num_attention_heads": heads, "intermediate_size": 12, **options,
        }  # fmt: skip

    return family


def bloom(rng):
    heads, size = int(rng.integers(1, 6)), int(rng.integers(2, 9))
    return "Bloom", {"hidden_size": heads * size, "n_head": heads}


def falcon(new, multi):
    def family(rng):
        groups, keys, size = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(1, 5))
        heads = groups * keys
        return "Falcon", {
            "hidden_size": heads * size, "num_attention_heads": heads, "num_kv_heads": keys if new else None,
            "new_decoder_architecture": new, "multi_query": multi, "alibi": False,
        }  # fmt: skip

    return family


def gpt2(rng):
    heads, size = int(rng.integers(1, 6)), int(rng.integers(2, 9))
    return "GPT2", {"n_embd": heads * size, "n_head": heads}


def bigcode(multi):
    def family(rng):
        heads, size = int(rng.integers(2, 6)), int(rng.integers(2, 9))
        return "GPTBigCode", {"n_embd": heads * size, "n_head": heads, "multi_query": multi}

    return family


def mpt(rng):
    heads, size = int(2 ** rng.integers(0, 3)), int(rng.integers(2, 9))
    return "Mpt", {"d_model": heads * size, "n_heads": heads, "expansion_ratio": 2}


def modernbert(rng):
    heads, size = int(rng.integers(1, 5)), 2 * int(rng.integers(1, 5))
    return "ModernBert", {
        "hidden_size": heads * size, "num_attention_heads": heads, "intermediate_size": 12, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    }  # fmt: skip


def codegen(rng):
    heads, size = 4 * int(rng.integers(1, 3)), 4 * int(rng.integers(1, 4))
    return "CodeGen", {"n_embd": heads * size, "n_head": heads, "rotary_dim": size, "n_ctx": 16, "n_positions": 16}


def dbrx(rng):
    keys, groups, size = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(1, 5))
    return "Dbrx", {
        "d_model": keys * groups * size, "n_heads": keys * groups,
        "attn_config": {"kv_n_heads": keys, "clip_qkv": 1e9, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 6, "moe_num_experts": 2, "moe_top_k": 1},
    }  # fmt: skip


FAMILIES = {
    "phi3": phi3,
    "gpt_neox": by_head("GPTNeoX", rotary_pct=1.0),
    "persimmon": by_head("Persimmon", qk_layernorm=False),
    "bloom": bloom,
    "falcon-7b": falcon(False, True),
    "falcon-rw": falcon(False, False),
    "falcon-40b": falcon(True, True),
    "gpt2": gpt2,
    "gpt_bigcode multi-query": bigcode(True),
    "gpt_bigcode": bigcode(False),
    "mpt": mpt,
    "modernbert": modernbert,
    "codegen": codegen,
    "dbrx": dbrx,
}
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")


def model_of(transformers, family, rng):
    kind, options = FAMILIES[family](rng)
    options |= {"vocab_size": 12, ("n_layers" if kind in ("Mpt", "Dbrx") else "n_layer" if kind in (
        "GPT2", "GPTBigCode", "CodeGen", "Bloom") else "num_hidden_layers"): 1}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    head = {"ModernBert": "ForMaskedLM", "GPT2": "LMHeadModel"}.get(kind, "ForCausalLM")
    model = getattr(transformers, kind + head)(config)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    return model


def phi_like(rng, folder, make_base, q=8, kv=4, inter=6, hidden=8, **config):
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": rng.normal(size=(q + 2 * kv, hidden)).astype(np.float32),
        "model.layers.0.mlp.gate_up_proj.weight": rng.normal(size=(2 * inter, hidden)).astype(np.float32),
        "model.layers.0.mlp.down_proj.weight": rng.normal(size=(hidden, inter)).astype(np.float32),
    }
    values = {
        "model_type": "phi3", "hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2, **config,
    }  # fmt: skip
    return make_base(tensors, folder=folder, config={key: value for key, value in values.items() if value is not None})
