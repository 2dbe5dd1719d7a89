"""Files and folders that are broken, or made to harm, and what the command does with each.

A case is a function that builds its content in a folder and returns the arguments of the command; its
``words`` are what the one line on standard error must say.  ``python -m tests.support.hostile FOLDER RESULTS`` runs
all of them: each in a process forked from one in which every library is loaded and warm, so that what is measured is
the case alone, with a limit on time, and with a record of all that it opened, wrote or started.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import spectra
from spectra.tasks import inspect as inspection
from tests.support.paths import ROOT

SECONDS, MIB = 2.0, 16.0  # above start-up
CANARY = "the canary sings 4711"
NAMES = ("model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight")
Q, K = NAMES
A, B = (f"base_model.model.model.layers.0.q_proj.lora_{factor}.weight" for factor in "AB")

# Events of what starts something, connects, or changes files without opening them.

Arguments = list[str]


@dataclass(frozen=True)
class Case:
    """What to build in a folder named ``box``, and what the one line must say of it."""

    name: str
    build: Callable[[Path], Arguments | None]
    words: tuple[str, ...]
    mib: float = MIB


CASES: dict[str, Case] = {}


def outcomes_of(module: str, folder: Path, *arguments: str, timeout: float = 300) -> dict[str, Any]:
    """What every case of ``tests.support.MODULE`` did; they are run once, by a process that measures them."""
    results = folder / "results.json"
    command = [sys.executable, "-m", f"tests.support.{module}", str(folder / "cases"), str(results), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(results.read_text())
    return found


class Outcomes:
    """What cases did, by name; a group of them is run when the first is asked for, so that none takes a minute.

    ``groups`` : for each name, the arguments of the process that runs its group.
    """

    def __init__(self, module: str, folder: Path, groups: Mapping[str, Sequence[str]]):
        self.module, self.folder, self.groups = module, folder, groups
        self.found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.found:
            here = self.folder / str(len(self.found))
            here.mkdir()
            self.found |= outcomes_of(self.module, here, *self.groups[name])
        return self.found[name]


def case(
    name: str, *words: str, mib: float = MIB
) -> Callable[[Callable[[Path], Arguments | None]], Callable[[Path], Arguments | None]]:
    """Registers a builder; where it returns nothing, the folder is audited against the base beside it."""

    def register(build: Callable[[Path], Arguments | None]) -> Callable[[Path], Arguments | None]:
        assert name not in CASES, name
        CASES[name] = Case(name, build, words, mib)
        return build

    return register


def prepare(home: Path, one: Case) -> Arguments:
    """Builds a case below ``home``, with a base and canaries beside it; returns the command's arguments."""
    box = home / "box"
    box.mkdir(parents=True)
    (home / "outside").mkdir()
    (home / "outside" / "canary.json").write_text(json.dumps({"peft_type": CANARY}))
    whole(home / "outside" / "canary.safetensors")
    (home / "base").mkdir()
    whole(home / "base" / "model.safetensors")
    (home / "base" / "config.json").write_text('{"model_type": "llama"}')
    return one.build(box) or ["audit", str(box), "--base", str(home / "base")]


def whole(path: Path, **changes: np.ndarray) -> Path:
    """A model of two small weights."""
    rng = np.random.default_rng(len(path.name))
    return arrays(path, {name: rng.normal(size=(8, 8)) for name in NAMES} | changes)


