"""What is read from outside, mutated without end: nothing but errors of our own may come out.

    python -m benchmarks.fuzz [--headers 1000000] [--workers 2] [--seed 0] [--scratch DIR]
    python -m benchmarks.fuzz --guided --seconds 300     # atheris (libFuzzer) in place of the engine here
    python -m benchmarks.fuzz --self-test                # are bugs that were planted in a copy found?

Headers, indices, configurations, GGUF files, pickles and their archives.  Guided by coverage: an input that reaches a
line of the package, or makes an error, that none before it did, is kept and mutated further.  Besides crashes, what
counts as one: a file that we accept and plain JSON, the safetensors library, gguf or torch reads otherwise, a message
without the file's path or of more than one line, more than two seconds.  A run is repeated exactly by its seed and
number of workers.  The first inputs are the fixtures' own.  ``--scratch`` is best a folder in memory.  Exits with 1 on
any finding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import spectra
from benchmarks.fuzz_files import BINARY, an_archive, compare, prepare, seeds_of, write_pipeline
from benchmarks.fuzz_files import NAMES as NAMES_OF_FILES
from benchmarks.fuzz_files import TOKENS as BINARY_TOKENS
from benchmarks.options import Options, Row
from spectra.adapters import plan_updates
from spectra.errors import SpectraError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived
from spectra.files.headers import BITS, TensorInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

TITLE = "Inputs made to break the readers, and bugs planted for them to find"
SECONDS = 2.0
PACKAGE = str(Path(spectra.__file__).parent)
FIXTURES = Path(__file__).parent.parent / "fixtures"
SHARE = {
    "header": 0.4, "index": 0.07, "config": 0.12, "mlx": 0.05, "model": 0.12, "state": 0.05, "gguf": 0.09,
    "pickle": 0.06, "archive": 0.02, "pipeline": 0.02,
}  # fmt: skip
TRACED = 0.1  # of the inputs; tracing costs ten times the reading, and what is new shows up soon enough
LONGEST = 6000  # bytes of an input
SLOW = 0.2  # seconds of CPU, from which on an input is not mutated further: patterns that take their half a second

A, B = (f"base_model.model.model.layers.0.q_proj.lora_{factor}.weight" for factor in "AB")


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SEEDS: dict[str, list[Any]] = {
    "header": [
        {"w": entry([2, 2], 0, 16)},
        {"__metadata__": {"format": "pt"}, "a.weight": entry([2, 1], 0, 4, "BF16"), "b.bias": entry([3], 4, 16)},
        {"w": entry([4, 8], 0, 16, "F4"), "none": entry([0, 4], 16, 16)},
        {},
    ],
    "index": [{"metadata": {"total_size": 16}, "weight_map": {"w": "a.safetensors"}}, {"weight_map": {}}],
    "config": [
        {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "b"},
        {"peft_type": "LORA", "r": 1, "use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q.*": 4}},
        {"peft_type": "VERA", "r": 4},
        {"peft_type": "IA3"},
        {"peft_type": "MISS", "r": 2, "init_weights": "bat", "bias": "none"},
        {"peft_type": "HIRA", "r": 1, "rank_pattern": {"q_proj": 1}, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 1, "layer_replication": [[0, 2], [1, 3]], "trainable_token_indices": [1, 2]},
        {"peft_type": "LORA", "r": 1, "target_parameters": ["mlp.experts.down_proj"], "init_lora_weights": "pissa"},
    ],
    "mlx": [
        {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 1, "scale": 20.0, "dropout": 0.0}},
        {"lora_parameters": {"rank": 1, "alpha": 16, "scale": 10.0}, "model": "b"},
        {"fine_tune_type": "dora", "lora_parameters": {"rank": 1, "scale": 1.0, "keys": ["q_proj"]}},
    ],
    "model": [
        {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 4},
        {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "model_type": "gpt2"},
        {"model_type": "llama", "quantization": {"group_size": 32, "bits": 4, "mode": "affine"}},
        {"quantization": {"group_size": 64, "bits": 2, "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 4},
                          "model.layers.0.mlp.gate_proj": {"mode": "mxfp4", "group_size": 32, "bits": 4}}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}}}}},
    ],
    "state": [
        {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 4]},
        {"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [4, 4], "nested_blocksize": 256,
         "nested_dtype": "float32", "nested_offset": 0.1},
    ],
}  # fmt: skip
# A weight in fp8 with its scales, one in four bits of GPTQ, one fused, one of experts, two of MLX; and one of
# bitsandbytes.
QUANTISED: tuple[dict[str, Any], int] = (
    {
        "model.layers.0.self_attn.q_proj.weight": entry([4, 4], 0, 16, "F8_E4M3"),
        "model.layers.0.self_attn.q_proj.weight_scale_inv": entry([2, 2], 16, 32),
        "model.layers.0.mlp.up_proj.qweight": entry([1, 8], 32, 64, "I32"),
        "model.layers.0.mlp.up_proj.qzeros": entry([1, 1], 64, 68, "I32"),
        "model.layers.0.mlp.up_proj.scales": entry([1, 8], 68, 84, "F16"),
        "model.layers.0.self_attn.qkv_proj.weight": entry([8, 4], 84, 212),
        "model.layers.0.mlp.experts.gate_up_proj": entry([2, 4, 2], 212, 276),
        "model.layers.0.mlp.down_proj.weight": entry([2, 4], 276, 308, "U32"),
        "model.layers.0.mlp.down_proj.scales": entry([2, 1], 308, 312, "F16"),
        "model.layers.0.mlp.down_proj.biases": entry([2, 1], 312, 316, "F16"),
        "model.layers.0.mlp.gate_proj.weight": entry([2, 4], 316, 348, "U32"),
        "model.layers.0.mlp.gate_proj.scales": entry([2, 1], 348, 350, "U8"),
    },
    350,
)
STATE = {
    "a.weight": entry([8, 1], 0, 8, "U8"),
    "a.weight.absmax": entry([1], 8, 12),
    "a.weight.quant_map": entry([16], 12, 76),
    "a.weight.nested_absmax": entry([1], 76, 80),
    "b.weight": entry([2, 2], 80, 96),
}
_ENDS = re.compile(rb"\[\s*\d+\s*,\s*(\d{1,9})\s*\]")
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"-1", b"0",
    b"1e9", b"18446744073709551616", b"9223372036854775807", b'"w"', b'"dtype"', b'"shape"', b'"data_offsets"',
    b'"F4"', b'"F64"', b'"BOOL"', b"__metadata__", b"[0,16]", b"[2,2]", b"\xff", b"\xf0\x9f\x98\x80", b"\n",
    b" " * 40, b"../", b"..\\", b"C:", b".safetensors", b"a.safetensors", b'"rank_pattern"', b'"(a|b)*"', b'"r"',
    b'"pissa"', b'"layer_replication"', b"[[0,1000000000]]", b'"target_parameters"', b'"trainable_token_indices"',
    b'"lora_parameters"', b'"F6_E3M2"', b'"quantization_config"', b'"gptq"', b'"shape"', b'"quantization"', b'"mxfp4"',
    b'"blocksize"', b"1e308", b"[", b'"use_dora"', b'"LORA"', b'"ADALORA"', b'"LOHA"', b'"OFT"', b"(.*)+", b"^", b"$",
    b"{1,9}", b"(.|..)+(.|..)+(.|..)+(.|..)+(.)\\\\7", b"[" * 1500, b'{"a":' * 1200,
]  # fmt: skip


NAMES = [
    "dtype", "shape", "data_offsets", "__metadata__", "w", "r", "rank_pattern", "alpha_pattern", "lora_alpha",
    "peft_type", "use_dora", "layer_replication", "target_parameters", "quant_type", "blocksize", "weight_map", "a\nb",
    "\ud800", "", "quant_method", "bits", "group_size", "weight_block_size", "config_groups", "lora_parameters",
    "scale", "[a-z]+", "(",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("-inf"), "", "x",
    "a\nb\x1b[2J", "\ud800", "../a.safetensors", [], [0], [0, 16], [-1, -4], [[0, 10**9]], ["x"] * 300, {}, {"a": {}},
    {"(": 2}, {"(.|..)+(.|..)+(.|..)+(.|..)+(.)\\7": 2}, "F64", "LORA", "LOKR", "ADALORA", "nf4", "gptq", "awq", "fp8",
]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """How many inputs there were, were accepted and were kept; how many lines they reached; what went wrong."""

    headers: int
    accepted: int
    kept: int
    lines: int
    messages: int
    slowest: float
    crashes: tuple[str, ...]


def restructure(rng: random.Random, text: bytes) -> bytes | None:
    """One value in a JSON object replaced, taken out or renamed, or a tensor given another type; None where none is."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    left = [whole]
    while left and len(places) < 500:
        one = left.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        places += [(one, key) for key in keys]
        left += [one[key] for key in keys]
    if not places:
        return None
    entries = [inside[key] for inside, key in places if isinstance(inside[key], dict) and "data_offsets" in inside[key]]
    inside, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(NAMES)] = inside.pop(key)
    elif how == 2 and entries:
        _retype(rng, rng.choice(entries))
    elif how == 3:
        other, name = rng.choice(places)
        inside[key] = copy.deepcopy(other[name])
    else:  # every other time something of the same type
        alike = [value for value in VALUES if type(value) is type(inside[key])] if how == 4 else []
        inside[key] = copy.deepcopy(rng.choice(alike or VALUES))
    return json.dumps(whole).encode()


