"""Headers, indices and configurations, mutated without end: nothing but errors of our own may come out.

    python -m benchmarks.fuzz [--headers 1000000] [--workers 2] [--seed 0] [--scratch DIR]

Guided by coverage: an input that reaches a line of the readers, or makes an error, that none before it did, is kept and
mutated further.  Besides crashes, what counts as one: a header that we accept and the safetensors library reads
otherwise, a message without the file's path or of more than one line, more than two seconds.  A run is repeated exactly
by its seed and number of workers.  ``--scratch`` is best a folder in memory.  Exits with 1 on any finding.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import Any

from spectra.adapters import plan_updates
from spectra.checkpoint import open_checkpoint
from spectra.errors import SpectraError

SECONDS = 2.0
READERS = ("headers.py", "checkpoint.py", "pattern.py", "peft.py", "errors.py")
SHARE = {"header": 0.8, "index": 0.1, "config": 0.1}
TRACED = 0.1  # of the inputs; tracing costs ten times the reading, and what is new shows up soon enough

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
    ],
}
DATA = bytes(16)
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"-1", b"0",
    b"1e9", b"18446744073709551616", b"9223372036854775807", b'"w"', b'"dtype"', b'"shape"', b'"data_offsets"',
    b'"F4"', b'"F64"', b'"BOOL"', b"__metadata__", b"[0,16]", b"[2,2]", b"\xff", b"\xf0\x9f\x98\x80", b"\n",
    b" " * 40, b"../", b"..\\", b"C:", b".safetensors", b"a.safetensors", b'"rank_pattern"', b'"(a|b)*"', b'"r"',
    b'"use_dora"', b'"LORA"', b'"ADALORA"', b'"LOHA"', b'"OFT"', b"(.*)+", b"^", b"$", b"{1,9}",
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


def mutate(rng: random.Random, text: bytes, corpus: list[bytes]) -> bytes:
    """A few small changes: bits, bytes, tokens, pieces taken out, doubled, or from another input."""
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
            text = text[:at] + rng.choice(TOKENS) + text[to:]
    return text[:4000]


class Target:
    """One kind of input: where it is written, and how it is read."""

    def __init__(self, kind: str, folder: Path):
        self.kind = kind
        self.folder = folder / kind
        self.folder.mkdir(parents=True)
        if kind == "header":
            self.file = self.folder / "model.safetensors"
        elif kind == "index":
            self.file = self.folder / "model.safetensors.index.json"
            self._weights("a.safetensors", {"w": entry([2, 2], 0, 16)}, 16)
        else:
            self.file = self.folder / "adapter_config.json"
            self._weights("adapter_model.safetensors", {A: entry([1, 2], 0, 8), B: entry([2, 1], 8, 16)}, 16)

    def _weights(self, name: str, header: dict[str, Any], size: int) -> None:
        text = json.dumps(header).encode()
        (self.folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))

    def write(self, text: bytes, rng: random.Random) -> None:
        if self.kind == "header":
            length = (
                len(text) if rng.random() < 0.98 else rng.choice((0, 7, len(text) - 1, len(text) + 1, 10**8, 2**63))
            )
            data = DATA if rng.random() < 0.9 else DATA[: rng.randrange(16)]
            text = (length & (2**64 - 1)).to_bytes(8, "little") + text + data
        self.file.write_bytes(text)

    def read(self) -> None:
        found = open_checkpoint(self.folder)
        if self.kind == "config":
            plan_updates(found)
        elif self.kind == "header":
            from safetensors import safe_open

            with safe_open(self.file, framework="np") as file:
                assert sorted(file.keys()) == sorted(found.tensors), "other names than the library's"
                for name, info in found.tensors.items():
                    part = file.get_slice(name)
                    assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape), "another tensor"


class Lines:
    """The lines of the readers that were reached so far."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "spectra" not in name or not name.endswith(READERS):
            return None
        self.seen.add((name, frame.f_lineno))
        return self._trace

    def during(self, action: Callable[[], None]) -> None:
        sys.settrace(self._trace)
        try:
            action()
        finally:
            sys.settrace(None)


def run_fuzz(seed: int, headers: int, scratch: Path) -> Found:
    """Fuzzes in this process: ``headers`` inputs in all, written below ``scratch``."""
    rng, lines = random.Random(seed), Lines()
    accepted, slowest, messages, crashes = 0, 0.0, set[str](), list[str]()
    targets = {kind: Target(kind, scratch) for kind in SHARE}
    corpus = {kind: [json.dumps(value).encode() for value in SEEDS[kind]] for kind in SHARE}
    sound = {kind: list(texts) for kind, texts in corpus.items()}
    started_with = sum(map(len, corpus.values()))
    for number in range(headers):
        kind = rng.choices(list(SHARE), list(SHARE.values()))[0]
        own, target = corpus[kind], targets[kind]
        # Half of the time from what was sound: most changes break an input, and what is broken stays so.
        parents = sound[kind][-50:] if rng.random() < 0.5 else own[-200:]
        text = rng.choice(own) if number < 30 else mutate(rng, rng.choice(parents), own)
        target.write(text, rng)
        known, said, started = len(lines.seen), "", time.perf_counter()
        try:
            if number < 1000 or rng.random() < TRACED:
                lines.during(target.read)
            else:
                target.read()
            accepted += 1
            if rng.random() < 0.1:
                sound[kind] = [*sound[kind][-50:], rng.choice(corpus[kind][: len(SEEDS[kind])]), text]
        except SpectraError as error:
            said = str(error)
            if str(target.folder) not in said or not said.isprintable():
                crashes.append(f"{kind} {text!r}: says {said!r}")
        except Exception as error:
            crashes.append(f"{kind} {text!r}: {type(error).__name__}: {error}")
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            crashes.append(f"{kind} {text!r}: {seconds:.1f} s")
        shape = kind + re.sub(r"['\"].*['\"]|= .*;|\d+", "", said)[:120]  # what differs by more than names and numbers
        if len(lines.seen) > known or (shape not in messages and len(messages) < 2000):
            own.append(text)
        messages.add(shape)
    kept = sum(map(len, corpus.values())) - started_with
    return Found(headers, accepted, kept, len(lines.seen), len(messages), slowest, tuple(crashes[:20]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--headers", type=int, default=1_000_000, metavar="N", help="inputs in all (default: 10^6)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the inputs are written")
    options = parser.parse_args()
    started = time.perf_counter()
    crashes: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, ProcessPoolExecutor(options.workers) as pool:
        seeds = [options.seed * 1000 + worker for worker in range(options.workers)]
        places = [Path(folder) / str(seed) for seed in seeds]
        for found in pool.map(run_fuzz, seeds, repeat(options.headers // options.workers), places):
            print(
                f"{found.headers:,} inputs: {found.accepted:,} accepted, {found.kept:,} kept as new, "
                f"{found.lines} lines, {found.messages} kinds of error, slowest {found.slowest:.2f} s, "
                f"{len(found.crashes)} findings",
                flush=True,
            )
            crashes += found.crashes
    print(f"{time.perf_counter() - started:.0f} s")
    print(*crashes, sep="\n", file=sys.stderr)
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
