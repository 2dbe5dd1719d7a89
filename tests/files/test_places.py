"""Where things are kept by default."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spectra.files.places import default_root


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPECTRA_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"SPECTRA_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/spectra"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/spectra"),
        ({"HOME": "/c"}, "/c/.cache/spectra"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has other variables")
def test_default_place(monkeypatch, variables, expected):
    for name in ("SPECTRA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_root() == Path(expected)