def _retype(rng: random.Random, said: dict[str, Any]) -> None:
    """Another dtype for the bytes that an entry has, in a shape that fits where one does."""
    said["dtype"] = rng.choice(list(BITS))
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):
        begin, end = said["data_offsets"]
        said["shape"] = [(end - begin) * 8 // BITS[said["dtype"]], *rng.choice(([], [1], [1, 1]))]


def mutate(rng: random.Random, text: bytes, corpus: list[bytes], tokens: Sequence[bytes] = tuple(TOKENS)) -> bytes:
    """A few small changes: values, bits, bytes, tokens, pieces taken out, doubled, or from another input."""
    if rng.random() < 0.4:
        for _ in range(rng.choice((1, 1, 2, 3))):
            text = restructure(rng, text) or text
        return text[:LONGEST]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.choice((0, 1, 1, 2, 4, 16, 64)))
        how = rng.randrange(7)
        if how == 0 and text:
            at = min(at, len(text) - 1)
            text = text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
        elif how == 1:
            text = text[:at] + text[to:]
        elif how == 2:
            text = text[:to] + text[at:to] * rng.choice((1, 2, 50)) + text[to:]
        elif how == 3:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            text = text[:at] + other[start : start + rng.randrange(1, 80)] + text[to:]
        elif how == 4:
            numbers = list(re.finditer(rb"\d+", text))
            if numbers:
                one = rng.choice(numbers)
                value = max(0, int(one[0][:20]) + rng.choice((-1, 1, 8, -8, 2**32)))
                text = text[: one.start()] + str(value).encode() + text[one.end() :]
        else:
            text = text[:at] + rng.choice(tokens) + text[to:]
    return text[:LONGEST]


