"""Tables that fit a terminal."""

from __future__ import annotations

import pytest

from spectra.render.columns import LEAST_NAME, fitted, table
from spectra.render.text import render_report
from tests.support.reports import layer, report

HEADER = ("layer", "intruders", "cosine", "rank")
NAMES = [f"model.layers.{number}.self_attn.a_long_projection" for number in (0, 7, 31)]
ROWS = [[name, "3", "0.25", "16"] for name in NAMES]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_only_names_are_shortened(width):
    whole = table(HEADER, ROWS, left=(0,))
    text = fitted(
        f"A sentence before it.\n\n{whole}\nA note after it that is longer than any terminal is wide.\n", width
    )
    lines = text.split("\n")
    shown = lines[2:6]
    room = max(width, LEAST_NAME + len("  intruders  cosine  rank"))
    assert max(map(len, shown)) <= max(room, 0)
    for line, name in zip(shown[1:], NAMES, strict=True):
        assert line.split()[1:] == ["3", "0.25", "16"]
        assert line.split()[0] == name or ("~" in line and name.endswith(line.split()[0].rpartition("~")[2]))
    assert shown[0].split() == list(HEADER)
    assert lines[0] == "A sentence before it."
    assert lines[6] == "A note after it that is longer than any terminal is wide."


def test_a_wide_terminal_changes_nothing():
    text = render_report(report([layer(name, (0, 1)) for name in NAMES]), verbose=True)
    assert fitted(text, 500) == text
    narrow = fitted(text, 70)
    assert narrow != text
    assert len(narrow.split("\n")) == len(text.split("\n"))
