"""Projections stored in one matrix, which are its rows in an order that is the family's own.

By default such a matrix is analysed as it is stored.  On request it is split into the weights that other families
store apart, ``X.q_proj``, ``X.k_proj`` and ``X.v_proj``, ``X.gate_proj`` and ``X.up_proj``, as transformers 5.23 (and,
for models that are not in it, their authors' code) split the output:

===========  ========================================================================================================
thirds       q, k and v, as long as each other: GPT-2, MPT, ModernBERT, Baichuan, torch's MultiheadAttention; the qkv
             of image transformers that come without a config of transformers
grouped      all of q, then the fewer heads of k and v: Phi-3, DBRX, multi-query GPT-BigCode, ChatGLM, Falcon-7B
by head      q, k and v of the first head, then of the next: GPT-NeoX, BLOOM, Falcon-RW, Persimmon
by group     the queries of a group of heads, its key, its value, then the next: Falcon-40B and 180B, InternLM2
by device    in quarters, each q, v, k: CodeGen
halves       gate, then up: Phi-3, GLM-4; of experts as stored/experts.py knows it
===========  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from spectra.files.derived import Derived, Unreadable, Weight, Weights, sources_of
from spectra.files.stored.experts import is_expert, takes_turns
from spectra.files.stored.rows import Part, Rows

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
# What modules with several projections are called, and what the same are called where they are apart.
FUSED_QKV = ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "c_attn", "W_pack", "qkv", "in_proj_weight")
FUSED_GATED = ("gate_up_proj", "dense_h_to_4h")
SYNONYMS_QKV = (
    ("q_proj", "query", "q", "wq", "q_lin", "to_q"),
    ("k_proj", "key", "k", "wk", "k_lin", "to_k"),
    ("v_proj", "value", "v", "wv", "v_lin", "to_v"),
)
SYNONYMS_GATED = (("gate_proj", "w1"), ("up_proj", "w3"))
APART_QKV = frozenset(chain.from_iterable(SYNONYMS_QKV))
APART_GATED = frozenset(chain.from_iterable(SYNONYMS_GATED))
PROJECTIONS = frozenset({*APART_QKV, *APART_GATED, *FUSED_QKV, *FUSED_GATED})

Splitter = Callable[["_Fields", tuple[int, int]], "dict[str, Rows]"]


class _Missing(Exception):
    """What could not be told."""


class _Fields:
    """The whole numbers and switches of a config, of which the first name that is there counts."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    def number(self, *names: str) -> int:
        field = self._first(names)
        if field is None:
            raise _Missing(f"config.json does not give {' or '.join(names)}")
        name, value = field
        if type(value) is not int or not 0 < value < 1 << 24:
            raise _Missing(f"config.json gives {name} = {str(value)[:40]!r}, where a whole number above 0 is expected")
        return value

    def switch(self, name: str, default: bool) -> bool:
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise _Missing(f"config.json gives {name} = {str(value)[:40]!r}, where true or false is expected")
        return value

    def has(self, *names: str) -> bool:
        return self._first(names) is not None

    def within(self, name: str) -> _Fields:
        value = self._config.get(name)
        return _Fields(value if isinstance(value, Mapping) else {})

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any] | None:
        return next(((name, self._config[name]) for name in names if self._config.get(name) is not None), None)

    def heads(self) -> int:
        return self.number("num_attention_heads", "n_head", "n_heads", "num_heads")

    def head_dim(self) -> int:
        if self.has("head_dim", "kv_channels"):
            return self.number("head_dim", "kv_channels")
        hidden = self.number("hidden_size", "n_embd", "d_model", "n_embed")
        heads = self.heads()
        if hidden % heads:
            raise _Missing(f"config.json gives {hidden} hidden dimensions and {heads} heads, which do not go together")
        return hidden // heads


def _following(names: tuple[str, ...], counts: tuple[int, ...], groups: int = 1) -> dict[str, Rows]:
    """Each name's rows where, in each group, so many of each follow each other."""
    parts, at = {}, 0
    for name, count in zip(names, counts, strict=True):
        parts[name] = Rows(groups, sum(counts), at, at + count)
        at += count
    return parts


