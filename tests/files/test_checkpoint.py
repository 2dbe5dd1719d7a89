"""Reading files: what is there, and one hostile file per error."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import spectra
from spectra.cli import main
from spectra.errors import (
    AmbiguousFilesError,
    CheckpointError,
    CorruptFileError,
    MissingFileError,
    SpectraError,
    UnsafeFileError,
)
from spectra.files.checkpoint import Checkpoint, open_checkpoint, read_header
from tests.support.hostile import raw as raw_file
from tests.support.paths import FIXTURES

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "c.bias": torch.zeros(5, dtype=torch.float16),
    "d": torch.tensor(3.0, dtype=torch.float64),
}


@pytest.fixture
def good(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_header_and_tensors(good):
    checkpoint = open_checkpoint(good)
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == {
        "a.weight": ("F32", (3, 4)),
        "b.weight": ("BF16", (2, 2)),
        "c.bias": ("F16", (5,)),
        "d": ("F64", ()),
    }
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_folder_and_file_are_the_same(good):
    assert open_checkpoint(good.parent).tensors == open_checkpoint(good).tensors


def shard(folder, count=3, name="model"):
    names = list(TENSORS)
    files = [f"{name}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {tensor: files[i % count] for i, tensor in enumerate(names)}
    for file in files:
        save_file({t: TENSORS[t] for t in names if weight_map[t] == file}, folder / file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def test_shards_read_as_one(tmp_path, good):
    (tmp_path / "sharded").mkdir()
    index, _ = shard(tmp_path / "sharded")
    for path in (index, index.parent):
        checkpoint = open_checkpoint(path)
        assert checkpoint.layout == "sharded safetensors"
        assert len(checkpoint.files) == 3
        for name, tensor in TENSORS.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_peft_folder_and_its_subfolder(tmp_path):
    adapter = open_checkpoint(FIXTURES / "lora-r4")
    assert adapter.layout == "peft folder"
    assert adapter.adapter_config is not None
    (tmp_path / "default").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "default" / file).write_bytes((FIXTURES / "lora-r4" / file).read_bytes())
    assert open_checkpoint(tmp_path).path == tmp_path / "default"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(AmbiguousFilesError, match="default, other"):
        open_checkpoint(tmp_path)


def test_fingerprint_of_headers_and_contents(good):
    headers = open_checkpoint(good).fingerprint()
    contents = open_checkpoint(good).fingerprint(hash_contents=True)
    assert (headers.covers, contents.covers) == ("headers", "contents")
    assert headers.headers == headers.value == contents.headers != contents.value
    changed = {**TENSORS, "a.weight": TENSORS["a.weight"] + 1}
    save_file(changed, good)
    assert open_checkpoint(good).fingerprint() == headers
    assert open_checkpoint(good).fingerprint(hash_contents=True).value != contents.value


def test_what_no_one_reads_enters_the_fingerprint(tmp_path):
    """Tensors of a dtype that has no form in memory are hashed where they lie."""
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.uint8), "c": torch.zeros(0, 3)}
    save_file(values, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path)
    for name in values:
        read.read(name, digest=True)
    assert read.fingerprint() == open_checkpoint(tmp_path).fingerprint(hash_contents=True)
    header = {"w": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]},
              "v": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [16, 19]}}  # fmt: skip
    text, prints = json.dumps(header).encode(), set()
    for last in (1, 2):
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(18) + bytes([last]))
        prints.add(open_checkpoint(tmp_path).fingerprint(hash_contents=True))
    assert len(prints) == 2
    assert {made.covers for made in prints} == {"contents"}
    opened = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(text)
    with pytest.raises(CorruptFileError, match="the file changed"):
        opened.fingerprint(hash_contents=True)


def test_fingerprint_does_not_depend_on_the_order_of_reading(good):
    prints = set()
    for names in (list(TENSORS), list(reversed(TENSORS))):
        checkpoint = open_checkpoint(good)
        for name in names:
            checkpoint.read(name, digest=True)
        prints.add(checkpoint.fingerprint())
    assert len(prints) == 1
    assert prints.pop().covers == "contents"


def test_fingerprint_of_hub_blobs(tmp_path, good):
    blob = tmp_path / ("ab" * 32)
    good.rename(blob)
    good.symlink_to(blob)
    assert open_checkpoint(good).fingerprint().covers == "contents"


HEADER = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}

# One hostile file each: what it is, how to make it, the error, and what the message must say.
HOSTILE = {
    "empty": (lambda p: p.write_bytes(b""), CorruptFileError, "empty"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), CorruptFileError, "truncated"),
    "no tensors": (lambda p: raw_file(p, {}), CorruptFileError, "no tensors"),
    "truncated data": (lambda p: raw_file(p, HEADER, b"\0" * 15), CorruptFileError, "truncated"),
    "truncated header": (lambda p: p.write_bytes(struct.pack("<Q", 500) + b'{"w":'), CorruptFileError, "truncated"),
    "data too long": (lambda p: raw_file(p, HEADER, b"\0" * 17), CorruptFileError, "size"),
    "header too long": (lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{" * 60), CorruptFileError, "limit"),
    "not json": (lambda p: raw_file(p, b'{"w": nonsense}'), CorruptFileError, "not JSON"),
    "deep json": (lambda p: raw_file(p, b'{"w":' + b"[" * 100_000), CorruptFileError, "not JSON"),
    "twice the same name": (
        lambda p: raw_file(p, b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                              b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        CorruptFileError, "twice",
    ),
    "overlapping": (
        lambda p: raw_file(p, {"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                               "w": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}, b"\0" * 6),
        CorruptFileError, "offset for tensor",
    ),
    "shape that does not fit": (
        lambda p: raw_file(p, {"w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 16]}}, b"\0" * 16),
        CorruptFileError, "invalid shape",
    ),
    "unknown dtype": (
        lambda p: raw_file(p, {"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        CorruptFileError, "F99",
    ),
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        CorruptFileError, "git lfs pull",
    ),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol=2)), UnsafeFileError, "pickle"),
    "torch zip": (lambda p: torch.save({"w": torch.ones(2)}, p), UnsafeFileError, "pickle"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + b"\0" * 80), CorruptFileError, "GGUF"),
    "random bytes": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(4000)), CorruptFileError, "not a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(tmp_path, kind, capsys):
    make, error, words = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path)), "the message begins with the path"
    assert main(["audit", str(path), "--base", str(FIXTURES / "base")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, "one line"
    assert str(path) in captured.err


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_no_bytes_make_it_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_pickles_by_name(tmp_path):
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"whatever it is")
        with pytest.raises(UnsafeFileError, match=r"--allow-pickle.*save_pretrained"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(UnsafeFileError):
        open_checkpoint(tmp_path)


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsafeFileError):
        open_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_header_as_long_as_a_pickle_opcode_is_no_pickle(tmp_path):
    # 0x0280 = 640 bytes of header: its length begins like pickle protocol 2
    text = json.dumps(HEADER).encode().ljust(0x0280)
    assert raw_file(tmp_path / "x.safetensors", text, b"\0" * 16)
    assert set(read_header(tmp_path / "x.safetensors")) == {"w"}


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "model.bin", ".hidden.safetensors", 3, None],
)  # fmt: skip
def test_index_names_that_leave_the_folder(tmp_path, name):
    index, weight_map = shard(tmp_path)
    weight_map["a.weight"] = name
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsafeFileError, match=r"a\.weight"):
        open_checkpoint(tmp_path)


def test_shard_that_links_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    index, weight_map = shard(tmp_path / "in")
    target = index.parent / weight_map["a.weight"]
    target.rename(tmp_path / "outside.safetensors")
    target.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UnsafeFileError, match="leads out"):
        open_checkpoint(index.parent)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda index, m: m.update({"ghost": m["a.weight"]}), CorruptFileError, "ghost"),
        (lambda index, m: m.pop("a.weight"), CorruptFileError, r"a\.weight"),
        (lambda index, m: m.update({"a.weight": m["b.weight"]}), CorruptFileError, r"a\.weight"),
        (lambda index, m: (index.parent / m["a.weight"]).unlink(), MissingFileError, "not there"),
        (lambda index, m: m.clear(), CorruptFileError, "weight_map"),
    ],
    ids=["promised tensor missing", "unlisted tensor", "swapped shards", "shard missing", "empty index"],
)
def test_index_and_shards_that_disagree(tmp_path, change, error, words):
    index, weight_map = shard(tmp_path)
    change(index, weight_map)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\ud800"])
def test_broken_json(tmp_path, text):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read(good):
    checkpoint = open_checkpoint(good)
    good.write_bytes(good.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=r"a\.weight"):
        checkpoint.read("a.weight")


def test_a_file_that_is_replaced_after_its_header_was_read(good):
    checkpoint = open_checkpoint(good)
    save_file({**TENSORS, "a.weight": torch.zeros(2, 2)}, good)
    with pytest.raises(CorruptFileError, match="changed"):
        checkpoint.read("a.weight")


def test_missing_and_ambiguous_folders(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="no safetensors"):
        open_checkpoint(tmp_path)
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(AmbiguousFilesError, match=r"one\.safetensors, two\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    with pytest.raises(MissingFileError, match=r"adapter_config\.json"):
        open_checkpoint(tmp_path)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFileError, match="neither a file"):
        open_checkpoint(tmp_path / "pipe")
    with pytest.raises(MissingFileError, match="could not be opened"):
        open_checkpoint("x" * 5000)


def test_names_with_control_characters(tmp_path):
    raw_file(tmp_path / "x.safetensors", {"w\x1b[31m": HEADER["w"]}, b"\0" * 16)
    with pytest.raises(CorruptFileError, match="control characters"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_numbers_too_long_to_convert(tmp_path, good):
    (tmp_path / "config.json").write_text('{"x": ' + "9" * 5000 + "}")
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_whole_model_beside_a_stray_adapter_config(tmp_path, good):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_checkpoint(tmp_path, as_base=True).layout == "safetensors"
    opened = open_checkpoint(tmp_path)
    assert (opened.layout, opened.adapter_config) == ("safetensors", None)
    assert "without an adapter's weights" in opened.aside["adapter_config.json"]


def test_mlx_folders_are_named(tmp_path, good):
    good.rename(tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_checkpoint(tmp_path).layout == "mlx folder"


def test_errors_also_inherit_the_builtin(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(SpectraError):
        open_checkpoint(tmp_path / "nowhere")
    assert isinstance(open_checkpoint(FIXTURES / "base"), Checkpoint)


def test_the_bytes_that_are_fetched_ahead_are_the_tensor_s(tmp_path, rng, monkeypatch):
    values = {name: rng.normal(size=shape).astype("f4") for name, shape in (("a", (3, 5)), ("b", (4,)), ("c", (2, 2)))}
    save_file({name: torch.from_numpy(value) for name, value in values.items()}, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", "soon", raising=False)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.prefetch(["c", "a"])
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, (begin, size, advice) in zip("ca", asked, strict=True):
        assert data[begin : begin + size] == values[name].tobytes()
        assert advice == "soon"
    (tmp_path / "model.safetensors").unlink()
    checkpoint.prefetch(["a"])  # reading it will say what is wrong


def test_the_next_layer_is_fetched_while_one_is_worked_on(make_base, make_adapter, rng, monkeypatch):
    names = [f"layer.{i}.q" for i in range(3)]
    base = make_base({f"{name}.weight": rng.normal(size=(16, 16)).astype("f4") for name in names})
    adapter = make_adapter(
        {name: (rng.normal(size=(16, 2)).astype("f4"), rng.normal(size=(2, 16)).astype("f4")) for name in names}
    )
    events = []
    read, prefetch = Checkpoint.read, Checkpoint.prefetch

    def noted_read(self, name, **options):
        events.append(("read", name))
        return read(self, name, **options)

    def noted_prefetch(self, names):
        events.extend(("ahead", item if isinstance(item, str) else item.name) for item in names)
        prefetch(self, names)

    monkeypatch.setattr(Checkpoint, "read", noted_read)
    monkeypatch.setattr(Checkpoint, "prefetch", noted_prefetch)
    spectra.audit(adapter, base)
    for before, after in itertools.pairwise(names):
        assert events.index(("ahead", f"{after}.weight")) < events.index(("read", f"{before}.weight"))
        assert events.index(("read", f"{before}.weight")) < events.index(("read", f"{after}.weight"))
    assert sum(kind == "read" and name.startswith("layer") for kind, name in events) == 3


def test_a_training_run_is_named_as_one(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"w": torch.zeros(2, 2)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(
        AmbiguousFilesError, match=r"training run.*\(checkpoint-5, checkpoint-10, checkpoint-100\).*compare"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("kind", "index"), [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_shards_without_their_index(tmp_path, kind, index):
    for part in (1, 2):
        (tmp_path / f"model-0000{part}-of-00002.{kind}").write_bytes(b"never read")
    with pytest.raises(MissingFileError, match=rf"{index}\.index\.json: the index of these shards is missing"):
        open_checkpoint(tmp_path, allow_pickle=True)
