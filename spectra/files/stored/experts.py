"""Mixtures of experts: stacks of matrices cut into one an expert, and the forms in which experts are stored.

=================  =============================================  ====================================================
form               tensors                                        written by
=================  =============================================  ====================================================
a file an expert   ``X.experts.3.gate_proj.weight`` (i, h), …     most models on the hub; Mixtral's are w1, w3 and w2
stacked            ``X.experts.gate_up_proj`` (E, 2i, h) and      transformers 5 in memory
                   ``X.experts.down_proj`` (E, h, i)
stacked, turned    (E, h, 2i) and (E, i, h)                       gpt_oss, llama4, aria, early qwen3_vl_moe
=================  =============================================  ====================================================

Names, order and direction are those of transformers 5.23 (conversion_mapping.py and the models themselves).  Stacks
become weights (out, in) named as files an expert are: ``X.experts.3.gate_up_proj.weight``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from spectra.files.derived import Alternative, Derived, Unreadable, Weight, Weights, sources_of
from spectra.files.gguf.names import OWN
from spectra.files.stored.rows import Joined, Member, Part, Rows, Same, Turned

# Families whose stacks are (E, out, in) or (E, in, out), and those in which gate and up take turns, row by row.
STRAIGHT = frozenset(
    {"nemotron_h", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"}
)
TURNED = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})
INTERLEAVED = frozenset({"gpt_oss"})
# Families in which gate lies above up, as their models in transformers 5.23 split what comes of both.
GATE_FIRST = frozenset([
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "exaone_moe",
    "flex_olmo", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba",
    "jetmoe", "kimi_linear", "laguna", "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash",
    "minimax", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "mistral4", "mixtral", "olmoe",
    "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "solar_open", "step3p5", "zaya",
])  # fmt: skip
# Families whose experts' files are called w1, w3 and w2, and whose block transformers 5 renamed to mlp.
LETTERED = frozenset({"mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe", "deepseek_v4", "minimax_m3_vl"})
RENAMED = frozenset({"mixtral", "minimax", "minimax_m2", "phimoe", "minimax_m3_vl"})

FUSED = "gate_up_proj"
FROM_HIDDEN = frozenset({FUSED, "gate_proj", "up_proj", "w1", "w3", "v1", "fc1", "fc3", "input_linear"})
TO_HIDDEN = frozenset({"down_proj", "w2", "fc2", "output_linear"})
# What gpt-oss's experts are called where each is a linear module of its own, as Unsloth has them.
LISTED = {FUSED: "gate_up_projs", "down_proj": "down_projs"}
BIASES = "the biases of experts: vectors have no spectrum"
LETTERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# More experts than any model has; and how many weights may come of how many bytes, or a small file could name millions.
MAX_EXPERTS = 8192
MIN_WEIGHTS, BYTES_A_WEIGHT = 16_384, 1024

_STACK = re.compile(r"(?P<home>(?:.+\.)?experts)\.(?P<part>[a-z]\w*)(?:\.weight)?")
# Stacks that stand beside no "experts" in their names, and what transformers 5 calls them.
_GRANITE = re.compile(r"(?P<home>.+\.(?:block_sparse_moe|mlp))\.(?P<part>input_linear|output_linear)\.weight")  # JetMoe
_STEP = re.compile(r"(?P<home>.+\.moe)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_SWITCH = re.compile(r"(?P<home>.+)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")  # of MLX
_DBRX = re.compile(r"(?P<home>.+\.ffn\.experts)\.mlp\.(?P<part>w1|v1|w2)")
_CALLED = {"input_linear": FUSED, "output_linear": "down_proj"}
_BIASES = re.compile(r".*\bexperts\.[a-z]\w*_bias")
_EXPERT = re.compile(r"(?P<home>(?:.+\.)?experts\.\d+)\.(?P<part>[a-z]\w*)\.weight")
_ROUTERS = (".block_sparse_moe.gate.weight", ".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight",
            ".mlp.gate.weight", ".mlp.router.weight")  # fmt: skip


def experts(weights: Weights, config: Mapping[str, Any]) -> Iterator[Derived | Unreadable]:
    """One matrix (out, in) for each expert of each stack; what cannot be cut is unreadable, with the reason."""
    stacks: dict[str, dict[str, Weight]] = defaultdict(dict)
    left = MIN_WEIGHTS + sum(info.span[1] for info in weights.values()) // BYTES_A_WEIGHT
    for name, info in weights.items():
        if isinstance(info, Unreadable):
            continue
        if len(info.shape) == 2 and name.endswith("_bias") and _BIASES.fullmatch(name):
            yield _unreadable(info, BIASES)
        match = _DBRX.fullmatch(name) if len(info.shape) == 2 else None
        if match:
            made = list(_dbrx(info, match["home"], match["part"], config, left))
            left -= len(made)
            yield from made
        elif len(info.shape) == 3:
            match = (
                _STACK.fullmatch(name) or _GRANITE.fullmatch(name) or _STEP.fullmatch(name) or _SWITCH.fullmatch(name)
            )
            if match:
                home, part = match["home"], match["part"]
                if home.rpartition(".")[2] != "experts":  # JetMoe's attention has input_linear of experts, too: no gate
                    home, part = f"{home}.experts", _CALLED.get(part, part)
                stacks[home][part] = info
    for home, stack in stacks.items():
        if stack.keys() >= {"fc1", "fc2"} and (_family(config) or "").startswith("aria"):
            stack = {{"fc1": FUSED, "fc2": "down_proj"}.get(part, part): info for part, info in stack.items()}
        for part, info in stack.items():
            turned = _turned(part, stack, config)
            problem = _problem(part, info, turned, left)
            if problem:
                yield _unreadable(info, problem)
                continue
            left -= info.shape[0]
            yield from members(info, home, part, bool(turned))


def _problem(part: str, info: Weight, turned: bool | None, left: int) -> str | None:
    """Why a stack is not cut, or None."""
    if part not in FROM_HIDDEN | TO_HIDDEN:
        return "a stack of experts of a name that is not known, so that it cannot be told what its dimensions are"
    if not info.is_float:
        return f"a stack of experts stored as {info.dtype}: not read"
    if 0 in info.shape:
        return "empty"
    if info.shape[0] > min(MAX_EXPERTS, left):
        return f"a stack of {info.shape[0]:,} experts: more than any model has"
    if turned is None:
        return (
            "a stack of experts of which it cannot be told whether they are stored (out, in) or (in, out): "
            "config.json with model_type and hidden_size would say"
        )
    return None


def _turned(part: str, stack: Mapping[str, Weight], config: Mapping[str, Any]) -> bool | None:
    """Whether a stack is (E, in, out) rather than (E, out, in); None where it cannot be told.

    By the stack that goes with it, since gate and up together are twice as wide as what down takes; else by
    ``hidden_size``, else, where that is both dimensions, by the family.  ggml has all of them (E, out, in).
    """
    if _family(config) == OWN:
        return False
    if FUSED in stack and "down_proj" in stack:
        (_, a, b), (_, c, d) = stack[FUSED].shape, stack["down_proj"].shape
        straight, across = (b == c and a == 2 * d), (a == d and b == 2 * c)
        if straight != across:
            return across
    values = _text(config)
    hidden, (_, rows, columns) = values.get("moe_latent_size") or values.get("hidden_size"), stack[part].shape
    if rows != columns and hidden in (rows, columns):
        return bool(hidden == rows) == (part in FROM_HIDDEN)
    family = _family(config)
    return None if rows != columns or family not in TURNED | STRAIGHT else family in TURNED


def members(info: Weight, home: str, part: str, turned: bool) -> Iterator[Derived]:
    """A stack (E, out, in), or (E, in, out) where ``turned``, cut into matrices ``home.3.part.weight``."""
    count, *shape = info.shape
    own, size = (shape[1], shape[0]) if turned else (shape[0], shape[1]), info.span[1] // count
    for index in range(count):
        yield _derived(
            info, f"{home}.{index}.{part}.weight", own, Member(info, index, turned), _how(info, index, turned),
            part_of=info.name,
            span=info.span if isinstance(info, Derived) else (info.span[0] + index * size, size),
        )  # fmt: skip


def _how(info: Weight, index: int, turned: bool) -> str:
    return f"expert {index} of {info.name}" + (", turned, since it is stored (in, out)" if turned else "")


def _dbrx(info: Weight, home: str, part: str, config: Mapping[str, Any], left: int) -> Iterator[Derived | Unreadable]:
    """DBRX: (E·i, h), of which w2 is applied as it is, and so is stored (in, out)."""
    options = config.get("ffn_config")
    count = options.get("moe_num_experts") if isinstance(options, Mapping) else None
    if type(count) is not int or not 0 < count <= min(MAX_EXPERTS, left) or info.shape[0] % count or 0 in info.shape:
        told = "is not given" if count is None else f"= {str(count)[:40]} does not fit"
        yield _unreadable(info, f"a stack of experts of which ffn_config.moe_num_experts in config.json {told}")
        return
    width, turned = info.shape[0] // count, part == "w2"
    size = info.span[1] // count
    for index in range(count):
        rows = Rows(1, info.shape[0], index * width, (index + 1) * width)
        own = (info.shape[1], width) if turned else (width, info.shape[1])
        yield _derived(
            info, f"{home}.{index}.{part}.weight", own, Turned(Part(info, rows)) if turned else Part(info, rows),
            _how(info, index, turned), part_of=info.name, span=(info.span[0] + index * size, size),
        )  # fmt: skip


def is_expert(name: str) -> bool:
    """Whether a weight is that of one expert."""
    return _EXPERT.fullmatch(name) is not None


def takes_turns(family: str | None) -> bool | None:
    """Whether gate and up take turns, row by row, in a family's fused matrices; None where that is not known."""
    return family in INTERLEAVED if family in INTERLEAVED | GATE_FIRST else None


def other_forms(
    weights: Weights, config: Mapping[str, Any], tuned: Mapping[str, Any]
) -> Iterator[Alternative | Unreadable]:
    """Experts, and what chooses among them, in the forms and under the names that other writers use.

    They serve fine-tunes whose form is not the base's.  The order of gate and up in one matrix is that of the model
    that has them so: the fine-tune, by its config ``tuned``, or the base; each stands in for the other.
    """
    family, theirs = _family(config), _family(tuned)
    named = family is not None
    joined, halved = theirs or family, family or theirs
    homes: dict[str, dict[str, Weight]] = defaultdict(dict)
    for name, info in weights.items():
        if isinstance(info, Unreadable) or len(info.shape) != 2:
            continue
        expert = _EXPERT.fullmatch(name)
        if expert:
            homes[expert["home"]][expert["part"]] = info
            continue
        if name.endswith(_ROUTERS):
            yield from _routers(info, family, named)
    for home, parts in homes.items():
        if parts.keys() >= {"v1", "w1", "w2"}:  # DBRX's own, in which w1 and v1 are gate and up
            continue
        plain = {LETTERS.get(part, part): info for part, info in parts.items()}
        lettered = not named or family in LETTERED
        for own in (home, *_renamed(home, family, named)):
            for part, info in plain.items():
                yield from _same(info, own, part, lettered)
                if part in LISTED and (not named or family in INTERLEAVED):
                    stack, _, number = own.rpartition(".")
                    yield _alias(info, f"{stack}.{LISTED[part]}.{number}.weight")
            gate, up = plain.get("gate_proj"), plain.get("up_proj")
            if gate is not None and up is not None and gate.shape == up.shape and gate.dtype == up.dtype:
                yield _fused(gate, up, f"{own}.{FUSED}.weight", joined)
            if FUSED in plain and plain[FUSED].shape[0] % 2 == 0:
                yield from _halves(plain[FUSED], own, lettered, halved)


def _routers(info: Weight, family: str | None, named: bool) -> Iterator[Alternative]:
    """What else the matrix is called that chooses among the experts."""
    if info.name.endswith(".mlp.router.weight") and (not named or family in INTERLEAVED):
        yield _alias(info, info.name.replace(".router.weight", ".router.linear.weight"))
    pairs = [(".block_sparse_moe.router.layer.", ".block_sparse_moe.router.")]
    if not named or family in RENAMED:
        pairs.append((".block_sparse_moe.gate.", ".mlp.router." if family == "phimoe" else ".mlp.gate."))
    for here, there in pairs + [(there, here) for here, there in pairs]:
        if here + "weight" in info.name:
            yield _alias(info, info.name.replace(here + "weight", there + "weight"))


def _renamed(home: str, family: str | None, named: bool) -> Iterator[str]:
    """What transformers 5 and the hub call the block of Mixtral and its like."""
    if home.endswith(".block_sparse_moe") or ".block_sparse_moe." in home:
        if not named or family in RENAMED:
            yield re.sub(r"\.block_sparse_moe(?=\.|$)", ".mlp", home)
    elif family in RENAMED:
        yield re.sub(r"\.mlp(?=\.|$)", ".block_sparse_moe", home)


def _same(info: Weight, home: str, part: str, lettered: bool) -> Iterator[Alternative]:
    names = {part, *(letter for letter, plain in LETTERS.items() if plain == part and lettered)}
    for name in names:
        if f"{home}.{name}.weight" != info.name:
            yield _alias(info, f"{home}.{name}.weight")


def _alias(info: Weight, name: str) -> Alternative:
    return _alternative(info, name, info.shape, Same(info), f"{_of(info)}", (info.name,))


def _fused(gate: Weight, up: Weight, name: str, family: str | None) -> Alternative | Unreadable:
    interleaved = takes_turns(family)
    if interleaved is None:
        return _unordered(name, family, gate, up)
    how = f"{_of(gate)} and {_of(up)}, " + ("row by row" if interleaved else "one below the other")
    shape = (2 * gate.shape[0], gate.shape[1])
    return _alternative(gate, name, shape, Joined((gate, up), interleaved), how, (gate.name, up.name))


def _unordered(name: str, family: str | None, *used: Weight) -> Unreadable:
    """What cannot be compared, since the order of gate and up is the family's own."""
    known = f"not known of model_type {family[:60]!r}" if family else "the family's own, and no config gives model_type"
    return Unreadable(
        name, used[0].dtype, (), used[0].file, used[0].span,
        sources=tuple(source for info in used for source in sources_of(info)), uses=tuple(info.name for info in used),
        reason="gate and up are one matrix in the base or the fine-tune, and apart in the other: whether they lie one "
        f"below the other or take turns is {known}",
    )  # fmt: skip


def _halves(fused: Weight, home: str, lettered: bool, family: str | None) -> Iterator[Alternative | Unreadable]:
    half, interleaved = fused.shape[0] // 2, takes_turns(family)
    for place, part in enumerate(("gate_proj", "up_proj")):
        rows = Rows(half, 2, place, place + 1) if interleaved else Rows(1, 2 * half, place * half, (place + 1) * half)
        names = (part, *(letter for letter, plain in LETTERS.items() if plain == part and lettered))
        for name in names:
            if interleaved is None:
                yield _unordered(f"{home}.{name}.weight", family, fused)
                continue
            yield _alternative(
                fused, f"{home}.{name}.weight", (half, fused.shape[1]), Part(fused, rows),
                f"{rows} of {_of(fused)}", (fused.name,),
            )  # fmt: skip


def _alternative(
    info: Weight, name: str, shape: tuple[int, ...], make: Any, how: str, uses: tuple[str, ...]
) -> Alternative:
    sources = tuple(dict.fromkeys(source for part in _parts(make) for source in sources_of(part)))
    quantised = info.quantised if isinstance(info, Derived) else None
    return Alternative(
        name, info.dtype, shape, info.file, info.span, sources=sources, make=make, how=how, quantised=quantised,
        whole=False, uses=uses,
    )  # fmt: skip


def _parts(make: Any) -> tuple[Weight, ...]:
    return tuple(make.weights) if isinstance(make, Joined) else (make.weight,)


def _derived(
    info: Weight, name: str, shape: tuple[int, ...], make: Any, how: str, *, part_of: str, span: tuple[int, int]
) -> Derived:
    quantised = info.quantised if isinstance(info, Derived) else None
    if isinstance(info, Derived):
        how = f"{how} ({info.how})"
    return Derived(
        name, info.dtype, shape, info.file, span, sources=sources_of(info), make=make, how=how, quantised=quantised,
        part_of=part_of,
    )  # fmt: skip


def _unreadable(info: Weight, reason: str) -> Unreadable:
    return Unreadable(info.name, info.dtype, (), info.file, info.span, sources=sources_of(info), reason=reason)


def _of(info: Weight) -> str:
    return info.how if isinstance(info, Derived) else info.name


def _family(config: Mapping[str, Any]) -> str | None:
    family = _text(config).get("model_type")
    return family if isinstance(family, str) else None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