def _thirds(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    size = shape[1] if shape[0] == 3 * shape[1] else fields.heads() * fields.head_dim()
    return _following(QKV, (size,) * 3)


def _attention(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if shape[0] == 2 * shape[1]:  # of cross-attention, whose queries are apart
        return _following(QKV[1:], (shape[1],) * 2)
    return _thirds(fields, shape)


def _grouped(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    heads, size = fields.heads(), fields.head_dim()
    keys = fields.number("num_key_value_heads", "num_kv_heads") * size
    return _following(QKV, (heads * size, keys, keys))


def _by_head(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    return _following(QKV, (fields.head_dim(),) * 3, fields.heads())


def _by_group(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    heads, size = fields.heads(), fields.head_dim()
    groups = fields.number("num_key_value_heads", "num_kv_heads", "n_head_kv")
    if heads % groups:
        raise _Missing(f"config.json gives {heads} heads and {groups} of keys, which do not go together")
    return _following(QKV, (heads // groups * size, size, size), groups)


def _falcon(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if fields.switch("new_decoder_architecture", False) or fields.has("n_head_kv"):
        return _by_group(fields, shape)
    if not fields.switch("multi_query", True):
        return _by_head(fields, shape)
    size = fields.head_dim()
    return _following(QKV, (fields.heads() * size, size, size))


def _bigcode(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if not fields.switch("multi_query", True):
        return _by_head(fields, shape)
    size = fields.head_dim()
    return _following(QKV, (fields.heads() * size, size, size))


def _chatglm(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if not fields.switch("multi_query_attention", False):
        return _by_head(fields, shape)
    size = fields.number("kv_channels")
    keys = fields.number("multi_query_group_num") * size
    return _following(QKV, (fields.heads() * size, keys, keys))


def _dbrx(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    size = fields.head_dim()
    keys = fields.within("attn_config").number("kv_n_heads") * size
    return _following(QKV, (fields.heads() * size, keys, keys))


def _codegen(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    size = fields.heads() * fields.head_dim()
    if size % 4:
        raise _Missing(f"config.json gives {size} dimensions to all heads, which are not in quarters")
    return _following(("q_proj", "v_proj", "k_proj"), (size // 4,) * 3, 4)


def _halves(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if shape[0] % 2:
        raise _Missing(f"{shape[0]} rows are no two of one length")
    return _following(GATED, (shape[0] // 2,) * 2)


def _turns(fields: _Fields, shape: tuple[int, int]) -> dict[str, Rows]:
    if shape[0] % 2:
        raise _Missing(f"{shape[0]} rows are no pairs")
    return _following(GATED, (1, 1), shape[0] // 2)


# (family, module) → how it is split.  ModernBERT's and others' gate without a gate_up_proj stays whole.
SPLITTERS: dict[tuple[str, str], Splitter] = {
    **{(family, "query_key_value"): _by_head for family in ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")},
    **{(family, "query_key_value"): _falcon for family in ("falcon", "RefinedWeb", "RefinedWebModel")},
    ("chatglm", "query_key_value"): _chatglm,
    ("chatglm", "dense_h_to_4h"): _halves,
    **{(family, "c_attn"): _attention for family in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")},
    ("qwen", "c_attn"): _thirds,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("phi3", "qkv_proj"): _grouped,
    ("minimax", "qkv_proj"): _by_head,
    ("codegen", "qkv_proj"): _codegen,
    **{(family, "Wqkv"): _thirds for family in ("mpt", "modernbert")},
    ("dbrx", "Wqkv"): _dbrx,
    ("internlm2", "wqkv"): _by_group,
    ("baichuan", "W_pack"): _thirds,
    **{(family, "gate_up_proj"): _halves for family in ("phi3", "glm", "glm4", "glm4v_text")},
}
# Families whose linear modules store (in, out).
_TURNED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


def split_fused(weights: Weights, config: Mapping[str, Any]) -> Iterator[Derived | Unreadable]:
    """The projections of every module that has several in one matrix.

    Unreadable, with the reason, where the family or a field that would tell how a module is split is not known.
    """
    for name, info in weights.items():
        fused = fused_module(name)
        if fused == "dense_h_to_4h" and (_family(name, config), fused) not in SPLITTERS:
            continue  # most families' own is no gate
        if fused is None or isinstance(info, Unreadable) or len(info.shape) != 2 or not info.is_float:
            continue
        turned = is_turned(name, config)
        shape = (info.shape[1], info.shape[0]) if turned else (info.shape[0], info.shape[1])
        home = name.rpartition(".")[0] if fused == "in_proj_weight" else name.removesuffix(f".{fused}.weight")
        prefix = "" if home == f"{fused}.weight" or not home else f"{home}."
        try:
            parts = _parts(name, shape, config)
        except _Missing as problem:
            yield Unreadable(
                name, info.dtype, (), info.file, info.span, sources=sources_of(info), part_of=_whole_of(info),
                reason=f"{info.file}: tensor {name!r}: --split-fused cannot tell its projections apart: {problem}",
            )  # fmt: skip
            continue
        for part, rows in parts.items():
            how = f"{rows} of {info.name}" + (", turned, since it is stored (in, out)" if turned else "")
            how += f" ({info.how})" if isinstance(info, Derived) else ""
            yield Derived(
                f"{prefix}{part}.weight", info.dtype, (rows.count, shape[1]), info.file, info.span,
                sources=sources_of(info), make=Part(info, rows, turned), how=how,
                quantised=info.quantised if isinstance(info, Derived) else None, part_of=info.name,
            )  # fmt: skip


def fused_module(name: str) -> str | None:
    """What a weight's module is called, if it is a name for several projections in one; None for all others."""
    parts = name.split(".")
    module = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if module == "in_proj_weight":
        return module if parts[-1] == module else None
    return module if module in FUSED_QKV + FUSED_GATED and parts[-1] == "weight" else None


def is_turned(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a fused weight is stored (in, out)."""
    return fused_module(name) == "c_attn" and _family(name, config) in _TURNED


def _parts(name: str, shape: tuple[int, int], config: Mapping[str, Any]) -> dict[str, Rows]:
    """The rows of each projection in a fused matrix of ``shape`` (out, in); raises _Missing."""
    module, values, family = fused_module(name), _of_module(name, config), _family(name, config)
    if module == "in_proj_weight" or (module == "qkv" and not family and shape[0] == 3 * shape[1]):
        split: Splitter | None = _thirds  # the latter of image transformers, whose single files have no config
    elif not family:
        raise _Missing("config.json does not give model_type")
    elif is_expert(name):
        split = {True: _turns, False: _halves, None: None}[takes_turns(family)]
    else:
        split = SPLITTERS.get((family, str(module)))
    if split is None:
        raise _Missing(f"how {module} is ordered is not known of model_type {family[:60]!r}")
    parts = split(_Fields(values), shape)
    rows = next(iter(parts.values())).total
    if rows != shape[0]:
        raise _Missing(f"by config.json it has {rows} rows, not {shape[0]}")
    return parts


def _whole_of(info: Weight) -> str | None:
    """What a weight is a part of, which is not to come back where the part cannot be read."""
    return info.part_of if isinstance(info, Derived) else None


def apart(module: str) -> tuple[str, ...]:
    """What the modules may be called that hold a projection together with others, or those that hold its parts."""
    home, _, last = module.rpartition(".")
    prefix = f"{home}." if home else ""
    if last in APART_QKV:
        names: tuple[str, ...] = FUSED_QKV
    elif last in APART_GATED:
        names = FUSED_GATED
    elif last in FUSED_QKV:
        names = QKV
    else:
        names = GATED if last in FUSED_GATED else ()
    return tuple(f"{prefix}{name}" if name == "in_proj_weight" else f"{prefix}{name}.weight" for name in names)


def _family(name: str, config: Mapping[str, Any]) -> str:
    family = _of_module(name, config).get("model_type")
    return family if isinstance(family, str) else ""


def _of_module(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the model that a module is in: the language model, unless its name says."""
    kind = "vision_config" if any(part.startswith("vis") for part in name.split(".")) else "text_config"
    inner = config.get(kind)
    return inner if isinstance(inner, Mapping) else config
