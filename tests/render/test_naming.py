"""Names and messages without the folders of a machine."""

from __future__ import annotations

import pytest

from spectra.render.naming import named_model, public_names, without_paths


def test_paths_are_told_apart():
    names = public_names(["/a/x/model", "/a/y/model", "/a/b/z", "sub/../own", "/w/own2", "/w"], "/w")
    assert names == {
        "/a/x/model": "x/model", "/a/y/model": "y/model", "/a/b/z": "z",
        "sub/../own": "own", "/w/own2": "own2", "/w": ".",
    }  # fmt: skip
    assert public_names(["/a/own", "own"], "/w") == {"/a/own": "a/own", "own": "own"}
    assert public_names(["/a/own", "sub/own", "../up", ".", "/"]) == {
        "/a/own": "a/own", "sub/own": "sub/own", "../up": "up", ".": ".", "/": ".",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jo/a b/x.safetensors: tensor 'q': NaN", "x.safetensors: tensor 'q': NaN"),
        ("/w/sub/x.bin: cut", "sub/x.bin: cut"),
        ("seen from '/home/jo/base' or here", "seen from 'base' or here"),
        ("C:\\Users\\jo\\x.bin: cut", "x.bin: cut"),
        ("~/models/x is none", "x is none"),
        ("‖dW‖/‖W0‖ and n/a, 3/4/5, org/name", "‖dW‖/‖W0‖ and n/a, 3/4/5, org/name"),
    ],
)
def test_messages_lose_their_folders(text, shown):
    assert without_paths(text, {"/home/jo/a b/x.safetensors": "x.safetensors"}, "/w") == shown


def test_named_model_of_nothing():
    assert named_model("/") == "/"
