"""Names of fine-tunes that are compared."""

from __future__ import annotations

from spectra.records.comparison import short_names


def test_short_names_tell_paths_apart():
    assert short_names(["a/b/c", "a/d/c"]) == ("b/c", "d/c")
    assert short_names(["x/one", "y/two"]) == ("one", "two")
    assert short_names(["0.5*x/one + 0.5*y/two", "x/one"]) == ("0.5*one + 0.5*two", "one")
    assert len(set(short_names(["same", "same"]))) == 2