def arrays(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A safetensors file of float32 values."""
    header, data = {}, b""
    for name, value in tensors.items():
        content = np.asarray(value, "<f4").tobytes()
        header[name] = entry(value.shape, len(data), len(data) + len(content))
        data += content
    return raw(path, header, data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header: bytes as they are, all else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


class Bomb:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def bomb(box: Path) -> bytes:
    return pickle.dumps({"w": Bomb(box.parent / "exploded")}, protocol=4)


# What a header can be. Each is a model.safetensors, or what calls itself that.

FILE = "model.safetensors"
ONE = {Q: entry((8, 8), 0, 256)}


def header_case(name: str, words: tuple[str, ...], header: Any, data: int = 256, length: int | None = None) -> None:
    def build(box: Path) -> None:
        raw(box / FILE, header, b"\0" * data, length=length)

    # What is sound and holds nothing to analyse is named by its folder.
    case(name, *(("box",) if "nothing to analyse" in words else (FILE,)), *words)(build)


def broken(**changes: Any) -> dict[str, Any]:
    return {Q: entry((8, 8), 0, 256) | changes}


DEEP = 100_000
for _name, _words, _header, *_rest in (
    ("no tensors", ("no tensors",), {}, 0),
    ("truncated header", ("truncated",), b'{"w":', 0, 500),
    ("truncated data", ("truncated",), ONE, 255),
    ("data too long", ("size",), ONE, 257),
    ("header beyond the format's limit", ("limit",), b"{" * 60, 0, 2**40),
    ("header of 2^64 - 1 bytes", ("limit",), b"{" * 60, 0, 2**64 - 1),
    ("not JSON", ("not JSON",), b'{"w": nonsense}'),
    ("a list", ("not a safetensors file",), b"[1, 2, 3]"),
    ("deep lists", ("not",), b'{"w":' + b"[" * DEEP),
    ("deep lists, closed", ("not",), b'{"w":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    ("deep objects", ("not",), b'{"w":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"),
    ("not UTF-8", ("not",), b'{"\xff\xfe":' + json.dumps(ONE[Q]).encode() + b"}"),
    ("UTF-16", ("not",), json.dumps(ONE).encode("utf-16-le")),
    ("a byte order mark", ("not",), b"\xef\xbb\xbf" + json.dumps(ONE).encode()),
    ("an entry that is no object", (Q,), {Q: [1, 2]}),
    ("an entry that is null", (Q,), {Q: None}),
    ("the same name twice", (Q, "twice"), b"{" + b",".join([json.dumps(ONE)[1:-1].encode()] * 2) + b"}"),
    ("the same name twice, once escaped", ("'w'", "twice"),
     b'{"w":%s,"\\u0077":%s}' % ((json.dumps(ONE[Q]).encode(),) * 2)),
    ("a field twice", (Q, "'dtype'", "twice"), json.dumps(ONE).replace('"shape"', '"dtype": "F16", "shape"').encode()),
    ("overlapping ranges", (Q,), {K: entry((8, 8), 0, 256), Q: entry((8, 8), 128, 384)}, 384),
    ("the same range twice", (Q,), {K: entry((8, 8), 0, 256), Q: entry((8, 8), 0, 256)}),
    ("a hole between ranges", (Q,), {K: entry((8, 8), 0, 256), Q: entry((8, 8), 300, 556)}, 556),
    ("a hole at the start", (Q,), {Q: entry((8, 8), 16, 272)}, 272),
    ("a range that ends before it begins", (Q,), {Q: entry((8, 8), 256, 0)}),
    ("a negative offset", (Q,), {Q: entry((8, 8), -256, 0)}),
    ("a fractional offset", (Q,), {Q: entry((8, 8), 0, 256.5)}),
    ("offsets that are words", (Q,), {Q: entry((8, 8), "0", "256")}),
    ("three offsets", (Q,), broken(data_offsets=[0, 128, 256])),
    ("offsets missing", (Q,), {Q: {"dtype": "F32", "shape": [8, 8]}}),
    ("an offset of 2^64", (Q,), {Q: entry((8, 8), 0, 2**64)}),
    ("an offset of 2^63", (Q,), {Q: entry((8, 8), 2**63 - 256, 2**63)}),
    ("a range beyond the file", (), {Q: entry((1024, 1024), 0, 4 * 2**20)}),
    ("a shape whose product overflows", (Q,), {Q: entry((2**32, 2**32, 2**32), 0, 256)}),
    ("an enormous shape in a tiny file", (Q,), {Q: entry((2**40, 2**20), 0, 256)}),
    ("an enormous shape of no values", (Q, "saved incompletely"), {Q: entry((0, 2**60), 0, 0)}, 0),
    ("very many dimensions", (Q,), {Q: entry((1,) * 5000, 0, 4)}, 4),
    ("a negative dimension", (Q,), {Q: entry((-8, -8), 0, 256)}),
    ("a fractional dimension", (Q,), {Q: entry((8.0, 8), 0, 256)}),
    ("a dimension that is true", (Q,), {Q: entry((True, 64), 0, 256)}),
    ("a nested shape", (Q,), {Q: entry(([8], 8), 0, 256)}),
    ("a shape that is null", (Q,), broken(shape=None)),
    ("a shape that is an object", (Q,), broken(shape={"rows": 8})),
    ("an unknown dtype", (Q, "F99"), broken(dtype="F99")),
    ("a dtype that is a number", (Q,), broken(dtype=32)),
    ("a dtype in lower case", (Q,), broken(dtype="f32")),
    ("a dtype that does not fit the range", (Q,), broken(dtype="F64")),
    ("metadata of the wrong type", ("__metadata__",), ONE | {"__metadata__": [1]}),
    ("metadata that are numbers", ("__metadata__",), ONE | {"__metadata__": {"format": 1}}),
    ("a name with an escape sequence", ("control characters",), {Q + "\x1b[31m": ONE[Q]}),
    ("a name that forges a line", ("control characters",), {Q + "\nspectra: error: all is well": ONE[Q]}),
    ("a name that turns the text around", ("control characters",), {Q + "\u202etxt": ONE[Q]}),
    ("half a character", ("control characters",), b'{"\\ud800":' + json.dumps(ONE[Q]).encode() + b"}"),
    ("a name of a million letters", ("name is longer",), {"w" * 1_000_000: ONE[Q]}),
    ("NaN for a dimension", (Q,), {Q: entry((float("nan"), 8), 0, 256)}),
    ("a number of 5000 digits", (), b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000)),
    ("34 MB of spaces", ("padding",), json.dumps(ONE).encode() + b" " * 34_000_000),
    ("34 MB of spaces in front", ("not",), b" " * 34_000_000 + json.dumps(ONE).encode()),
    ("34 MB of metadata", ("__metadata__",), {"__metadata__": {"notes": "x" * 34_000_000}} | ONE),
    ("34 MB of brackets", ("not",), b'{"w":' + b"[" * 34_000_000),
    ("34 MB in one name", ("name",), b'{"' + b"w" * 34_000_000 + b'":1}'),
    ("34 MB of one number", ("not",), b'{"w":' + b"9" * 34_000_000 + b"}"),
    ("two million tiny entries", ("'t'",), b"{" + b'"t":{},' * 2_000_000 + b'"u":{}}'),
    ("a million tensors of no values", ("larger than the data",),
     b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)), 0),
    ("a sub-byte type", ("nothing to analyse", "F4"), {Q: entry((8, 8), 0, 32, "F4")}, 32),
    ("a sub-byte type that ends within a byte", (Q,), {Q: entry((3, 3), 0, 5, "F4")}, 5),
    ("six-bit floats", ("nothing to analyse",), {Q: entry((8, 8), 0, 48, "F6_E2M3")}, 48),
    ("integers alone", ("nothing to analyse", "I64"), {Q: entry((8, 8), 0, 512, "I64")}, 512),
    ("complex numbers", ("nothing to analyse",), {Q: entry((8, 8), 0, 512, "C64")}, 512),
):  # fmt: skip
    header_case(_name, _words, _header, *_rest)


def content_case(name: str, words: tuple[str, ...], content: Callable[[Path], bytes], file: str = FILE) -> None:
    def build(box: Path) -> None:
        (box / file).write_bytes(content(box))

    case(name, file, *words)(build)


def zipped(box: Path, *, name: str = "archive/data.pkl", content: bytes | None = None) -> bytes:
    place = box.parent / "made.zip"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr(name, bomb(box) if content is None else content)
    return place.read_bytes()


def tarred(box: Path) -> bytes:
    place, inner = box.parent / "made.tar.gz", box.parent / "inner.zip"
    inner.write_bytes(zipped(box))
    with tarfile.open(place, "w:gz") as archive:
        archive.add(inner, "../../../climbed")
        archive.add(inner, "model.safetensors")
    return place.read_bytes()


PICKLE = ("pickle", "convert it")
for _name, _words, _content, *_file in (
    ("an empty file", ("empty",), lambda box: b""),
    ("seven bytes", ("truncated",), lambda box: b"1234567"),
    ("a git-LFS pointer", ("git lfs pull",),
     lambda box: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    ("a web page", ("not a safetensors file",), lambda box: b"<!DOCTYPE html><title>404</title>" + b" " * 900),
    ("random bytes", ("not a",), lambda box: np.random.default_rng(0).bytes(4000)),
    ("a GGUF file", ("GGUF",), lambda box: b"GGUF" + b"\0" * 80),
    ("a program", ("not a safetensors file",), lambda box: b"\x7fELF" + b"\2" * 200),
    ("a pickle that writes, in disguise", PICKLE, bomb),
    ("a torch archive that writes, in disguise", PICKLE, zipped),
    ("an archive in an archive", PICKLE, lambda box: zipped(box, name="model.zip", content=zipped(box))),
    ("a compressed archive with a climbing name", ("not a safetensors file",), tarred),
    ("a pickle that writes: pytorch_model.bin", PICKLE, bomb, "pytorch_model.bin"),
    ("a torch archive that writes: model.pt", PICKLE, zipped, "model.pt"),
    ("a checkpoint that writes: last.ckpt", PICKLE, zipped, "last.ckpt"),
    ("a pickle that begins like a header", PICKLE, lambda box: b"\x80\x04\0\0\0\0\0\0{" + bomb(box), "model.pkl"),
):  # fmt: skip
    content_case(_name, _words, _content, *_file)


@case("a hundred million zeros without a byte on disk", FILE, "not")
def _(box: Path) -> None:
    with (box / FILE).open("wb") as out:
        out.write((99_999_999).to_bytes(8, "little"))
        out.truncate(200_000_000)


@case("four tebibytes of zeros without a byte on disk", Q)
def _(box: Path) -> Arguments:
    for home in (box, box.parent / "large"):
        home.mkdir(exist_ok=True)
        raw(home / FILE, {Q: entry((2**20, 2**20), 0, 2**42)})
        os.truncate(home / FILE, (home / FILE).stat().st_size + 2**42)
    return ["audit", str(box), "--base", str(box.parent / "large")]


@case("NaN and infinity in the base", "non_finite", Q)
def _(box: Path) -> Arguments:
    values = np.ones((8, 8))
    values[0, 0], values[1, 1] = np.nan, -np.inf
    whole(box / FILE)
    (box.parent / "nan").mkdir()
    whole(box.parent / "nan" / FILE, **{Q: values})
    return ["audit", str(box), "--base", str(box.parent / "nan")]


@case("no such path", "nowhere", "no such file")
def _(box: Path) -> Arguments:
    return ["audit", str(box / "nowhere"), "--base", str(box.parent / "base")]


@case("a name that is no path", "no such file")
def _(box: Path) -> Arguments:
    return ["audit", "x" * 5000, "--base", str(box.parent / "base")]


@case("an empty folder", "no safetensors weights")
def _(box: Path) -> None:
    pass


@case("two models", "one.safetensors, two.safetensors")
def _(box: Path) -> None:
    whole(box / "one.safetensors")
    whole(box / "two.safetensors")


@case("a file name that is not UTF-8", "several weight files")
def _(box: Path) -> None:
    whole(box / "one.safetensors")
    Path(os.fsdecode(os.fsencode(box) + b"/\xff\x1b[2J\n.safetensors")).write_bytes(b"x")


# Links and what is no file.


@case("weights that link out of the folder", FILE, "leads out")
def _(box: Path) -> None:
    (box / FILE).symlink_to("../outside/canary.safetensors")


@case("a chain of links that leads out", FILE, "leads out")
def _(box: Path) -> None:
    (box / "a").symlink_to("../outside")
    (box / FILE).symlink_to("a/canary.safetensors")


@case("weights that link to themselves", FILE)
def _(box: Path) -> None:
    (box / FILE).symlink_to(FILE)


@case("weights that link in a circle", FILE)
def _(box: Path) -> None:
    (box / FILE).symlink_to("b.safetensors")
    (box / "b.safetensors").symlink_to(FILE)


@case("weights that are a pipe", FILE, "no regular file")
def _(box: Path) -> None:
    os.mkfifo(box / FILE)


@case("weights that are a device", FILE)
def _(box: Path) -> None:
    (box / FILE).symlink_to("/dev/zero")


@case("weights that are a folder", FILE)
def _(box: Path) -> None:
    (box / FILE).mkdir()


@case("a model's configuration that links out", "config.json", "leads out")
def _(box: Path) -> None:
    whole(box / FILE)
    (box / "config.json").symlink_to("../outside/canary.json")


@case("a model's configuration that never ends", "config.json")
def _(box: Path) -> None:
    whole(box / FILE)
    (box / "config.json").symlink_to("/dev/zero")


@case("a model's configuration of 64 MB", "config.json", "bytes")
def _(box: Path) -> None:
    whole(box / FILE)
    (box / "config.json").write_bytes(b'{"a":[' + b"[]," * 21_000_000 + b"[]]}")


@case("a model's configuration that links to itself", "config.json")
def _(box: Path) -> None:
    whole(box / FILE)
    (box / "config.json").symlink_to("config.json")


@case("an adapter's configuration that links out", "adapter_config.json", "leads out")
def _(box: Path) -> None:
    adapter(box)
    (box / "adapter_config.json").unlink()
    (box / "adapter_config.json").symlink_to("../outside/canary.json")


@case("an adapter's configuration that is a pipe", "adapter_config.json", "no regular file")
def _(box: Path) -> None:
    adapter(box)
    (box / "adapter_config.json").unlink()
    os.mkfifo(box / "adapter_config.json")


@case("an adapter's weights that link out", "adapter_model.safetensors", "leads out")
def _(box: Path) -> None:
    adapter(box)
    (box / "adapter_model.safetensors").rename(box.parent / "outside" / "canary.safetensors")
    (box / "adapter_model.safetensors").symlink_to("../outside/canary.safetensors")


@case("an adapter's folder that links out", "default", "leads out")
def _(box: Path) -> None:
    adapter(box.parent / "outside")
    (box / "default").symlink_to("../outside")


# Indices and shards.

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shards(box: Path) -> None:
    arrays(box / FIRST, {Q: np.ones((8, 8))})
    arrays(box / SECOND, {K: np.eye(8)})
    write_index(box, {Q: FIRST, K: SECOND})


def linked(box: Path, name: str) -> None:
    """Moves a file out of the folder and leaves a link behind."""
    (box / name).rename(box.parent / "outside" / name)
    (box / name).symlink_to(f"../outside/{name}")


def pipe(box: Path) -> None:
    (box / FIRST).unlink()
    os.mkfifo(box / FIRST)


def left_out(box: Path) -> None:
    arrays(box / FIRST, {Q: np.ones((8, 8)), "w": np.ones((2, 2))})
    write_index(box, {"w": FIRST})


def write_index(box: Path, weight_map: Any) -> None:
    (box / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shard_case(name: str, words: tuple[str, ...], change: Callable[[Path], Any]) -> None:
    def build(box: Path) -> None:
        shards(box)
        change(box)

    case(name, *words)(build)


def replaced(content: bytes | None = None, link: str | None = None) -> Callable[[Path], None]:
    def change(box: Path) -> None:
        (box / FIRST).unlink()
        if link is not None:
            (box / FIRST).symlink_to(link)
        elif content is not None:
            (box / FIRST).write_bytes(content)

    return change


for _place in (
    "../outside/canary.safetensors", "/etc/canary.safetensors", "C:canary.safetensors", "C:\\canary.safetensors",
    "\\\\host\\share\\canary.safetensors", "//host/share/canary.safetensors", "..\\outside\\canary.safetensors",
    "sub/canary.safetensors", "a\0.safetensors", "file:canary.safetensors", ".hidden.safetensors", "..",
    "pytorch_model.bin", "config.json", "", 3, None, True, ["a"], {"a": 1},
):  # fmt: skip
    shard_case(
        f"a shard named {_place!r}",
        (INDEX, Q, "plain"),
        partial(write_index, weight_map={Q: _place, K: SECOND}),
    )
for _name, _words, _change in (
    ("a shard that links out", (FIRST, "leads out"), replaced(link="../outside/canary.safetensors")),
    ("a shard that links to itself", (FIRST,), replaced(link=FIRST)),
    ("a shard that is missing", (FIRST, "not there"), replaced()),
    ("a shard that is truncated", (FIRST, "truncated"), replaced(b"\x10" + b"\0" * 7 + b"{}")),
    ("a shard that is a git-LFS pointer", (FIRST, "git lfs"), replaced(b"version https://git-lfs.github.com/spec/v1\n")),
    ("a shard that is a pickle", (FIRST, *PICKLE), lambda box: (box / FIRST).write_bytes(bomb(box))),
    ("a shard that is a pipe", (FIRST, "no regular file"), lambda box: pipe(box)),
    ("a shard that is a folder", (FIRST,), lambda box: (replaced()(box), (box / FIRST).mkdir())),
    ("a tensor that no shard holds", (FIRST, "'ghost'"),
     lambda box: write_index(box, {Q: FIRST, K: SECOND, "ghost": FIRST})),
    ("a tensor that the index leaves out", (FIRST, Q),
     lambda box: left_out(box)),
    ("shards that are swapped", (Q,), lambda box: write_index(box, {Q: SECOND, K: FIRST})),
    ("a tensor in two shards", (SECOND, Q), lambda box: arrays(box / SECOND, {Q: np.eye(8), K: np.eye(8)})),
    ("an empty index", (INDEX, "weight_map"), lambda box: write_index(box, {})),
    ("an index that is a list", (INDEX, "weight_map"), lambda box: write_index(box, [Q])),
    ("an index of nothing", (INDEX,), lambda box: (box / INDEX).write_text("[]")),
    ("an index with a tensor twice", (INDEX, Q, "twice"),
     lambda box: (box / INDEX).write_text(json.dumps({"weight_map": {Q: FIRST, K: SECOND}}).replace(K, Q))),
    ("an index that is deep", (INDEX,), lambda box: (box / INDEX).write_text('{"weight_map":' * DEEP)),
    ("an index that is not UTF-8", (INDEX,), lambda box: (box / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}')),
    ("an index that is a pickle", (INDEX,), lambda box: (box / INDEX).write_bytes(bomb(box))),
    ("an index that links out", (INDEX, "leads out"),
     lambda box: linked(box, INDEX)),
    ("an index of 40 MB", (INDEX, "bytes"), lambda box: (box / INDEX).write_bytes(b"[" + b"[]," * 13_500_000)),
    ("two indices", (INDEX, "other.safetensors.index.json"),
     lambda box: (box / "other.safetensors.index.json").write_text("{}")),
    ("a shard's name that forges a line", (INDEX,),
     lambda box: write_index(box, {Q: "a\nspectra: error: fine.safetensors", K: SECOND})),
    ("a shard's name of a million letters", (INDEX,), lambda box: write_index(box, {Q: "a" * 1_000_000, K: SECOND})),
):  # fmt: skip
    shard_case(_name, _words, _change)


# Adapters.


def adapter(box: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> None:
    """A LoRA of rank 2 on one weight."""
    rng = np.random.default_rng(1)
    arrays(box / "adapter_model.safetensors", tensors or {A: rng.normal(size=(2, 8)), B: rng.normal(size=(8, 2))})
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../base"} | config
    (box / "adapter_config.json").write_text(json.dumps(values))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_case(name: str, words: tuple[str, ...], by_name: bool = False, **config: Any) -> None:
    def build(box: Path) -> Arguments | None:
        adapter(box, **config)
        return ["audit", str(box)] if by_name else None

    case(name, CONFIG, *words)(build)


HANGS = r"(.|..)+(.|..)+(.|..)+(.|..)+(.)\7\7"  # repeated letters, which these names have not
for _name, _words, _config in (
    ("r that is a word", ("r =",), {"r": "eight"}),
    ("r that is NaN", ("r =",), {"r": float("nan")}),
    ("r that is true", ("r =",), {"r": True}),
    ("r of 400 digits", ("r =",), {"r": 10**400}),
    ("r that is negative", ("r =",), {"r": -2}),
    ("r that is 0", ("r =",), {"r": 0}),
    ("r that is 1.5", ("r =",), {"r": 1.5}),
    ("r that is an object", ("r =",), {"r": {"a": 1}}),
    ("alpha that is infinite", ("lora_alpha =",), {"lora_alpha": float("inf")}),
    ("alpha that is a list", ("lora_alpha =",), {"lora_alpha": [16]}),
    ("alpha that is a list of 20,000", ("lora_alpha =",), {"lora_alpha": ["x\n"] * 20_000}),
    ("a rank pattern that is a list", ("rank_pattern",), {"rank_pattern": [["q", 2]]}),
    ("a rank pattern that is a word", ("rank_pattern",), {"rank_pattern": "q"}),
    ("a rank pattern to a word", ("rank_pattern",), {"rank_pattern": {"q_proj": "2"}}),
    ("a rank pattern that is no expression", ("pattern",), {"rank_pattern": {"(": 2}}),
    ("a rank pattern that hangs", ("pattern",), {"rank_pattern": {HANGS: 2}}),
    ("an alpha pattern that hangs", ("pattern",),
     {"rank_pattern": {"[a-z]*q_proj": 2}, "alpha_pattern": {HANGS: 2}}),
    ("a pattern that is long", ("pattern",), {"rank_pattern": {"(a|b)" * 200: 2}}),
    ("a pattern that unrolls", ("pattern",), {"rank_pattern": {"((a{1000}){1000}){1000}": 2}}),
    ("a pattern that calls itself", ("pattern",), {"rank_pattern": {"(a(?1)?b)": 2}}),
    ("patterns, 40,000 of them", ("pattern",), {"rank_pattern": {f"[a-z]+{i}": 2 for i in range(40_000)}}),
    ("patterns that hang, each a little", ("pattern",),
     {"rank_pattern": {rf"(.|..)+(.|..)+(.)\5\5{{{i}}}": 2 for i in range(2, 150)}}),
    ("a method that is a number", ("peft_type",), {"peft_type": 7}),
    ("a method that is null", ("peft_type",), {"peft_type": None}),
    ("a method with a line of its own", ("cannot be read",), {"peft_type": "X\nspectra: error: fine"}),
    ("an option that nobody knows", ("florp_config",), {"florp_config": {"a": 1}}),
    ("an option with a line of its own", ("cannot be read",), {"x\nspectra: error: \x1b[2J": 1}),
    ("an option of a million letters", ("cannot be read",), {"x" * 500_000: "y" * 500_000}),
    ("an initialisation that is an object", ("init_lora_weights",), {"init_lora_weights": {"a": [1]}}),
    ("a switch that is a word", ("use_rslora",), {"use_rslora": "false"}),
):  # fmt: skip
    config_case(_name, _words, **_config)
for _name, _words, _value in (
    ("a base that is a number", (), 7),
    ("a base that is nothing", (), ""),
    ("a base with a NUL", ("base model",), "a\0b"),
    ("a base with a line of its own", ("base model",), "x\nspectra: error: fine"),
    ("a base of a million letters", ("base model",), "x" * 1_000_000),
    ("a base that nobody has", ("base model",), "nobody/nothing"),
    ("a base on another host", ("base model",), "\\\\host\\share"),
    ("a base on another host, forward", ("base model",), "//host/share"),
):
    config_case(_name, _words, by_name=True, base_model_name_or_path=_value)
config_case(
    "a revision that climbs", ("revision",), by_name=True, base_model_name_or_path="acme/tiny", revision="../../../x"
)
for _name, _bytes in (
    ("a configuration that is not UTF-8", b'{"peft_type": "\xff"}'),
    ("a configuration that is deep", b'{"r":' * DEEP),
    ("a configuration that is deep and closed", b'{"r":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    ("a configuration that is a list", b"[]"),
    ("a configuration that is a pickle", pickle.dumps({"r": 8})),
    ("a configuration that is empty", b""),
    ("a configuration with r twice", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "r": 8}'),
    ("a configuration of 64 MB", b'{"a":[' + b"[]," * 21_000_000 + b"[]]}"),
    ("a configuration of 4 MB of brackets", b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"),
):

    def _build(box: Path, content: bytes = _bytes) -> None:
        adapter(box)
        (box / CONFIG).write_bytes(content)

    case(_name, CONFIG, *(["'r'", "twice"] if "twice" in _name else []))(_build)


def factors_case(name: str, words: tuple[str, ...], tensors: dict[str, Any], **config: Any) -> None:
    """``tensors``: a shape for ones, or an array."""

    def build(box: Path) -> None:
        values = {key: np.ones(value) if isinstance(value, tuple) else value for key, value in tensors.items()}
        adapter(box, values, **config)

    case(name, *words)(build)


BOTH: dict[str, Any] = {A: (2, 8), B: (8, 2)}


def besides(change: str, into: str) -> dict[str, Any]:
    """A and B under a changed name."""
    return {key.replace(change, into): shape for key, shape in BOTH.items()}


_nan, _inf = np.ones((2, 8)), np.ones((8, 2))
_nan[0, 0], _inf[1, 1] = np.nan, np.inf
for _name, _words, _tensors in (
    ("A without B", (WEIGHTS, A, "lora_B is missing"), {A: (2, 8)}),
    ("B without A", (WEIGHTS, B, "lora_A is missing"), {B: (8, 2)}),
    ("A of another rank", (WEIGHTS, A, "r = 2"), {A: (3, 8), B: (8, 2)}),
    ("B of another rank", (WEIGHTS, B, "r = 2"), {A: (2, 8), B: (8, 3)}),
    ("A that is a vector", (WEIGHTS, A, "shape"), {A: (16,), B: (8, 2)}),
    ("A of no values", (WEIGHTS, A, "shape"), {A: (2, 0), B: (8, 2)}),
    ("B of three dimensions", (WEIGHTS, B), {A: (2, 8), B: (8, 2, 3)}),
    ("NaN in A", (A, "NaN"), {A: _nan, B: (8, 2)}),
    ("infinity in B", (B, "NaN"), {A: (2, 8), B: _inf}),
    ("two adapters in one file", (WEIGHTS, "several adapters"),
     BOTH | besides(".weight", ".other.weight")),
    ("a factor of another base", (WEIGHTS, "wrong base"), besides("q_proj", "no_proj")),
    ("an update that does not fit the base", (WEIGHTS, A), {A: (2, 9), B: (9, 2)}),
    ("two updates of one weight", (Q.removesuffix(".weight"),),
     BOTH | besides("model.model.model", "model.model")),
    ("magnitudes without DoRA", (WEIGHTS, "use_dora"),
     BOTH | {A.replace("lora_A.weight", "lora_magnitude_vector"): (8,)}),
    ("factors of another method beside", (WEIGHTS, "vera_lambda"),
     BOTH | {A.replace("lora_A.weight", "vera_lambda_b"): (8,)}),
    ("an update of enormous shape", (WEIGHTS, A), {A: (2, 500_000), B: (500_000, 2)}),
    ("a name made to hang", (WEIGHTS,), {"x" + ".lora_A" * 40_000 + ".": (2, 8)}),
    ("a name made to hang, shorter", (WEIGHTS,), {"x" + ".lora_A" * 140 + ".": (2, 8), B: (8, 2)}),
):  # fmt: skip
    factors_case(_name, _words, _tensors)


def typed(box: Path, dtype: str, bits: int) -> None:
    adapter(box)
    size = 16 * bits // 8
    raw(box / WEIGHTS, {A: entry((2, 8), 0, size, dtype), B: entry((8, 2), size, 2 * size, dtype)}, b"\0" * (2 * size))


for _dtype, _bits in (("I32", 32), ("BOOL", 8), ("F8_E8M0", 8), ("F4", 4), ("C64", 64)):
    case(f"factors of {_dtype}", WEIGHTS, A, _dtype)(partial(typed, dtype=_dtype, bits=_bits))


@case("an adapter that is a pickle", "adapter_model.bin", *PICKLE)
def _(box: Path) -> None:
    adapter(box)
    (box / WEIGHTS).unlink()
    (box / "adapter_model.bin").write_bytes(bomb(box))


@case("an adapter without its configuration", CONFIG, "missing")
def _(box: Path) -> None:
    adapter(box)
    (box / CONFIG).unlink()


@case("a configuration without its adapter", WEIGHTS, "missing")
def _(box: Path) -> None:
    adapter(box)
    (box / WEIGHTS).unlink()


@case("several adapters", "one, two")
def _(box: Path) -> Arguments:
    for name in ("one", "two"):
        (box / name).mkdir()
        adapter(box / name)
    return ["ranks", str(box), "--base", str(box.parent / "base")]  # audit takes them all


@case("folders of adapters that forge a line", "several adapters")
def _(box: Path) -> Arguments:
    for name in ("one\nspectra: error: fine", "two\x1b[2J"):
        (box / name).mkdir()
        adapter(box / name)
    return ["ranks", str(box), "--base", str(box.parent / "base")]


@case("an adapter for a base", "this is an adapter")
def _(box: Path) -> Arguments:
    adapter(box)
    return ["audit", str(box.parent / "base"), "--base", str(box)]


@case("an adapter and a model in one file", A, Q, "both match")
def _(box: Path) -> None:
    adapter(box, {A: np.ones((2, 8)), B: np.ones((8, 2)), Q: np.ones((8, 8))})


@case("an adapter that is its own base", CONFIG.replace("_config.json", ""))
def _(box: Path) -> Arguments:
    adapter(box, base_model_name_or_path=".")
    return ["audit", str(box)]


@case("sub-byte values that --verify reads", "box", "nothing to analyse")
def _(box: Path) -> Arguments:
    raw(box / FILE, {Q: entry((8, 8), 0, 32, "F4")}, b"\0" * 32)
    return ["audit", str(box), "--base", str(box.parent / "base"), "--hash-contents"]


@case("a configuration given for weights", "config.json", "configuration")
def _(box: Path) -> Arguments:
    (box / "config.json").write_text("{}")
    return ["inspect", str(box / "config.json")]


# How they are run.


Job = Callable[[Path], Arguments]  # builds something in a folder; what to run on it


def run_all(folder: Path, jobs: Mapping[str, Job], ready: Sequence[Arguments] = ()) -> Iterator[tuple[str, Any]]:
    """Builds and runs jobs, each in a forked process; ``ready`` is run before, so that it is loaded."""
    known = prepare(folder / "ready", Case("ready", lambda box: adapter(box), ()))
    for arguments in (known, *ready):
        assert silently(arguments) == 0, "what is not hostile is read"
    for number, (name, job) in enumerate(jobs.items()):
        home = folder / f"{number:03d}"
        arguments = job(home)
        before = snapshot(home)
        result = in_a_fork(arguments, folder / "answer.json", known)
        result["changed"] = sorted(before ^ snapshot(home))
        result["home"] = str(home)
        yield name, result
        for file in home.rglob("*"):  # the large ones
            if file.is_file() and not file.is_symlink() and file.stat().st_size > 1_000_000:
                file.unlink()


def silently(arguments: Arguments) -> int:
    """Runs the command; its exit code."""
    from spectra.cli import main

    with Path(os.devnull).open("w") as to, contextlib.redirect_stdout(to), contextlib.redirect_stderr(to):
        return main(arguments)


# What a command does, by the paths that it is given, without the command.
API: dict[str, Callable[[str, str | None], Any]] = {
    "audit": lambda tuned, base: spectra.audit(tuned, base),
    "inspect": lambda tuned, base: inspection.inspect(tuned, base),
    "compare": lambda tuned, base: spectra.compare([tuned], base, quick=True),
    "ranks": lambda tuned, base: spectra.ranks(tuned, base),
    "repair": lambda tuned, base: spectra.repair(tuned, base, scale=0.5),
    "plot": lambda tuned, base: spectra.layer_spectra([tuned], base),
    "cache": lambda base, _: spectra.cache(base, dry_run=True),
}


def raised_by_the_api(arguments: Arguments) -> str | None:
    """The class of what the function behind a command raises: "SpectraError" for all of ours; None for none."""
    paths = arguments[2:] if arguments[0] == "plot" else arguments[1:]
    base = arguments[arguments.index("--base") + 1] if "--base" in arguments else None
    try:
        API[arguments[0]](paths[0], base)
    except spectra.SpectraError:
        return "SpectraError"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def snapshot(home: Path) -> set[str]:
    return {
        f"{path.relative_to(home)} {path.lstat().st_size} {path.lstat().st_mtime_ns}"
        for path in home.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def in_a_fork(arguments: Arguments, answer: Path, known: Arguments) -> dict[str, Any]:
    """Runs the command there; what it said, took, opened to read, and (``events``) opened to write or started."""
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            _run_here(arguments, answer, known)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 120  # of a busy machine; what it may take is counted in processor time
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if not answer.exists():
        return {"code": None, "out": "", "err": "killed", "seconds": 99.0, "mib": 0.0, "opened": [], "events": [],
                "raised": None}  # fmt: skip
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _run_here(arguments: Arguments, answer: Path, known: Arguments) -> None:
    from io import StringIO

    from spectra.cli import main

    resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))  # what copies a file of terabytes shall not
    opened: list[str] = []
    events: list[str] = []

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            mode, flags = values[1], values[2]
            writes = (isinstance(mode, str) and set("wxa+") & set(mode)) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            (events if writes else opened).append(str(values[0]))
        elif event.startswith(
            ("subprocess", "os.system", "os.exec", "os.fork", "socket.", "pickle", "os.remove", "os.ren")
        ):
            events.append(f"{event} {values}"[:200])

    out, err, code = StringIO(), StringIO(), None
    silently(known)  # a fork has yet to map the pages of the libraries
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmHWM")
    sys.addaudithook(watch)
    started = time.process_time()  # another's work beside it does not count; what waits is killed
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 99
        except BaseException:
            traceback.print_exc()
    seconds = time.process_time() - started
    peak = _status("VmHWM")
    result = {
        "code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds, "mib": (peak - before) / 1024,
        "opened": tuple(opened), "events": tuple(events), "raised": raised_by_the_api(arguments),
    }  # fmt: skip
    answer.write_text(json.dumps(result))


def check_refused(found: dict[str, Any], mib: float = MIB) -> None:
    """Holds a result to what is promised of every hostile file; what was written is left to the caller."""
    err = found["err"]
    assert found["code"] == 2, err
    assert err.startswith("spectra: error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable(), "one line, and nothing that steers a terminal"
    assert len(err) < 1600
    assert "Traceback" not in err
    # Where single layers fail, the function returns a report that says so.
    of_layers = found["raised"] is None and any(word in err for word in (": failed: ", "non_finite", "infinite"))
    assert found["raised"] == "SpectraError" or of_layers, found["raised"]
    check_quiet(found, mib)


def check_quiet(found: dict[str, Any], mib: float = MIB) -> None:
    """The limits on time and memory, and that nothing was read but the case's own files."""
    assert found["seconds"] <= SECONDS
    assert found["mib"] <= mib
    assert found["changed"] == []
    assert CANARY not in found["err"] + found["out"]
    # The case's own files, and the code and the libraries that are loaded late.
    own, code = Path(found["home"]).resolve(), [Path(place).resolve() for place in (ROOT, sys.prefix, sys.base_prefix)]
    for opened in found["opened"]:
        path = Path(opened).resolve()
        if own in path.parents:
            assert own / "outside" not in path.parents, opened
        elif path.suffix in (".py", ".pyc", ".so", ".pem") or path.is_relative_to("/proc"):
            continue
        else:
            assert any(path.is_relative_to(place) for place in code), opened


def _status(key: str) -> int:
    """A number of kilobytes that the system keeps of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise AssertionError(key)


def main(folder: Path, results: Path, names: Sequence[str]) -> None:
    """Runs the cases of these names, or all of both modules."""
    from tests.support import hostile_formats

    assert hostile_formats.STATE, "which has registered its cases"
    jobs: dict[str, Job] = {name: partial(prepare, one=CASES[name]) for name in names or CASES}
    results.write_text(json.dumps(dict(run_all(folder, jobs))))


if __name__ == "__main__":
    from tests.support import hostile

    hostile.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])  # whose cases are those that others add to
