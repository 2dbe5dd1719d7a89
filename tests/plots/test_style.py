"""How figures look: what differs without colour, and the callers' settings."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from spectra import plots
from spectra.errors import UsageError
from spectra.plots.counts import PARTS
from spectra.plots.style import StyledFigure, look
from tests.support.figures import MAGIC, SEVERAL


def test_the_callers_settings_are_kept_and_change_nothing():
    wanted = plots.render(plots.epsilon_sweep(SEVERAL), "svg")
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        assert plots.render(plots.epsilon_sweep(SEVERAL), "svg") == wanted
        assert dict(mpl.rcParams) == before


def test_a_figure_saves_itself_with_its_fonts(tmp_path):
    figure = plots.epsilon_sweep(SEVERAL)
    figure.savefig(tmp_path / "figure.pdf")
    assert b"/FontFile2" in (tmp_path / "figure.pdf").read_bytes()
    assert isinstance(figure, StyledFigure)
    assert figure._repr_png_().startswith(MAGIC["png"])


def test_save(tmp_path):
    figure = plots.epsilon_sweep(SEVERAL)
    plots.save(figure, tmp_path / "figure.PDF")
    assert (tmp_path / "figure.PDF").read_bytes() == plots.render(figure, "pdf")
    with pytest.raises(UsageError, match=r"figure\.jpg: expected a name that ends in \.png, \.svg or \.pdf"):
        plots.save(figure, tmp_path / "figure.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.PDF"]
    with pytest.raises(UsageError, match="format = 'gif'"):
        plots.render(figure, "gif")


def test_lines_differ_without_colour():
    looks = [look(place) for place in range(12)]
    assert len({one.marker for one in looks}) == 12
    assert len({(str(one.linestyle), one.color) for one in looks}) == 12
    assert all(a.linestyle != b.linestyle for a, b in itertools.pairwise(looks))


def lightness(colour):
    """CIE L* of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_parts_of_bars_differ_without_colour():
    for (one, hatch), (other, pattern) in itertools.combinations(PARTS, 2):
        assert hatch != pattern or abs(lightness(one) - lightness(other)) > 30


@pytest.mark.parametrize("name", ["magma", "magma_r"])
def test_shades_are_even_in_lightness(name):
    levels = [lightness(mpl.colormaps[name](x)[:3]) for x in np.linspace(0, 1, 21)]
    steps = np.diff(levels if name == "magma" else levels[::-1])
    assert (steps > 1.5).all()
    assert (steps < 6.5).all()