def seeds(kind: str) -> list[bytes]:
    """Inputs to begin with: those above, and what the fixtures hold (of a header the first entries)."""
    inputs = [json.dumps(value).encode() for value in SEEDS[kind]] if kind in SEEDS else seeds_of(kind)
    name = {"header": "*.safetensors", "config": "adapter_config.json", "model": "config.json"}.get(kind)
    for file in sorted(FIXTURES.glob(f"*/{name}")) if name else []:
        text = file.read_bytes()
        if kind == "header":
            header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
            first = sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0])[:4]
            text = json.dumps(dict(first)).encode()
        if len(text) <= LONGEST and text not in inputs:
            inputs.append(text)
    return inputs


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a header's metadata, which are strings, every reader takes the last.
    metadata = all(isinstance(value, str) for _, value in pairs)
    assert metadata or len(dict(pairs)) == len(pairs), "accepted with a name that occurs twice"
    return dict(pairs)


class Target:
    """One kind of input: where it is written, and how it is read."""

    def __init__(self, kind: str, folder: Path):
        self.kind = kind
        self.folder = folder / kind
        self.folder.mkdir(parents=True)
        if kind in ("header", "state"):
            self.file = self.folder / "model.safetensors"
        elif kind in NAMES_OF_FILES:
            self.file = self.folder / NAMES_OF_FILES[kind]
            prepare(kind)
            if kind == "pipeline":
                write_pipeline(self.folder)
        elif kind == "index":
            self.file = self.folder / "model.safetensors.index.json"
            self._weights("a.safetensors", {"w": entry([2, 2], 0, 16)}, 16)
        elif kind == "config":
            self.file = self.folder / "adapter_config.json"
            prepare(kind)
            self._weights("adapter_model.safetensors", {A: entry([1, 2], 0, 8), B: entry([2, 1], 8, 16)}, 16)
        elif kind == "mlx":
            self.file = self.folder / "adapter_config.json"
            names = [f"model.layers.0.self_attn.q_proj.lora_{factor}" for factor in "ab"]
            self._weights("adapters.safetensors", {names[0]: entry([2, 1], 0, 8), names[1]: entry([1, 2], 8, 16)}, 16)
        else:
            self.file = self.folder / "config.json"
            self._weights("model.safetensors", *QUANTISED)

    def _weights(self, name: str, header: dict[str, Any], size: int) -> None:
        text = json.dumps(header).encode()
        (self.folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))

    def write(self, text: bytes, rng: random.Random) -> None:
        """The input as a file; of a header also its length, and as much data as it seems to describe."""
        if self.kind == "state":
            header = STATE | {"a.weight.quant_state.bitsandbytes__nf4": entry([len(text)], 96, 96 + len(text), "U8")}
            stored = json.dumps(header).encode()
            text = len(stored).to_bytes(8, "little") + stored + bytes(96) + text
        size = 0
        if self.kind == "header":
            length = len(text)
            if rng.random() < 0.02:
                length = rng.choice((0, 7, len(text) - 1, len(text) + 1, 10**8, 2**63)) & (2**64 - 1)
            size = max((int(end) for end in _ENDS.findall(text)), default=0)
            size = min(size, 1 << 20) if rng.random() < 0.9 else rng.randrange(17)
            text = length.to_bytes(8, "little") + text
        self.file.write_bytes(an_archive(text) if self.kind == "pickle" else text)
        if size:
            os.truncate(self.file, len(text) + size)

    def read(self) -> None:
        """Reads it as an audit would, from headers; raises AssertionError where others read it otherwise."""
        checkpoint = open_checkpoint(self.folder, allow_pickle=self.kind in BINARY)
        if self.kind in ("config", "mlx"):
            plan_updates(checkpoint)
        elif self.kind in ("model", "state"):
            assert checkpoint.weights, "no weight is left, nor a reason"
            for weight in checkpoint.weights.values():
                if isinstance(weight, Derived) and str(weight.quantised).startswith("mlx"):
                    assert checkpoint.load(weight).shape == weight.shape
        elif self.kind == "header":
            self._compare(checkpoint.tensors)
        elif self.kind in NAMES_OF_FILES:
            compare(self.kind, self.file, checkpoint)

    def _compare(self, tensors: Mapping[str, TensorInfo]) -> None:
        from safetensors import safe_open

        with self.file.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {
            name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.span[0], sum(info.span)]}
            for name, info in tensors.items()
        }
        for name, said in header.items():
            said["data_offsets"] = [8 + length + offset for offset in said["data_offsets"]]
            assert {key: said[key] for key in ("dtype", "shape", "data_offsets")} == entries.get(name), "another tensor"
        assert set(header) == set(entries), "other names than plain JSON's"
        with safe_open(self.file, framework="np") as opened:
            assert sorted(opened.keys()) == sorted(entries), "other names than the library's"
            for name, info in tensors.items():
                part = opened.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape), "another tensor"

    def problem(self) -> tuple[str, str | None]:
        """What reading it says, "" where it is accepted, and what is wrong with that, if anything."""
        started = time.process_time()
        said, wrong = "", None
        try:
            self.read()
        except SpectraError as error:
            said = str(error)
            if str(self.folder) not in said or not said.isprintable():
                wrong = f"says {said!r}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        seconds = time.process_time() - started
        return said, f"{seconds:.1f} s" if wrong is None and seconds > SECONDS else wrong


