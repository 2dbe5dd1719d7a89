"""All figures: nothing is cut off, files are the same each time, and what has nothing to draw says so."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from spectra import plots
from spectra.errors import UsageError
from spectra.plots.kinds import KINDS
from tests.support.figures import MAGIC, SEVERAL, SOURCES, drawn, faults
from tests.support.paths import ROOT

ALL = [
    pytest.param(kind, source, id=f"{name}-{case}")
    for name, kind in KINDS.items()
    for case, source in SOURCES[kind.needs].items()
    if not (name == "overlap" and case == "one")
]


@pytest.mark.parametrize(("kind", "source"), ALL)
def test_nothing_is_cut_off_or_written_over(kind, source):
    """All text lies within the figure, and no two texts on each other; it is as wide as columns are."""
    figure = drawn(kind, source)
    width, height = figure.get_size_inches()
    assert width in (3.4, 5.0, 7.0)
    assert 1 < height < 13
    assert faults(figure) == []


def test_what_is_cut_off_or_written_over_is_seen():
    figure = plots.epsilon_sweep(SEVERAL[:1])
    assert faults(figure) == []
    figure.axes[0].set_title("a title that is far too long for the one column of a paper " * 2)
    figure.axes[0].text(0.5, -0.02, "over the ticks", transform=figure.axes[0].transAxes, va="top", ha="center")
    kinds = Counter(kind for kind, *_ in faults(figure))
    assert kinds["cut off"] == 1
    assert kinds["written over"] >= 1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_files(kind):
    """The right kinds of file, with fonts in them, and the same bytes each time."""
    one, again = (drawn(kind, SOURCES[kind.needs]["several"]) for _ in range(2))
    for format in plots.FORMATS:
        data = plots.render(one, format)
        assert data.startswith(MAGIC[format])
        assert data == plots.render(again, format)
        if format == "svg":
            assert b"<text" in data
            assert b"<dc:date>" not in data
        elif format == "pdf":
            assert b"/FontFile2" in data
            assert b"/Type3" not in data
            assert b"CreationDate" not in data


def test_registry():
    assert list(KINDS) == [
        "similarity", "cosines", "spectra", "layers", "depth", "epsilon", "top-k", "weights", "ranks", "trajectory",
        "overlap", "size",
    ]  # fmt: skip
    for kind in KINDS.values():
        assert getattr(plots, kind.function).__doc__
        assert kind.function in plots.__all__
        assert kind.help
    assert set(plots.__all__) <= set(dir(plots))
    for name in plots.__all__:
        assert getattr(plots, name) is not None
    with pytest.raises(AttributeError, match="pie"):
        _ = plots.pie


def test_what_is_imported():
    """The registry needs no matplotlib; a figure says that it does, and never loads torch."""
    lazy = "import sys, spectra.plots; assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    missing = """
import sys; sys.modules['matplotlib'] = None
from spectra.plots import KINDS
from spectra.errors import UsageError
for kind in KINDS.values():
    try: kind.draw([])
    except UsageError as error: assert str(error).endswith("pip install '.[plots]'"), error
    else: raise AssertionError
"""
    whole = """
import sys, spectra.plots
for name in spectra.plots.__all__: getattr(spectra.plots, name)
assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)
"""
    for code in (lazy, missing, whole):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_to_draw(kind):
    with pytest.raises(UsageError, match=r"nothing to draw|overlaps need at least two"):
        kind.draw([])
