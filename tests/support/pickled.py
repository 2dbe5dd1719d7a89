"""Pickled checkpoints that are broken or made to harm, for ``--allow-pickle``; run and measured as those of hostile.py.

``python -m tests.support.pickled FOLDER RESULTS`` runs all of them.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import hostile
from tests.support.hostile import Arguments, Case, bomb

K, Q = hostile.NAMES[1], hostile.NAMES[0]
BIN, INDEX, ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
ROOM = b"\0" * 256

# A pickle put together by hand: what torch.save would not write.


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + group(*arguments) + b"R"


def storage(key: str = "0", count: int = 64, kind: str = "FloatStorage") -> bytes:
    return group(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    shape: tuple[int, ...] = (8, 8), strides: tuple[int, ...] = (8, 1), offset: int = 0, of: bytes | None = None
) -> bytes:
    sizes = group(*map(number, shape)), group(*map(number, strides))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of or storage(), number(offset), *sizes, b"\x89", hooks)


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def whole(**items: bytes) -> bytes:
    return b"\x80\x02" + table(**items) + b"."


def archive(
    content: bytes,
    members: Mapping[str, bytes] | None = None,
    *,
    root: str = "archive",
    compressed: tuple[str, ...] = (),
) -> bytes:
    """A torch archive with this data.pkl; ``members`` by name, "0" for a storage."""
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w") as out:
        for name, data in (
            {"data.pkl": content, "byteorder": b"little", "0": ROOM, "version": b"3\n"} | dict(members or {})
        ).items():
            where = f"{root}/data/{name}" if name.isdecimal() else f"{root}/{name}"
            kind = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            out.writestr(zipfile.ZipInfo(where), data, kind)
    return place.getvalue()


GOOD = whole(**{Q: tensor(), K: tensor()})
NOTHING_RUN = ("nothing of it was run",)

CASES: dict[str, Case] = {}


def case(name: str, words: tuple[str, ...], build: Callable[[Path], Arguments | None]) -> None:
    def built(box: Path) -> Arguments:
        return [*(build(box) or ["audit", str(box), "--base", str(box.parent / "base")]), "--allow-pickle"]

    assert name not in CASES
    CASES[name] = Case(name, built, words)


def of_file(name: str, words: tuple[str, ...], content: Callable[[Path], bytes] | bytes, file: str = BIN) -> None:
    def build(box: Path) -> None:
        if isinstance(content, bytes):
            (box / file).write_bytes(content)
        elif made := content(box):  # else it wrote the file itself
            (box / file).write_bytes(made)

    case(name, (file, *words), build)


def runs(name: str, *arguments: bytes) -> bytes:
    """An archive whose pickle would call something."""
    return archive(whole(**{Q: tensor(), "x": call(name, *arguments)}))


for _name in ("os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "runpy._run_code"):
    of_file(f"a call of {_name}", (_name, *NOTHING_RUN), runs(_name, text("touch exploded")))
for _name, _arguments in (
    ("builtins.bytearray", (number(10**11),)),
    ("builtins.getattr", (named("torch.nn"), text("x"))),
    ("_codecs.encode", (text("x"), text("rot13"))),
    ("torch.load", (text("other.bin"),)),
    ("torch.hub.load", (text("a/b"), text("c"))),
    ("torch._utils._rebuild_qtensor", (storage(), number(0))),
    ("torch._utils._rebuild_sparse_tensor", (named("torch.sparse_coo"), number(0))),
    ("torch._utils._rebuild_device_tensor_from_numpy", (number(0),)),
    ("torch._utils._rebuild_wrapper_subclass", (number(0),)),
    ("numpy.core.multiarray._reconstruct", (number(0),)),
    ("collections.Counter", (number(0),)),
    ("functools.partial", (named("os.system"),)),
    ("torch.jit.load", (text("x"),)),
):
    of_file(f"a call of {_name}", (_name, *NOTHING_RUN), runs(_name, *_arguments))
of_file("a call of a storage", ("torch.FloatStorage", *NOTHING_RUN), runs("torch.FloatStorage", number(10**12)))
of_file("a call of a dtype", ("torch.float32", *NOTHING_RUN), runs("torch.float32", number(1)))
of_file("an object made", ("NEWOBJ", *NOTHING_RUN), archive(whole(x=named("torch.Size") + b")\x81")))
of_file("an instance made", ("INST", *NOTHING_RUN), archive(b"(ios\nsystem\n."))
of_file("a name off the stack", ("STACK_GLOBAL", *NOTHING_RUN), archive(text("os") + text("system") + b"\x93."))
of_file("an extension", ("EXT1", *NOTHING_RUN), archive(b"\x80\x02\x82\x01."))
of_file("a pickle as pickle writes it", ("FRAME", *NOTHING_RUN), lambda box: archive(bomb(box)))
of_file("a state that is set", ("malformed pickle",), archive(b"\x80\x02" + named("torch.Size") + b"}b."))
of_file("a bare pickle that writes", ("bare pickle",), bomb)
of_file("a bare pickle", ("bare pickle",), pickle.dumps({"w": [1.0]}))
of_file("a bare pickle that writes: model.pth", ("bare pickle",), bomb, "model.pth")


def _legacy(box: Path) -> bytes:
    import torch

    place = io.BytesIO()
    torch.save({Q: torch.ones(8, 8)}, place, _use_new_zipfile_serialization=False)
    return place.getvalue()


def _directory(change: Callable[[bytearray, int], None]) -> bytes:
    """An archive whose first entry in the directory, or whose end, was changed."""
    content = bytearray(archive(GOOD))
    change(content, content.index(b"PK\x01\x02"))
    return bytes(content)


def _at(offset: int, value: int, length: int, mark: bytes = b"PK\x01\x02") -> bytes:
    def change(content: bytearray, _: int) -> None:
        at = content.index(mark) + offset
        content[at : at + length] = value.to_bytes(length, "little")

    return _directory(change)


def _twice() -> bytes:
    """Two entries of the directory for one member."""
    content = archive(GOOD, {"x": b"1", "y": b"2"})
    return content.replace(b"archive/y", b"archive/x")


def _overlapping() -> bytes:
    """All members of the directory share the place of the first."""
    content, at = bytearray(archive(GOOD)), 0
    while (at := content.find(b"PK\x01\x02", at + 1)) > 0:
        content[at + 42 : at + 46] = bytes(4)
    return bytes(content)


def _ends(count: int, length: int, begin: int) -> bytes:
    return struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, length, begin, 0)


def _ends64(count: int, length: int, begin: int) -> bytes:
    return struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, begin)


def _locates(place: int) -> bytes:
    return struct.pack("<4sIQI", b"PK\x06\x07", 0, place, 1)


def _parts() -> tuple[bytes, bytes]:
    """What an archive begins with, and its directory."""
    content = archive(GOOD)
    begin = content.index(b"PK\x01\x02")
    return content[:begin], content[begin:-22]


def _gap() -> bytes:
    members, directory = _parts()
    return members + directory + b"gap" + _ends(4, len(directory), len(members))


def _long_directory(box: Path, said: int = 0xFFFFFFFF) -> bytes:
    """``said`` is its length in 32 bits."""
    length = 300 << 20
    with (box / BIN).open("wb") as out:
        out.write(b"PK\x03\x04")
        out.seek(length + 100)
        out.write(_ends64(1, length, 100) + _locates(length + 100) + _ends(1, said, 100))
    return b""


def _two_lengths() -> bytes:
    members, directory = _parts()
    place = len(members) + len(directory)
    ends = _ends64(4, len(directory), len(members)) + _locates(place)
    return members + directory + ends + _ends(4, len(directory) - 1, len(members))


def _two_directories() -> bytes:
    """One directory lies before the locator, where some readers look, the other where it points, where others do."""
    members, directory = _parts()
    first, place = _ends64(4, len(directory), len(members)), len(members) + len(directory)
    second = directory + _ends64(4, len(directory), place + len(first))
    return members + directory + first + second + _locates(place) + _ends(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)


for _name, _words, _content in (
    ("what torch wrote before 1.6", ("before 1.6",), _legacy),
    ("an empty file", ("empty",), b""),
    ("a page", ("not an archive",), b"<!DOCTYPE html>" + b" " * 900),
    ("an archive of nothing", ("not an archive",), b"PK\x05\x06" + bytes(18)),
    ("half an archive", ("truncated",), archive(GOOD)[:400]),
    ("an archive without its end", ("truncated",), archive(GOOD)[:-30]),
    ("an archive with more behind it", ("truncated",), archive(GOOD) + b"x" * 100),
    ("an archive in an archive", ("not an archive as torch.save",), archive(b"", {"x": archive(GOOD)}, root="a/b")),
    ("two folders in one archive", ("one folder",), archive(GOOD).replace(b"archive/byteorder", b"another/byteorder")),
    ("no data.pkl", ("no data.pkl",), archive(GOOD).replace(b"data.pkl", b"data.pkr")),
    ("a pickle that was compressed", ("compressed",),
     archive(b"\x80\x02" + b"}0" * 20_000_000, compressed=("data.pkl",))),
    ("a storage that was compressed", ("compressed",), archive(GOOD, compressed=("0",))),
    ("members with one name", ("twice",), _twice()),
    ("members in one place", ("malformed",), _overlapping()),
    ("a member behind the end", ("malformed",), _at(42, 2**31, 4)),
    ("a member larger than the file", ("compressed",), _at(20, 2**31, 4)),
    ("an encrypted member", ("compressed",), _at(8, 1, 2)),
    ("a directory that is somewhere else", ("archive",), _at(16, 2**31, 4, b"PK\x05\x06")),
    ("a directory that is too long", ("directory",), _at(12, 2**31, 4, b"PK\x05\x06")),
    ("a directory that says nothing", ("archive",), _at(12, 0, 4, b"PK\x05\x06")),
    ("a directory of another archive", ("directory",), _at(12, 2**32 - 1, 4, b"PK\x05\x06")),
    ("a zip64 directory of 300 MB", ("directory", "described"), lambda box: _long_directory(box, 100)),
    ("a zip64 directory of 300 MB, as is said twice", ("directory has", "bytes"), _long_directory),
    ("two directories, each found by another reader", ("directory", "archive"), _two_directories()),
    ("a directory that leaves a member out", ("its directory has",), _at(10, 3, 2, b"PK\x05\x06")),
    ("something between the directory and its end", ("directory ends",), _gap()),
    ("a length in 32 bits and another in 64", ("described",), _two_lengths()),
    ("a member that is marked as a folder", ("folder",), _at(38, 0x10, 4)),
    ("a byte order that is empty", ("byte order",), archive(GOOD, {"byteorder": b""})),
    ("a program of TorchScript", ("TorchScript",), archive(GOOD, {"code/__torch__.py": b"import os"})),
    ("a program's constants", ("TorchScript",), archive(GOOD, {"constants.pkl": b"\x80\x02)."})),
    ("big-endian numbers", ("byte order",), archive(GOOD, {"byteorder": b"big"})),
    ("a pickle without an end", ("malformed pickle",), archive(GOOD[:-1])),
    ("a pickle that is cut", ("malformed pickle",), archive(GOOD[:60])),
    ("a pickle of nothing", ("malformed pickle",), archive(b"")),
    ("a pickle that is text", ("malformed pickle",), archive(b"hello")),
    ("a pickle that leaves two things", ("malformed pickle",), archive(b"\x80\x02}}.")),
    ("a pickle that takes what is not there", ("malformed pickle",), archive(b"\x80\x02u.")),
    ("a pickle that remembers what was never there", ("malformed pickle",), archive(b"\x80\x02h\x07.")),
    ("a pickle that is filled", ("malformed pickle",), archive(b"\x80\x02K\x01(K\x01K\x02u.")),
    ("a pickle with an odd dictionary", ("malformed pickle",), archive(b"\x80\x02}(K\x01u.")),
    ("dictionaries, 300,000 of them", ("more to it",), archive(b"\x80\x02" + b"}" * 300_000 + b".")),
    ("places in the memo, 150,000 of them", ("no tensors",),
     archive(b"\x80\x02}" + b"".join(b"r" + n.to_bytes(4, "little") for n in range(150_000)) + b".")),
    ("values of one byte, 700,000 of them", ("more to it",), archive(b"\x80\x02" + b"N" * 700_000 + b".")),
    ("a pickle of 40 MB", ("bytes",), archive(b"\x80\x02" + b"}0" * 20_000_000 + b".")),
    ("text of 900 kB", ("no name",), archive(whole(**{"x" * 900_000: tensor()}))),
    ("text that would be of 4 GB", ("malformed pickle",), archive(b"\x80\x02X\xff\xff\xff\xff.")),
    ("a number of 200 digits", ("malformed pickle",), archive(whole(w=tensor(shape=(2**800, 1), strides=(1, 1))))),
    ("marks, 5,000 of them", ("malformed pickle",), archive(b"\x80\x02" + b"(" * 5000 + b".")),
    ("a tuple of tuples of tuples as a key", ("malformed pickle",),
     archive(b"\x80\x02}(K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01u.")),
    ("a list within a list", ("a list",), archive(b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".")),
    ("a list that holds itself", ("a list",), archive(b"\x80\x02]q\x00h\x00a.")),
    ("a dictionary that holds itself", ("no tensors",), archive(b"\x80\x02}q\x00X\x01\0\0\0xh\x00s.")),
    ("a tensor alone", ("not a dictionary",), archive(b"\x80\x02" + tensor() + b".")),
    ("a number alone", ("a number",), archive(b"\x80\x02K\x01.")),
    ("no tensors", ("no tensors",), archive(whole(epoch=number(3)))),
    ("an optimizer's state", ("no tensors",),
     archive(whole(state=table(x=table(exp_avg=tensor())), param_groups=b"]"))),
    ("two models", ("model", "state_dict"),
     archive(whole(model=table(w=tensor()), state_dict=table(w=tensor())))),
    ("a model and tensors of its own", ("model", "beside"), archive(whole(model=table(w=tensor()), w=tensor()))),
    ("a model under another name", ("'ema'", "state_dict"), archive(whole(ema=table(w=tensor())))),
    ("a tensor whose name is a number", ("no name",), archive(b"\x80\x02}(K\x01" + tensor() + b"u.")),
    ("a tensor's name with a line of its own", ("no name",), archive(whole(**{"w\nspectra: error: fine": tensor()}))),
    ("a key beside the model that is no name", ("no name", "epoch"),
     archive(whole(**{"state_dict": table(w=tensor()), "\x1b]0;pwned\x07\x1b[2Jepoch": number(3)}))),
    ("a key beside the model that never ends", ("no name",),
     archive(whole(**{"state_dict": table(w=tensor()), "x" * 501: number(3)}))),
    ("a tensor's name that is no text", ("malformed pickle",),
     archive(b"\x80\x02}(" + text(b"\xff\xfe") + tensor() + b"u.")),
    ("a tensor without its storage", (Q, "not in the archive"), archive(whole(**{Q: tensor(of=storage("7"))}))),
    ("a storage in two forms", ("malformed pickle", "two forms"),
     archive(whole(**{Q: tensor(), K: tensor((16, 8), of=storage(count=128, kind="HalfStorage"))}))),
    ("a tensor that is negated", ("conjugated or negated", *NOTHING_RUN), archive(whole(**{
        Q: call("torch._utils._rebuild_tensor_v2", storage(), number(0), group(number(8), number(8)),
                group(number(8), number(1)), b"\x89", b"}", table(neg=b"\x88"))}))),
    ("an empty tensor of an enormous shape", (Q, "too large"),
     archive(whole(**{Q: tensor((2**62, 2**62, 0), (1, 1, 1))}))),
    ("a storage that climbs out", ("malformed pickle",), archive(whole(**{Q: tensor(of=storage("../../outside/x"))}))),
    ("a storage that is a number", ("malformed pickle",), archive(whole(**{Q: tensor(of=number(3))}))),
    ("a storage of 4 TB", (Q, "its storage"), archive(whole(**{Q: tensor(of=storage(count=10**12))}))),
    ("a storage of less than nothing", ("malformed pickle",), archive(whole(**{Q: tensor(of=storage(count=-1))}))),
    ("a storage of another kind", ("torch.ShapeStorage",),
     archive(whole(**{Q: tensor(of=storage(kind="ShapeStorage"))}))),
    ("an enormous shape of one value", (Q, "shape"), archive(whole(**{Q: tensor((10**6, 10**6), (0, 0))}))),
    ("an enormous shape", (Q, "shape"), archive(whole(**{Q: tensor((10**9, 10**9), (10**9, 1))}))),
    ("a shape that overflows", (Q, "shape"), archive(whole(**{Q: tensor((2**62, 2**62), (2**62, 1))}))),
    ("a tensor behind its storage", (Q, "shape"), archive(whole(**{Q: tensor(offset=1)}))),
    ("strides that lead out", (Q, "shape"), archive(whole(**{Q: tensor(strides=(9, 1))}))),
    ("strides that go back", ("malformed pickle",), archive(whole(**{Q: tensor(strides=(-8, 1))}))),
    ("strides that are missing", ("malformed pickle",), archive(whole(**{Q: tensor(strides=(1,))}))),
    ("a shape of 40 dimensions", ("malformed pickle",), archive(whole(**{Q: tensor((1,) * 40, (1,) * 40)}))),
    ("an offset that is text", ("malformed pickle",),
     archive(whole(**{Q: call("torch._utils._rebuild_tensor_v2", storage(), text("0"), group(), group())}))),
    ("a parameter of nothing", ("malformed pickle",),
     archive(whole(**{Q: call("torch._utils._rebuild_parameter", b"N")}))),
):  # fmt: skip
    of_file(_name, _words, _content)


def shards(box: Path, weight_map: Any = None, first: bytes = b"", second: bytes = b"") -> None:
    """A base in two shards."""
    (box / FIRST).write_bytes(first or archive(whole(**{Q: tensor()})))
    (box / SECOND).write_bytes(second or archive(whole(**{K: tensor()})))
    found = {Q: FIRST, K: SECOND} if weight_map is None else weight_map
    (box / INDEX).write_text(json.dumps({"weight_map": found}))


def linked(box: Path, name: str) -> None:
    (box.parent / "outside" / name).write_bytes(archive(GOOD))
    (box / name).symlink_to(Path("..") / "outside" / name)


for _name, _words, _map in (
    ("a shard that climbs out", (INDEX, Q), {Q: "../outside/x.bin", K: SECOND}),
    ("a shard by its whole path", (INDEX, Q), {Q: "/etc/x.bin", K: SECOND}),
    ("a shard on a drive", (INDEX, Q), {Q: "C:x.bin", K: SECOND}),
    ("a shard on another host", (INDEX, Q), {Q: "\\\\host\\share\\x.bin", K: SECOND}),
    ("a shard that is a number", (INDEX, Q), {Q: 7, K: SECOND}),
    ("a shard of safetensors", (INDEX, Q), {Q: "model.safetensors", K: SECOND}),
    ("a shard that is missing", ("other.bin",), {Q: "other.bin", K: SECOND}),
    ("a tensor that is in the other shard", (FIRST, K), {Q: FIRST, K: FIRST}),
    ("a tensor that is in no shard", (SECOND, "'x'"), {Q: FIRST, K: SECOND, "x": SECOND}),
    ("an empty index", (INDEX,), {}),
):
    case(_name, _words, lambda box, given=_map: shards(box, given))  # type: ignore[misc]
case("a shard that writes", (SECOND, *NOTHING_RUN), lambda box: shards(box, second=runs("os.system", text("x"))))
case(
    "a tensor that the index leaves out",
    (SECOND, "'x'", "says otherwise"),
    lambda box: shards(box, second=archive(whole(**{K: tensor(), "x": tensor()}))),
)
case("a tensor in both shards", (SECOND, Q), lambda box: shards(box, second=archive(GOOD)))
case("a link that leads out", (BIN, "leads out"), lambda box: linked(box, BIN))


def adapter(box: Path, content: bytes) -> None:
    hostile.adapter(box)
    (box / "adapter_model.safetensors").unlink()
    (box / ADAPTER).write_bytes(content)


case("an adapter that writes", (ADAPTER, *NOTHING_RUN), lambda box: adapter(box, runs("os.system", text("x"))))
case("an adapter that is a bare pickle", (ADAPTER, "bare"), lambda box: adapter(box, bomb(box)))
case("a trainer's state alone", ("training_args.bin",), lambda box: _kept(box, "training_args.bin"))
case("two models in a folder", ("a.pt", "b.pt"), lambda box: _kept(box, "a.pt", "b.pt"))
case("a base that writes", (BIN, *NOTHING_RUN), lambda box: _as_base(box, runs("os.system", text("x"))))
case("a disguise as safetensors", ("model.safetensors", "pickle"), lambda box: _kept(box, "model.safetensors"))


def _kept(box: Path, *names: str) -> None:
    for name in names:
        (box / name).write_bytes(archive(GOOD))


def _as_base(box: Path, content: bytes) -> Arguments:
    (box / BIN).write_bytes(content)
    return ["audit", str(box.parent / "base"), "--base", str(box)]


if __name__ == "__main__":
    jobs = {name: partial(hostile.prepare, one=CASES[name]) for name in sys.argv[3:] or CASES}
    Path(sys.argv[2]).write_text(json.dumps(dict(hostile.run_all(Path(sys.argv[1]), jobs))))
