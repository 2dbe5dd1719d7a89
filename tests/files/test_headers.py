"""Headers of safetensors as the library reads them, and the bounds on what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectra.errors import CorruptFileError, MissingFileError
from spectra.files.configs import read_json
from spectra.files.headers import MAX_ENTRY_BYTES, MAX_METADATA_BYTES, read_header
from tests.support import hostile

PLACE = Path("model.safetensors")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [1, 3, 2000])
def test_headers_are_read_as_the_library_reads_them(tmp_path, count, indent):
    from safetensors import safe_open

    names = [f'"quoted" \\ {{brace}} ü {i}' for i in range(count)]
    header = {"__metadata__": {'a"b\\': '{}\\"' * 50_000, "": ""}}
    header |= {name: hostile.entry((2, 1), 8 * i, 8 * i + 8) for i, name in enumerate(names)}
    text = json.dumps(header, indent=indent, ensure_ascii=count > 1).encode()
    hostile.raw(tmp_path / PLACE, text + b" " * 5000, b"\0" * 8 * count)
    found = read_header(tmp_path / PLACE)
    with safe_open(tmp_path / PLACE, framework="np") as file:
        assert sorted(found) == sorted(file.keys())
    assert [info.span for info in found.values()] == [(8 + len(text) + 5000 + 8 * i, 8) for i in range(count)]


def test_an_escape_between_two_chunks(tmp_path):
    for shift in range(4):
        notes = "x" * shift + '\\"' * 300_000
        header = {"__metadata__": {"notes": notes}, "w": hostile.entry((1,), 0, 4)}
        hostile.raw(tmp_path / PLACE, header, b"\0" * 4)
        assert set(read_header(tmp_path / PLACE)) == {"w"}, f"shifted by {shift}"


def test_large_metadata_are_read_and_larger_ones_refused(tmp_path):
    for size, fine in ((MAX_ENTRY_BYTES * 9, True), (MAX_METADATA_BYTES, False)):
        header = {"__metadata__": {"notes": "x" * size}, "w": hostile.entry((1,), 0, 4)}
        hostile.raw(tmp_path / PLACE, header, b"\0" * 4)
        if fine:
            assert set(read_header(tmp_path / PLACE)) == {"w"}
        else:
            with pytest.raises(CorruptFileError, match="__metadata__"):
                read_header(tmp_path / PLACE)


def test_names_that_occur_twice_matter_where_readers_would_differ(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / "config.json") == {"a": 2}
    with pytest.raises(CorruptFileError, match="'a' occurs twice"):
        read_json(tmp_path / "config.json", unique=True)
    assert read_json(tmp_path / "nothing.json", unique=True) == {}
    with pytest.raises(MissingFileError, match="a folder"):
        read_json(tmp_path)
