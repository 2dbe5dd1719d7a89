"""Models that are split into parts, by gguf's own writer."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from spectra.cli import main
from spectra.errors import CorruptFileError, MissingFileError, UnsafeFileError
from spectra.files.checkpoint import open_checkpoint
from tests.support.dialects import draw
from tests.support.gguf_files import write_gguf


@pytest.fixture
def parts(tmp_path, rng):
    """A folder with a model of six tensors in three parts, as the converter splits one, and its weights."""
    weights = {f"blk.{layer}.ffn_{part}.weight": draw(rng, 8, 8) for layer in range(3) for part in ("up", "down")}
    writer = gguf.GGUFWriter(None, "qwen2", split_max_tensors=2)
    writer.add_name("in parts")
    for name, value in weights.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file(tmp_path / "model.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path, {
        f"model.layers.{name.split('.')[1]}.mlp.{name.split('_')[1].split('.')[0]}_proj.weight": value
        for name, value in weights.items()
    }


def test_the_parts_of_a_model_are_read_as_one(parts, capsys):
    folder, weights = parts
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for place in (folder, *(folder / file for file in files)):
        opened = open_checkpoint(place)
        assert opened.tensors.keys() == weights.keys()
        assert all(torch.equal(opened.load(name), value) for name, value in weights.items())
        assert len(opened.files) == 3
    assert main(["audit", str(folder), "--base", str(folder / files[1]), "--no-cache"]) == 0
    assert "6 unchanged" in capsys.readouterr().out


def test_a_first_part_may_hold_the_metadata_alone(parts):
    folder, weights = parts
    for number in (3, 2, 1):
        (folder / f"model-{number:05}-of-00003.gguf").rename(folder / f"model-{number + 1:05}-of-00004.gguf")
    rewritten = {}
    for number in range(2, 5):
        path = folder / f"model-{number:05}-of-00004.gguf"
        rewritten[number] = {item.name: np.array(item.data) for item in gguf.GGUFReader(path).tensors}
    for number in range(1, 5):
        fields = [("uint16", "split.no", number - 1), ("uint16", "split.count", 4), ("int32", "split.tensors.count", 6)]
        write_gguf(folder / f"model-{number:05}-of-00004.gguf", "qwen2", rewritten.get(number, {}), fields)
    assert open_checkpoint(folder).tensors.keys() == weights.keys()


def part(folder, number, count=3):
    return folder / f"model-{number:05}-of-{count:05}.gguf"


def broken(folder, number, **changes):
    """A part written anew with other fields or other tensors."""
    tensors = {item.name: np.array(item.data) for item in gguf.GGUFReader(part(folder, number)).tensors}
    fields = {"split.no": number - 1, "split.count": 3, "split.tensors.count": 6} | changes.get("fields", {})
    kinds = [
        ("uint32" if isinstance(value, int) else "string", key, value)
        for key, value in fields.items()
        if value is not None
    ]
    write_gguf(part(folder, number), "qwen2", tensors | changes.get("tensors", {}), kinds)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def swap(one, other):
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def outside(folder):
    """A part that is a link to a file beside the folder."""
    elsewhere = folder.parent / "elsewhere.gguf"
    part(folder, 2).rename(elsewhere)
    part(folder, 2).symlink_to(elsewhere)


ONE = {"blk.0.ffn_up.weight": np.ones((8, 8), np.float32)}


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda folder: part(folder, 2).unlink(), MissingFileError, ("00002-of-00003", "missing")),
        (lambda folder: (part(folder, 1).unlink(), part(folder, 2).unlink()), MissingFileError, ("2 of 3",)),
        (lambda folder: part(folder, 1).rename(folder / "a.gguf"), CorruptFileError, ("rename it",)),
        (lambda folder: broken(folder, 2, fields={"split.no": 2}), CorruptFileError, ("part 2", "expected 1 of 3")),
        (lambda folder: broken(folder, 3, fields={"split.no": None}), CorruptFileError, ("part None",)),
        (lambda folder: broken(folder, 2, fields={"split.count": 4}), CorruptFileError, ("of 4",)),
        (lambda folder: broken(folder, 1, fields={"split.count": "3"}), CorruptFileError, ("split.count",)),
        (lambda folder: broken(folder, 1, fields={"split.count": 65_000}), CorruptFileError, ("split.count",)),
        (lambda folder: broken(folder, 1, fields={"split.tensors.count": 7}), CorruptFileError, ("6 tensors", "7")),
        (lambda folder: broken(folder, 3, tensors=ONE), CorruptFileError, ("ffn_up", "as well")),
        (lambda folder: part(folder, 3).write_bytes(b"GGUF"), CorruptFileError, ("00003-of-00003", "truncated")),
        (lambda folder: cut(part(folder, 3)), CorruptFileError, ("truncated",)),
        (lambda folder: broken(folder, 1, fields={"split.count": 2**31}), CorruptFileError, ("split.count",)),
        (lambda folder: broken(folder, 1, fields={"split.no": 1}), CorruptFileError, ("part 1", "expected 0 of 3")),
        (lambda folder: broken(folder, 2, fields={"split.no": "1"}), CorruptFileError, ("part 1",)),
        (lambda folder: broken(folder, 2, fields={"split.count": None}), CorruptFileError, ("of None",)),
        (lambda folder: broken(folder, 1, fields={"split.tensors.count": 2**31}), CorruptFileError, ("6 tensors",)),
        (lambda folder: swap(part(folder, 2), part(folder, 3)), CorruptFileError, ("expected 1 of 3",)),
        (lambda folder: part(folder, 2).write_bytes(b"\0" * 200), CorruptFileError, ("no GGUF file",)),
        (lambda folder: part(folder, 1).write_bytes(part(folder, 2).read_bytes()), CorruptFileError, ("part 1",)),
        (lambda folder: outside(folder), UnsafeFileError, ("00002-of-00003",)),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused_in_one_line(parts, capsys, harm, error, words):
    folder, _ = parts
    harm(folder)
    first = next(path for path in sorted(folder.iterdir()))
    with pytest.raises(error):
        open_checkpoint(first)
    assert main(["inspect", str(first)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


def test_two_models_in_parts_are_asked_about(parts, capsys):
    folder, _ = parts
    for number in (1, 2, 3):
        (folder / f"other-{number:05}-of-00003.gguf").write_bytes(part(folder, number).read_bytes())
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "model-00001-of-00003.gguf" in said
    assert "other-00001-of-00003.gguf" in said
    assert "00002" not in said