class Lines:
    """The lines of the package that were reached so far."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        self.seen.add((name, frame.f_lineno))
        return self._trace

    def during(self, action: Callable[[], T]) -> T:
        sys.settrace(self._trace)
        try:
            return action()
        finally:
            sys.settrace(None)


def run_fuzz(seed: int, headers: int, scratch: Path, until_found: bool = False, kinds: Sequence[str] = ()) -> Found:
    """Fuzzes in this process: ``headers`` inputs in all, written below ``scratch``.

    ``until_found`` ends with the first finding; ``kinds`` are all where none is named.
    """
    rng, lines = random.Random(seed), Lines()
    accepted, slowest, messages, crashes = 0, 0.0, set[str](), list[str]()
    share = {kind: SHARE[kind] for kind in kinds or SHARE}
    targets = {kind: Target(kind, scratch) for kind in share}
    corpus = {kind: seeds(kind) for kind in share}
    first = {kind: list(texts) for kind, texts in corpus.items()}
    sound = {kind: list(texts) for kind, texts in corpus.items()}
    started_with, number = sum(map(len, corpus.values())), 0
    for number in range(1, headers + 1):
        kind = rng.choices(list(share), list(share.values()))[0]
        own, target = corpus[kind], targets[kind]
        # Half of the time from what was sound: most changes break an input, and what is broken stays so.
        parents = sound[kind][-50:] if rng.random() < 0.5 else own[-200:]
        text = (
            rng.choice(own)
            if number < 30
            else mutate(rng, rng.choice(parents), own, BINARY_TOKENS if kind in BINARY else TOKENS)
        )
        target.write(text, rng)
        known, started = len(lines.seen), time.process_time()
        if number < 1000 or rng.random() < TRACED:
            said, wrong = lines.during(target.problem)
        else:
            said, wrong = target.problem()
            slowest = max(slowest, time.process_time() - started)
        if wrong is not None:
            crashes.append(f"{kind} {text!r}: {wrong}")
            if until_found:
                break
        elif not said:
            accepted += 1
            if rng.random() < 0.1:
                sound[kind] = [*sound[kind][-50:], rng.choice(first[kind]), text]
        shape = kind + re.sub(r"['\"].*['\"]|= .*;|\d+", "", said)[:120]  # what differs by more than names and numbers
        quick = time.process_time() - started < SLOW
        if quick and (len(lines.seen) > known or (shape not in messages and len(messages) < 2000)):
            own.append(text)
        messages.add(shape)
    kept = sum(map(len, corpus.values())) - started_with
    return Found(number, accepted, kept, len(lines.seen), len(messages), slowest, tuple(crashes[:20]))


def run(options: Options) -> Iterator[Row]:
    """A row for each kind of input, and one for each planted bug."""
    from benchmarks.planted import LIMIT, PLANTED, inputs_until_found

    count = options.trials or options.scale(quick=1500, default=100_000, full=1_000_000)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for kind, share in SHARE.items():
            tally = run_fuzz(options.seed, int(count * share), Path(folder), False, (kind,))
            print(*tally.crashes, sep="\n", end="", file=sys.stderr)
            yield {
                "what": f"any {kind}", "inputs": tally.headers, "accepted": tally.accepted, "kept": tally.kept,
                "lines": tally.lines, "kinds of error": tally.messages, "slowest (s)": round(tally.slowest, 2),
                "findings": len(tally.crashes), "agrees": not tally.crashes,
            }  # fmt: skip
        for number, bug in enumerate(bug for bug in PLANTED if bug.quick or not options.quick):
            taken = inputs_until_found(bug, Path(folder) / f"planted{number}", LIMIT, options.seed)
            yield {
                "what": f"planted: {bug.name}", "inputs": taken or LIMIT, "accepted": None, "kept": None,
                "lines": None, "kinds of error": None, "slowest (s)": None,
                "findings": int(taken is not None), "agrees": taken is not None,
            }  # fmt: skip


def notes(rows: list[Row]) -> list[str]:
    own = [row for row in rows if row["what"].startswith("any ")]
    planted = [row for row in rows if row not in own]
    return [
        f"{sum(row['inputs'] for row in own):,} inputs, {sum(row['findings'] for row in own)} findings; "
        f"of {len(planted)} planted bugs {sum(row['findings'] for row in planted)} were found.",
        "For a planted bug, inputs are those that it took.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    planted = [row for row in rows if row["what"].startswith("planted")]
    axes.barh(range(len(planted)), [row["inputs"] for row in planted], color="#0072B2")
    axes.set_yticks(range(len(planted)), [row["what"].removeprefix("planted: ") for row in planted])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("inputs until a planted bug was found")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--headers", type=int, default=1_000_000, metavar="N", help="inputs in all (default: 10^6)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the inputs are written")
    parser.add_argument("--guided", action="store_true", help="with atheris, which must be installed")
    parser.add_argument("--seconds", type=int, default=60, metavar="S", help="of --guided, in all (default: 60)")
    parser.add_argument("--self-test", action="store_true", help="look for planted bugs, with at most --headers inputs")
    parser.add_argument("--kinds", nargs="+", choices=SHARE, default=list(SHARE), help="of inputs (default: all)")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        if options.self_test:
            from benchmarks.planted import find_all

            crashes = find_all(Path(folder), options.headers)
        elif options.guided:
            from benchmarks.guided import run_guided

            crashes = run_guided(options.kinds, options.seconds, options.seed, Path(folder))
        else:
            crashes = _run(options, Path(folder))
    print(f"{time.perf_counter() - started:.0f} s, {len(crashes)} findings")
    print(*crashes, sep="\n", file=sys.stderr)
    return int(bool(crashes))


def _run(options: argparse.Namespace, folder: Path) -> list[str]:
    crashes: list[str] = []
    with ProcessPoolExecutor(options.workers) as pool:
        of_each = [options.seed * 1000 + worker for worker in range(options.workers)]
        places = [folder / str(seed) for seed in of_each]
        count, kinds = options.headers // options.workers, options.kinds
        for tally in pool.map(run_fuzz, of_each, repeat(count), places, repeat(False), repeat(kinds)):
            print(
                f"{tally.headers:,} inputs: {tally.accepted:,} accepted, {tally.kept:,} kept as new, "
                f"{tally.lines} lines, {tally.messages} kinds of error, slowest {tally.slowest:.2f} s, "
                f"{len(tally.crashes)} findings",
                flush=True,
            )
            crashes += tally.crashes
    return crashes


if __name__ == "__main__":
    sys.exit(main())
