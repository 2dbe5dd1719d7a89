"""A model's tensors in a GGUF file under the names that transformers gives them, their rows in its order.

The converter reorders the query and key rows of models like Llama for ggml's rotary embedding.  Where names and orders
of an architecture were not checked, its tensors keep GGUF's own: two files of that architecture have them alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectra.errors import CorruptFileError, UnsupportedMethodError
from spectra.files.gguf.headers import GgufFile, GgufTensor, check_heads
from spectra.files.headers import TensorInfo

# Architectures whose names and orders were checked against gguf's own table and the converter: names of a layer's
# modules after "model.layers.N.".  Others may order rows otherwise.
_ATTENTION = {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
_GATED = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_LLAMA = _ATTENTION | _GATED
# Stacks (experts, out, in), and what chooses among them.
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS |= {"ffn_gate_inp": "mlp.gate"}
_SHARED = {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
_SHARED |= {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
MODULES: dict[str, dict[str, str]] = {
    "llama": _LLAMA | _EXPERTS, "mistral3": _LLAMA, "granite": _LLAMA, "smollm3": _LLAMA, "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma": _LLAMA, "gemma2": _LLAMA, "gemma3": _LLAMA, "stablelm": _LLAMA,
    "command-r": _LLAMA, "cohere2": _LLAMA, "seed_oss": _LLAMA,
    "qwen2moe": _ATTENTION | _EXPERTS | _SHARED, "qwen3moe": _ATTENTION | _EXPERTS, "olmoe": _ATTENTION | _EXPERTS,
    "nemotron": _ATTENTION | {part: _GATED[part] for part in ("ffn_up", "ffn_down")},
    "starcoder2": _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    "phi2": _ATTENTION | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
             "ffn_down": "mlp.down_proj"},
}  # fmt: skip
# What the converter derives from LlamaModel, or permutes as that does.
REORDERED = dict.fromkeys(("llama", "mistral3", "granite", "smollm3", "olmo"), ("attn_q", "attn_k"))
# Of those with experts, what transformers calls the model.
MIXTURES = {"llama": "mixtral", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "olmoe": "olmoe"}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.([0-9]{1,6})\.([^.]+)")
_STACK = re.compile(r"(blk\.[0-9]{1,6})\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
# What the config of a model says whose tensors keep GGUF's names: that they do, and of which architecture.
OWN, ARCHITECTURE = "gguf", "gguf_architecture"


def module_of(architecture: str, name: str) -> tuple[str | None, str | None]:
    """(the module's name, what of a layer it is) of a GGUF module; None where transformers has none.

    The name is transformers', or GGUF's own where this architecture's were not checked.
    """
    if architecture not in MODULES:
        return name, name.rpartition(".")[2]
    if name in _OUTSIDE:
        return _OUTSIDE[name], name
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in MODULES[architecture]:
        return None, None
    return f"model.layers.{match[1]}.{MODULES[architecture][match[2]]}", match[2]


def keeps_ggufs_names(layout: str, config: Mapping[str, Any]) -> str | None:
    """The architecture of a model or LoRA whose tensors keep GGUF's names; None of all others."""
    key = {"gguf": ARCHITECTURE, "gguf adapter": "general.architecture"}.get(layout)
    architecture = config.get(key) if key else None
    if not isinstance(architecture, str) or (layout == "gguf adapter" and architecture in MODULES):
        return None
    return architecture


def model_of(path: Path, gguf: GgufFile) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """A model's tensors under the names of transformers or GGUF's own, and what of its config the file tells.

    Raises
    ------
    UnsupportedMethodError : no model, or one whose numbers of heads differ by layer and order its rows.
    CorruptFileError : numbers of heads that do not fit.
    """
    kind, architecture = gguf.fields.get("general.type", "model"), gguf.fields.get("general.architecture")
    if kind != "model" or not isinstance(architecture, str):
        raise UnsupportedMethodError(path, f"general.type = {str(kind)[:40]!r}: neither a model nor a LoRA")
    mixture = bool(gguf.fields.get(f"{architecture}.expert_count"))
    if architecture not in (MIXTURES if mixture else MODULES):
        return _under_ggufs_names(path, gguf, architecture)
    heads = gguf.fields.get(f"{architecture}.attention.head_count")
    key_heads = gguf.fields.get(f"{architecture}.attention.head_count_kv", heads)
    tensors: dict[str, TensorInfo] = {}
    for name, info in gguf.tensors.items():
        own, _, tail = name.rpartition(".")
        module, part = module_of(architecture, own)
        renamed = name if module is None else f"{module}.{tail}"
        if renamed in tensors:
            raise CorruptFileError(path, f"malformed: {renamed!r} is there under two names", name)
        placed: TensorInfo = replace(info, name=renamed)
        if part == "ffn_gate_inp_shexp" and len(info.shape) == 1:
            placed = replace(info, name=renamed, shape=(1, *info.shape))  # one row, as transformers has it
        if part in REORDERED.get(architecture, ()):
            count = heads if part == "attn_q" else key_heads
            if type(count) is not int:
                raise UnsupportedMethodError(
                    path,
                    f"the number of heads is {str(count)[:40]}, and one number is needed to put rows in order",
                    name,
                )
            check_heads(info, count)
            assert isinstance(info, GgufTensor)
            placed = replace(info, name=renamed, heads=count)
        tensors[renamed] = placed
    config: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    if mixture:
        config["hidden_size"] = gguf.fields.get(f"{architecture}.embedding_length")
    told = {key: value for key, value in config.items() if type(value) is int}
    return tensors, told | ({"model_type": MIXTURES[architecture]} if mixture else {})


def _under_ggufs_names(path: Path, gguf: GgufFile, architecture: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The tensors as the file has them, but for stacks of experts, which are named as elsewhere to be cut."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in gguf.tensors.items():
        stack = _STACK.fullmatch(name)
        own = name if stack is None else f"{stack[1]}.experts.{stack[2]}_proj" + ("_bias" * (stack[3] == "bias"))
        if own in tensors:
            raise CorruptFileError(path, f"malformed: {own!r} is there under two names", name)
        tensors[own] = replace(info, name=own)
    return tensors, {"model_type": OWN, ARCHITECTURE: architecture}
