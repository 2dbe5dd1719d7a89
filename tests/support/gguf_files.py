"""GGUF files by gguf's own writer: models in the converter's order of rows, and LoRAs."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch

from spectra.files.gguf.names import MIXTURES, MODULES, REORDERED
from tests.support.dialects import draw, write

LORA = "lora.gguf"
ARCHITECTURES = tuple(sorted(MODULES))
DENSE = tuple(name for name in ARCHITECTURES if name == "llama" or name not in MIXTURES)
STORED = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16,
          torch.float64: gguf.GGMLQuantizationType.F64, torch.bfloat16: gguf.GGMLQuantizationType.BF16}  # fmt: skip


def reordered(weights, heads):
    """The converter's ``LlamaModel.permute``, written out."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2)
        .reshape(weights.shape)
    )  # fmt: skip


def write_gguf(path, architecture, tensors, fields=(), *, alignment=None):
    """A file by gguf's own writer; ``fields`` are (method, key, value), blocks (bytes, their type)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for method, key, value in fields:
        getattr(writer, f"add_{method}")(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
        elif isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            raw = value.contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=STORED[value.dtype])
        else:
            writer.add_tensor(name, value.contiguous().numpy() if isinstance(value, torch.Tensor) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora_fields(alpha):
    fields = [("string", "general.type", "adapter"), ("string", "adapter.type", "lora")]
    return fields + ([] if alpha is None else [("float32", "adapter.lora.alpha", alpha)])


def a_mixture(rng, architecture, heads, key_heads, experts, hidden, inner):
    """{name in transformers: weight} of a mixture, its stacks as transformers has them, and what GGUF has."""
    width = hidden // heads
    home = "model.layers.0"
    weights = {
        "model.embed_tokens.weight": draw(rng, 40, hidden),
        f"{home}.self_attn.q_proj.weight": draw(rng, heads * width, hidden),
        f"{home}.self_attn.k_proj.weight": draw(rng, key_heads * width, hidden),
        f"{home}.self_attn.v_proj.weight": draw(rng, key_heads * width, hidden),
        f"{home}.self_attn.o_proj.weight": draw(rng, hidden, heads * width),
        f"{home}.mlp.gate.weight": draw(rng, experts, hidden),
        f"{home}.mlp.experts.gate_up_proj": draw(rng, experts, 2 * inner, hidden),
        f"{home}.mlp.experts.down_proj": draw(rng, experts, hidden, inner),
    }
    both = weights[f"{home}.mlp.experts.gate_up_proj"]
    stored = {
        "token_embd": weights["model.embed_tokens.weight"], "blk.0.ffn_gate_inp": weights[f"{home}.mlp.gate.weight"],
        "blk.0.ffn_gate_exps": both[:, :inner], "blk.0.ffn_up_exps": both[:, inner:],
        "blk.0.ffn_down_exps": weights[f"{home}.mlp.experts.down_proj"],
    }  # fmt: skip
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        weight = weights[f"{home}.{MODULES[architecture][part]}.weight"]
        count = heads_of(architecture, f"blk.0.{part}", heads, key_heads)
        stored[f"blk.0.{part}"] = weight if count is None else reordered(weight, count)
    for part, module in MODULES[architecture].items():
        if part.endswith("_shexp"):
            shape = {"ffn_down_shexp": (hidden, inner), "ffn_gate_inp_shexp": (1, hidden)}.get(part, (inner, hidden))
            weights[f"{home}.{module}.weight"] = weight = draw(rng, *shape)
            stored[f"blk.0.{part}"] = weight.squeeze(0)  # as the converter squeezes it
    return weights, {f"{name}.weight": weight for name, weight in stored.items()}


def a_model(rng, architecture, dtype, heads, key_heads):
    """{name in transformers: weight} of two layers, and how GGUF calls each module."""
    width, hidden, inner, words = 4, 2 * heads * 2, int(rng.integers(5, 20)), int(rng.integers(20, 40))
    shapes = {
        "attn_q": (heads * width, hidden), "attn_k": (key_heads * width, hidden), "attn_v": (key_heads * width, hidden),
        "attn_qkv": ((heads + 2 * key_heads) * width, hidden), "attn_output": (hidden, heads * width),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": draw(rng, words, hidden, dtype=dtype)}
    names = {"model.embed_tokens.weight": "token_embd", "lm_head.weight": "output"}
    weights["lm_head.weight"] = draw(rng, words, hidden, dtype=dtype)
    for layer in range(2):
        for part, module in MODULES[architecture].items():
            if part not in shapes:
                continue  # of Mixtral, which has the architecture of Llama
            name = f"model.layers.{layer}.{module}.weight"
            weights[name] = draw(rng, *shapes[part], dtype=dtype)
            names[name] = f"blk.{layer}.{part}"
    weights["model.norm.weight"] = draw(rng, hidden, dtype=dtype)
    return weights, names


def heads_of(architecture, name, heads, key_heads):
    """How many heads the rows of a weight are reordered by, or None."""
    part = name.rpartition(".")[2]
    return {"attn_q": heads, "attn_k": key_heads}[part] if part in REORDERED.get(architecture, ()) else None


def small_lora(folder, architecture="llama", fields=None, **tensors):
    shapes = {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_q.weight.lora_b": (8, 2)} | tensors
    values = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    return write_gguf(folder / LORA, architecture, values, lora_fields(4.0) if fields is None else fields)


def small_base(folder, **config):
    write(folder, {"model.layers.0.self_attn.q_proj.weight": torch.eye(8), "lm_head.weight": torch.eye(8)})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder
