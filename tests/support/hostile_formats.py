"""More hostile cases: quantised bases, PEFT's further options, indices of pickles, names in their thousands.

They are registered beside those of ``tests/support/hostile.py``, which runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.hostile import (
    CONFIG,
    DEEP,
    FILE,
    WEIGHTS,
    A,
    Arguments,
    B,
    K,
    Q,
    adapter,
    besides,
    bomb,
    case,
    config_case,
    entry,
    factors_case,
    raw,
    shards,
    whole,
)

_config: Any
_words: tuple[str, ...]
_tensors: dict[str, Any]

# Four bits of bitsandbytes: a weight of 8 × 8 in 32 bytes, and what says how it is to be read.

STATE = "quant_state.bitsandbytes__nf4"
SAID: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 8]}
NESTED: dict[str, Any] = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}


def four_bits(said: Any, **sizes: int) -> Callable[[Path], Arguments]:
    """An audit of a LoRA against a base whose quant_state is ``said``; ``sizes`` are of the tensors beside it."""

    def build(box: Path) -> Arguments:
        text = said if isinstance(said, bytes) else json.dumps(said).encode()
        header, at = {}, 0
        for name, dtype, width, size in (
            ("", "U8", 1, sizes.get("packed", 32)),
            (".absmax", "F32", 4, sizes.get("absmax", 1)),
            (".quant_map", "F32", 4, sizes.get("quant_map", 16)),
            (f".{STATE}", "U8", 1, len(text)),
        ):
            shape = (size, 1) if not name else (size,)
            header[Q + name] = entry(shape, at, at + width * size, dtype)
            at += width * size
        raw(box / FILE, header, bytes(at - len(text)) + text)
        (box.parent / "tuned").mkdir()
        adapter(box.parent / "tuned")
        return ["audit", str(box.parent / "tuned"), "--base", str(box)]

    return build


for _name, _said in (
    ("a shape that is a word", {"shape": "8x8"}),
    ("a shape that is null", {"shape": None}),
    ("a shape of words", {"shape": ["8", "8"]}),
    ("a negative shape", {"shape": [-8, -8]}),
    ("an enormous shape", {"shape": [2**31, 2**31]}),
    ("a shape of 2^80", {"shape": [2**80, 2**80]}),
    ("a shape of thousands", {"shape": [1] * 1000}),
    ("a shape that does not fit", {"shape": [8, 9]}),
    ("a block size of nothing", {"blocksize": 0}),
    ("a block size that is true", {"blocksize": True}),
    ("a block size that is a list", {"blocksize": [64]}),
    ("a block size that is enormous", {"blocksize": 2**62}),
    ("a type that is another", {"quant_type": "fp4"}),
    ("a type that is an object", {"quant_type": {"nf4": 1}}),
    ("nested blocks of nothing", NESTED | {"nested_blocksize": 0}),
    ("a nested offset of 400 digits", NESTED | {"nested_offset": 10**400}),
    ("a nested offset that is NaN", NESTED | {"nested_offset": float("nan")}),
    ("nested scales that are missing", NESTED),
):
    case(f"quantised: {_name}", FILE, Q)(four_bits(SAID | _said))
for _name, _bytes in (
    ("not UTF-8", b'{"shape": "\xff"}'),
    ("deep", b'{"shape":' + b"[" * 4000),
    ("a list", b"[]"),
    ("nothing", b" "),
    ("larger than any", b'{"shape": [8, 8]}' + b" " * DEEP),
):
    case(f"quantised: a state that is {_name}", FILE, Q)(four_bits(_bytes))
case("quantised: too few scales", FILE, Q)(four_bits(SAID | {"blocksize": 32}))
case("quantised: too many scales", FILE, Q)(four_bits(SAID, absmax=2))
case("quantised: a map of 15 values", FILE, Q)(four_bits(SAID, quant_map=15))
case("quantised: a map of nothing", FILE, Q)(four_bits(SAID))
case("quantised: too few bytes", FILE, Q)(four_bits(SAID, packed=31))


def eight_bits(box: Path, header: dict[str, Any], config: Any) -> Arguments:
    """An audit of a LoRA against a base with these tensors, of no more than 4096 bytes of zeros."""
    raw(box / FILE, header, bytes(max(said["data_offsets"][1] for said in header.values())))
    (box / "config.json").write_text(json.dumps(config))
    (box.parent / "tuned").mkdir()
    adapter(box.parent / "tuned")
    return ["audit", str(box.parent / "tuned"), "--base", str(box)]


FP8 = {Q: entry((8, 8), 0, 64, "F8_E4M3"), f"{Q}_scale_inv": entry((2, 2), 64, 80)}
for _name, _header, _config in (
    ("blocks of nothing", FP8, {"quant_method": "fp8", "weight_block_size": [0, 0]}),
    ("blocks that are words", FP8, {"quant_method": "fp8", "weight_block_size": ["a", "b"]}),
    ("blocks that are negative", FP8, {"quant_method": "fp8", "weight_block_size": [-128, 128]}),
    ("scales of another shape", FP8 | {f"{Q}_scale_inv": entry((3, 3), 64, 100)}, {"quant_method": "fp8"}),
    ("scales alone", {f"{Q}_scale_inv": entry((1, 1), 0, 4)}, {"quant_method": "fp8"}),
    ("rows of SCB too few", {Q: entry((8, 8), 0, 64, "I8"), Q.replace("weight", "SCB"): entry((7,), 64, 92)}, {}),
    ("SCB alone", {Q.replace("weight", "SCB"): entry((8,), 0, 32)}, {}),
):
    case(f"quantised: {_name}", Q.removesuffix(".weight") if "alone" in _name else "")(
        partial(eight_bits, header=_header, config={"model_type": "llama", "quantization_config": _config})
    )

# PEFT's further options.

for _name, _words, _config in (
    ("layers replicated a billion times", ("layer_replication",), {"layer_replication": [[0, 10**9]]}),
    ("layers replicated, often", ("layer_replication",), {"layer_replication": [[0, 90_000]] * 40}),
    ("layers replicated to below nothing", ("layer_replication",), {"layer_replication": [[-5, 2]]}),
    ("layers replicated backwards", ("layer_replication",), {"layer_replication": [[4, 2]]}),
    ("layers replicated by words", ("layer_replication",), {"layer_replication": [["0", "2"]]}),
    ("layers replicated by halves", ("layer_replication",), {"layer_replication": [[0, 1.5]]}),
    ("layers replicated by truths", ("layer_replication",), {"layer_replication": [[False, True]]}),
    ("layers replicated by a word", ("layer_replication",), {"layer_replication": "all"}),
    ("layers replicated by 2^400", ("layer_replication",), {"layer_replication": [[2**400, 2**400 + 1]]}),
    ("target parameters that are a word", ("target_parameters",), {"target_parameters": "mlp.experts.down_proj"}),
    ("target parameters that are numbers", ("target_parameters",), {"target_parameters": [1, 2]}),
    ("target parameters that are lists", ("target_parameters",), {"target_parameters": [["a"]]}),
    ("target parameters that are an object", ("target_parameters",), {"target_parameters": {"a": 1}}),
):  # fmt: skip
    config_case(_name, _words, **_config)
case("a layer that is not replicated", "layer_replication")(
    lambda box: adapter(
        box,
        {A.replace("layers.0", "layers.9"): np.ones((2, 8)), B.replace("layers.0", "layers.9"): np.ones((8, 2))},
        layer_replication=[[0, 2]],
    )
)
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
for _name, _tokens in (
    ("fewer than rows", [1, 2]),
    ("one of them twice", [1, 1, 2]),
    ("one of them negative", [-1, 0, 1]),
    ("one of them enormous", [0, 1, 2**62]),
    ("that are words", ["a", "b", "c"]),
    ("that are a word", "abc"),
    ("that are an object of nothing", {}),
    ("of two modules alike", {"embed_tokens": [0, 1, 2], "tokens": [0, 1, 2]}),
    ("that are not named", None),
):

    def _trained(box: Path, tokens: Any = _tokens) -> None:
        adapter(box, {A: np.ones((2, 8)), B: np.ones((8, 2)), TOKENS: np.ones((3, 8))}, trainable_token_indices=tokens)

    case(f"trained tokens {_name}", "oken")(_trained)

INIT: dict[str, Any] = {"init_lora_weights": "pissa_niter_4"}


def initial(box: Path, name: str) -> Arguments:
    """A LoRA whose initialisation is asked for, with something else in its place."""
    adapter(box, **INIT)
    place = box.parent / "initial"
    if name != "missing":
        place.mkdir()
    if name == "model":
        whole(place / FILE)
    elif name == "other":
        adapter(place, {key.replace("q_proj", "k_proj"): np.ones((8, 8))[:2] for key in (A,)})
    elif name == "shape":
        adapter(place, {A: np.ones((2, 9)), B: np.ones((9, 2))})
    elif name == "pickle":
        adapter(place)
        (place / WEIGHTS).unlink()
        (place / "adapter_model.bin").write_bytes(bomb(box))
    elif name == "corrupt":
        adapter(place)
        (place / WEIGHTS).write_bytes(b"\xff" * 100)
    return ["audit", str(box), "--base", str(box.parent / "base"), "--initial-adapter", str(place)]


for _name in ("missing", "empty", "model", "other", "shape", "pickle", "corrupt"):
    case(f"an initial adapter: {_name}", "initial")(partial(initial, name=_name))
config_case("an initialisation that wants its adapter", ("init_lora_weights",), **INIT)

# Indices of pickles, folders of a pipeline.

BIN = "pytorch_model.bin.index.json"
for _place in (
    "../outside/canary.bin",
    "/etc/canary.bin",
    "C:\\canary.bin",
    "\\\\host\\a.bin",
    ".a.bin",
    "a.safetensors",
    3,
):

    def _bins(box: Path, place: Any = _place, allowed: bool = True) -> Arguments:
        (box / "pytorch_model-00001-of-00002.bin").write_bytes(bomb(box))
        weight_map = {Q: place, K: "pytorch_model-00001-of-00002.bin"}
        (box / BIN).write_text(json.dumps({"weight_map": weight_map}))
        return ["audit", str(box), "--base", str(box.parent / "base"), *["--allow-pickle"] * allowed]

    case(f"pickled shards, one named {_place!r}", BIN, "plain")(_bins)
case("pickled shards that write", "pickle")(lambda box: _bins(box, "pytorch_model-00001-of-00002.bin", False))


def pipeline(box: Path, components: Any) -> None:
    (box / "model_index.json").write_text(json.dumps(components))
    (box / "unet").mkdir()


for _name, _components in (
    ("climb out", {"../outside": ["diffusers", "UNet2DConditionModel"], "_class_name": "x"}),
    ("are absolute", {"/etc": ["diffusers", "UNet2DConditionModel"]}),
    ("are numbers", {"unet": 3, "vae": [1, 2]}),
    ("are a list", ["unet"]),
    ("are deep", [[[[]]]]),
    ("are empty", {"unet": ["diffusers", "UNet2DConditionModel"]}),
):
    case(f"components that {_name}", "box")(partial(pipeline, components=_components))


@case("a component that links out", "box")
def _(box: Path) -> None:
    pipeline(box, {"vae": ["diffusers", "x"]})
    (box / "vae").symlink_to("../outside")


# Names.

ENDS = 10_000


def alike(box: Path) -> Arguments:
    """Thousands of weights whose names end alike on both sides, none of which is the other's."""
    for home, start in ((box, "a"), (box.parent / "alike", "b")):
        home.mkdir(exist_ok=True)
        names = [f"{start}{i}.model.layers.{i % 7}.self_attn.q_proj.weight" for i in range(ENDS)]
        raw(
            home / FILE,
            {name: entry((8, 8), 256 * i, 256 * i + 256) for i, name in enumerate(names)},
            bytes(256 * ENDS),
        )
    return ["audit", str(box), "--base", str(box.parent / "alike")]


case("thousands of names that end alike", "box", mib=64.0)(alike)  # so many tensors take their room
DOTS = ".".join("a" * 240)
for _name, _words, _tensors in (
    ("a name of dots", (WEIGHTS,), {"." * 480 + "lora_A.weight": (2, 8)}),
    ("a module of many parts", (WEIGHTS, "wrong base"),
     {f"{DOTS}.lora_A.weight": (2, 8), f"{DOTS}.lora_B.weight": (8, 2)}),
    ("a name that only looks like another", (WEIGHTS, "wrong base"),
     {A.replace("q_proj", "q_pr\u043ej"): (2, 8), B.replace("q_proj", "q_pr\u043ej"): (8, 2)}),
    ("a name in capitals", (WEIGHTS, "wrong base"),
     {A.replace("q_proj", "Q_PROJ"): (2, 8), B.replace("q_proj", "Q_PROJ"): (8, 2)}),
    ("a name with a joiner nobody sees", ("control characters",), {A.replace("q_proj", "q\u200b_proj"): (2, 8)}),
    ("a name with a bell", ("control characters",), {A.replace("q_proj", "q\x07"): (2, 8)}),
    ("a name of nothing", ("box",), {"": (2, 8)}),
    ("a name of a path", (WEIGHTS,), besides("base_model.model.model.", "../../outside/")),
):  # fmt: skip
    factors_case(_name, _words, _tensors)


@case("shards that differ in capitals", "twice")
def _(box: Path) -> None:
    shards(box)
    text = json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors", K: "model-00002-of-00002.safetensors"}})
    (box / "model.safetensors.index.json").write_text(text.replace(K, Q))


@case("an adapter of quantised states", CONFIG)
def _(box: Path) -> None:
    adapter(box, quantization_config={"bits": 4})
