"""``spectra.plot``: figures from files."""

from __future__ import annotations

import pytest

import spectra
from spectra.errors import UsageError
from spectra.tasks.plot import worst_of
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report

LORA, BASE = FIXTURES / "lora-r4", FIXTURES / "base"


@pytest.mark.parametrize("kind", ["similarity", "cosines", "layers", "epsilon"])
def test_a_figure_and_its_file(tmp_path, kind):
    figure = spectra.plot(LORA, BASE, kind=kind, to=tmp_path / "figure.svg", include="layers.0.*.v_proj", size=16)
    assert figure.axes
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()


def test_of_several(tmp_path):
    assert spectra.plot([LORA, FIXTURES / "full"], BASE, kind="depth", include="*.v_proj").axes


def test_layers_that_are_not_named_are_chosen():
    assert len(spectra.plot(LORA, BASE, kind="similarity", size=8).axes) >= 3


def test_noise_comes_last():
    noisy = layer("noise", (0, 1, 2, 3), noise_like_base=True)
    assert worst_of([report([noisy, layer("a", (0,)), layer("b", (0, 1)), layer("c")])]) == ["b", "a", "c"]
    with pytest.raises(UsageError, match="nothing to draw"):
        worst_of([report([layer("a", status="unchanged", vectors=())])])


def test_no_such_kind():
    with pytest.raises(UsageError, match="kind = 'pie'; expected one of similarity"):
        spectra.plot(LORA, BASE, kind="pie")
