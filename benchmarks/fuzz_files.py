"""What the fuzzer begins with of GGUF files, pickles and pipelines, and how others read them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived
from spectra.files.gguf.headers import BLOCKS, TYPES, read_gguf
from spectra.files.pickles import NESTED
from spectra.files.stored.quantised.ggml import READ

BINARY = ("gguf", "pickle", "archive")
NAMES = {
    "gguf": "model.gguf", "pickle": "pytorch_model.bin", "archive": "pytorch_model.bin", "pipeline": "model_index.json"
}  # fmt: skip
STORAGES = {"0": bytes(range(64)), "1": bytes(range(100, 164)), "2": b"\0\1" * 32}  # of an archive, beside its pickle
# Instructions of pickles, and numbers and marks of archives and GGUF files.
TOKENS = [
    b"\x80\x02", b"}", b"]", b")", b"(", b"t", b"u", b"s", b"R", b"Q", b"b", b".", b"N", b"\x88", b"\x89", b"\x85",
    b"\x86", b"q\x00", b"h\x00", b"h\x05", b"K\x00", b"K\x01", b"K\x04", b"K\x10", b"K\x40", b"M\x00\x01",
    b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001",
    b"X\x01\x00\x00\x00w", b"cos\nsystem\n", b"ctorch\nHalfStorage\n", b"ctorch\nFloatStorage\n", b"ctorch\nfloat16\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nSize\n", b"\x93", b"\x81",
    b"ccollections\nOrderedDict\n)R", b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06", b"PK\x01\x02", b"\xff\xff\xff\xff",
    b"\0" * 4, b"\0" * 8, b"\x01\0\0\0", b"\x02\0\0\0\0\0\0\0", b"\x1b[2J", b"GGUF", b"llama",
]  # fmt: skip


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def a_gguf(architecture: str = "llama", kind: int = 0, version: int = 3, blocks: int | None = None) -> bytes:
    """A model of two matrices and a vector; ``kind`` is the first's type, ``blocks`` the second's."""
    heads = [(f"{architecture}.attention.{key}", 4, struct.pack("<I", 2)) for key in ("head_count", "head_count_kv")]
    fields = [
        ("general.architecture", 8, _text(architecture)),
        *heads,
        ("tokens", 9, struct.pack("<IQ", 8, 1) + _text("a")),
    ]
    shapes: list[tuple[str, int, tuple[int, ...], int]] = [
        ("blk.0.attn_q.weight", kind, (32, 4), 512 if kind == 0 else 72), ("blk.0.ffn_up.weight", 30, (4, 4), 32),
        ("output_norm.weight", 0, (4,), 16),
    ]  # fmt: skip
    if blocks is not None:
        _, values, width = TYPES[blocks]
        shapes[1] = ("blk.0.ffn_up.weight", blocks, (values, 4), 4 * width)
    head = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(fields))
    head += b"".join(_text(key) + struct.pack("<I", of) + value for key, of, value in fields)
    data = b""
    for name, of, sizes, length in shapes:
        head += _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, of, len(data))
        data += bytes(index % 120 for index in range(length)) + bytes(-length % 32)
    return head + bytes(-len(head) % 32) + data


def an_archive(pickled: bytes) -> bytes:
    """A torch archive with that pickle, and storages of 64 bytes."""
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w") as out:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            out.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for name, content in STORAGES.items():
            out.writestr(zipfile.ZipInfo(f"archive/data/{name}"), content)
    return place.getvalue()


def prepare(kind: str) -> None:
    """Imports what :func:`compare` needs, so that no input is blamed for the time."""
    for name in ("gguf", "torch") if kind in NAMES else ("peft",) if kind == "config" else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def seeds_of(kind: str) -> list[bytes]:
    """Sound inputs of a kind: files, or the pickle of one."""
    if kind == "gguf":
        quantised = [a_gguf(blocks=number) for number, (name, _, _) in TYPES.items() if name in READ]
        return [a_gguf(), a_gguf(kind=2), a_gguf("qwen2", version=2), *quantised]
    if kind == "pipeline":
        whole = {
            "_class_name": "P",
            "unet": ["diffusers", "U"],
            "text_encoder": ["transformers", "T"],
            "vae": [None, None],
        }
        return [json.dumps(value).encode() for value in (whole, {"unet": ["diffusers", "U"]})]
    import torch

    values = torch.arange(16.0)  # 64 bytes, as all of these
    states: list[dict[str, Any]] = [
        {"w": values.clone().reshape(4, 4), "b": torch.arange(8.0).double()},
        {"model": {"w": values.reshape(2, 8).T, "v": values[3:9:2]}, "epoch": 3, "note": "x", "losses": [0.5, 1]},
        {"w": torch.nn.Parameter(values.clone().reshape(4, 4)), "n": torch.arange(64).bool()},
        {"w": torch.zeros(8, 4, dtype=torch.uint16), "f": torch.zeros(64, dtype=torch.float8_e4m3fn)},
    ]
    inputs = []
    for state in states:
        place = io.BytesIO()
        torch.save(state, place)
        if kind == "archive":
            inputs.append(place.getvalue())
        else:
            with zipfile.ZipFile(place) as opened:
                inputs.append(opened.read("archive/data.pkl"))
    return inputs


def write_pipeline(folder: Path) -> None:
    """The models that the index may name."""
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        home = folder / component
        home.mkdir()
        header = json.dumps({f"{component}.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
        (home / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        (home / "config.json").write_text("{}")


def compare(kind: str, file: Path, checkpoint: Checkpoint) -> None:
    """Raises AssertionError where what is read is not what others read from the same file."""
    {"gguf": _compare_gguf, "pipeline": _compare_pipeline}.get(kind, _compare_pickle)(file, checkpoint)


def _compare_gguf(file: Path, checkpoint: Checkpoint) -> None:
    content = file.read_bytes()
    for name, info in checkpoint.tensors.items():
        assert info.span[0] + info.span[1] <= len(content), "a tensor behind the end"
        if info.dtype not in BLOCKS and info.as_stored:
            begin, length = info.span
            assert _bits(checkpoint.read(name)) == content[begin : begin + length], "another value"
        elif info.dtype not in BLOCKS:
            checkpoint.read(name)
    try:
        import gguf

        theirs = {one.name: one for one in gguf.GGUFReader(file).tensors}
    except Exception:  # what it cannot read says nothing
        return
    ours = read_gguf(file).tensors
    assert ours.keys() == theirs.keys(), "other names than gguf's"
    for name, info in ours.items():
        one = theirs[name]
        said = tuple(int(size) for size in reversed(one.shape)), (int(one.data_offset), int(one.n_bytes))
        assert (info.shape, info.span) == said, "another tensor"
        assert info.dtype == one.tensor_type.name, "another tensor"
    weight, mine = theirs.get("blk.0.ffn_up.weight"), checkpoint.weights.get("model.layers.0.mlp.up_proj.weight")
    if weight is not None and isinstance(mine, Derived) and mine.quantised and mine.shape[-1] > 0:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(weight.data, weight.tensor_type)
        assert np.array_equal(checkpoint.load(mine).numpy(), expected, equal_nan=True), "another value"


def _compare_pickle(file: Path, checkpoint: Checkpoint) -> None:
    import torch

    values = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name, value in values.items():
        rows = slice(1, None, 2)
        assert not value.ndim or _bits(checkpoint.read(name, rows=rows)) == _bits(value[rows]), (
            "another value of some rows"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # what it cannot read says nothing
        return
    inner = [loaded, *(loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping))]
    theirs: Mapping[Any, Any] = next((one for one in inner if _tensors(one)), {})
    assert values.keys() == _tensors(theirs).keys(), "other names than torch's"
    for name, value in _tensors(theirs).items():
        assert (value.dtype, value.shape) == (values[name].dtype, values[name].shape), "another tensor"
        assert _bits(value.detach()) == _bits(values[name]), "another value"


def _tensors(values: Mapping[Any, Any]) -> dict[Any, Any]:
    import torch

    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _bits(value: Any) -> bytes:
    import torch

    flat = torch.empty(value.shape, dtype=value.dtype).copy_(value).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if value.numel() else b""


def _compare_pipeline(file: Path, checkpoint: Checkpoint) -> None:
    said = json.loads(file.read_bytes())
    assert all(isinstance(said.get(name), list) for name in checkpoint.components), "a component that is not named"
    expected = {f"{name}.{name}.w" for name in checkpoint.components}
    assert checkpoint.tensors.keys() == expected, "another tensor"
    assert all(checkpoint.read(name).shape == (2, 2) for name in expected), "another tensor"
