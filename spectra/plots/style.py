"""How every figure looks, and how it becomes bytes; all of matplotlib that is not a drawing's own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec

from spectra.errors import UsageError, needs_extra
from spectra.plots.subjects import fitting

try:
    from matplotlib import style as mpl_style
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import TextPath
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise needs_extra("figures need", "matplotlib", "plots") from None

SINGLE, DOUBLE = 3.4, 7.0  # inches: one column of a paper, and two
SMALL, NORMAL = 7.0, 8.0  # points
LINE = 0.132  # inches that a line of a legend takes
FORMATS = ("png", "svg", "pdf")
# Of the file; in SVG and PDF of the heat maps alone.
DPI = {"png": 200, "svg": 300, "pdf": 300}

# Okabe & Ito 2008, without yellow, which is too pale for a line on white.
BLACK, GREY = "#000000", "#8C8C8C"
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
INTRUDER = BLUE  # on every figure; it stands out from COSINES and in grey is darker than what is near it
COSINES = "magma_r"  # perceptually uniform and falling in lightness: 0 is nearly white, 1 black
NOVELTY = "magma"  # the same turned round, where what resembles nothing is to be seen

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along
    "mathtext.fontset": "dejavusans",
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "figure.titlesize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "lines.markeredgewidth": 0.8,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    "image.interpolation": "nearest",
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.fonttype": "none",
    "svg.hashsalt": "spectra",  # the same figure, the same file
}
# Who made it, so that it may be replaced by a newer one; and not when, so that one figure is always one file.
MAKER = "intruder-spectra"
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": MAKER},
    "svg": {"Creator": MAKER, "Date": None},
    "pdf": {"Creator": MAKER, "CreationDate": None},
}


class Look(NamedTuple):
    """What a line looks like; marker and line style tell lines apart without colour."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[float, ...]]

    @property
    def line(self) -> dict[str, Any]:
        """As keywords of ``plot``."""
        return self._asdict()

    @property
    def dot(self) -> dict[str, Any]:
        """The same without the line."""
        return {"color": self.color, "marker": self.marker, "linestyle": "none"}


_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BLACK, SKY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2, 1, 2, 1, 2)),
)  # fmt: skip


def look(place: int) -> Look:
    """The look of the fine-tune at a place in the order; the first 60 differ in marker or line style."""
    return Look(_COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)], _LINES[place % len(_LINES)])


def styled() -> AbstractContextManager[None]:
    """matplotlib's settings as the figures need them, whatever the caller's; these come back afterwards."""
    context: AbstractContextManager[None] = mpl_style.context(["default", STYLE])
    return context


P = ParamSpec("P")


def figure_function(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Has a function draw in this style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with styled():
            figure = draw(*args, **kwargs)
            settle(figure)
            return figure

    return drawn


class StyledFigure(Figure):
    """A figure that keeps its style: its ticks when it is drawn, its fonts, not curves, when it is saved."""

    def draw(self, renderer: RendererBase) -> None:
        with styled():
            super().draw(renderer)

    def savefig(self, fname: Any, **options: Any) -> None:
        with styled():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return render(self, "png")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts make room for each other."""
    return StyledFigure(figsize=(width, height), layout="constrained")


def settle(figure: Figure) -> None:
    """Lays the parts of a figure out, once and for all: matplotlib would move them a little at each drawing."""
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        for _ in range(2):  # the second time with the ticks that the first one led to
            engine.execute(figure)
        figure.set_layout_engine("none")


def render(figure: Figure, format: str) -> bytes:
    """The figure as a PNG (200 dpi), SVG or PDF file; the same bytes each time.

    Raises
    ------
    UsageError : another format.
    """
    if format not in FORMATS:
        raise UsageError(f"format = {format!r}; expected one of {', '.join(FORMATS)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=DPI[format], metadata=METADATA[format])
    return buffer.getvalue()


def file_format(path: str | Path) -> str:
    """The format that a file's ending names; raises UsageError for another ending."""
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UsageError(f"{path}: expected a name that ends in .{', .'.join(FORMATS[:-1])} or .{FORMATS[-1]}")
    return ending


def save(figure: Figure, path: str | Path) -> None:
    """Writes :func:`render`'s bytes, in the format that the ending names; nothing is written if drawing fails.

    Raises
    ------
    UsageError : another ending.
    """
    data = render(figure, file_format(path))
    Path(path).write_bytes(data)


def plain(text: str) -> str:
    """A name that matplotlib takes for no formula, and its legends for no private one."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = SMALL) -> float:
    """In inches, of the widest line."""
    font = FontProperties(family=STYLE["font.family"])
    return (
        max(
            (
                TextPath((0, 0), plain(line), size, font).get_extents().width
                for line in text.split("\n")
                if line.strip()
            ),
            default=0.0,
        )
        / 72
    )


def shortened(names: Sequence[str], inches: float, size: float = SMALL) -> list[str]:
    """The names as they fit into a width, still different where they were, ready to be drawn."""
    return [plain(name) for name in fitting(names, lambda text: text_width(text, size) <= inches)]


def frame(
    figure: Figure,
    legend: Sequence[tuple[str, Artist | BarContainer | dict[str, Any]]] = (),
    *,
    title: Sequence[str] = (),
    x: str = "",
    y: str = "",
) -> None:
    """What stands around the panels: a title over them, labels for all of them, and a legend underneath.

    The figure grows by their height.  The parts of a title stand on one line where they fit.  A legend has
    names with artists, or with the keywords of a line; its columns are as many as fit.  To be called last.
    """
    width, height = figure.get_size_inches()
    columns, room = _legend_columns([text_width(name) for name, _ in legend], width - 0.1)
    rows = -(-len(legend) // columns) if legend else 0
    key, label = (0.12 + LINE * rows) * bool(rows), 0.17 * bool(x)
    title = [part for part in title if part]
    if text_width(": ".join(title), NORMAL) < width - 0.1:
        title = [": ".join(title)] if title else []
    height += key + label + 0.16 * len(title)
    figure.set_size_inches(width, height)
    share = (key + label) / height
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, share, 1, 1 - share))
    if legend:
        handles: list[Any] = [Line2D([], [], **how) if isinstance(how, dict) else how for _, how in legend]
        figure.legend(
            handles, shortened([name for name, _ in legend], room), loc="lower center", bbox_to_anchor=(0.5, 0.0),
            ncols=columns, borderaxespad=0.2, borderpad=0.1, labelspacing=0.3,
        )  # fmt: skip
    if x:
        figure.text(0.5, share, x, ha="center", va="top", in_layout=False)
    if y:
        figure.supylabel(y, fontsize="medium").set_y((1 + share) / 2)
    if title:
        figure.suptitle("\n".join(shortened([part], width - 0.1, NORMAL)[0] for part in title))


def _legend_columns(widths: Sequence[float], inches: float) -> tuple[int, float]:
    """How many columns fit, and the room for a label in each; they are filled one after the other."""
    line, gap = 0.36, 0.12  # inches, of STYLE's handles and between columns
    if not widths:
        return 1, inches
    for columns in range(len(widths), 0, -1):
        rows = -(-len(widths) // columns)
        if sum(max(widths[i : i + rows]) + line + gap for i in range(0, len(widths), rows)) <= inches:
            return -(-len(widths) // rows), inches
    return 1, inches - line - gap


def grid(figure: Figure, panels: int, columns: int, **options: Any) -> list[Axes]:
    """So many axes in rows of ``columns``, in reading order; shared ticks are labelled at the outer edge."""
    rows = -(-panels // columns)
    made = figure.subplots(rows, columns, squeeze=False, **options)
    axes = [one for row in made for one in row]
    for place, spare in enumerate(axes[panels:], panels):
        spare.remove()
        axes[place - columns].tick_params(labelbottom=True)
    return axes[:panels]


def whole_numbers(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Ticks at whole numbers alone."""
    (axes.xaxis if axis == "x" else axes.yaxis).set_major_locator(
        MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)
    )


def from_zero(*axes: Axes) -> None:
    """The vertical axis of all of them from 0 to a little above what is drawn; to be called last."""
    top = max(float(one.dataLim.y1) for one in axes)
    for one in axes:
        one.set_ylim(0, 1.07 * top if math.isfinite(top) and top > 0 else 1)


def log_ticks(axes: Axes, name: Literal["x", "y"], least: float, most: float) -> None:
    """A logarithmic axis from ``least`` to ``most`` with plain numbers on it, or powers of ten if these are many."""
    axes.set(**{f"{name}scale": "log", f"{name}lim": (least, most)})
    low, high = math.log10(least), math.log10(most)
    if high - low < 2.5:
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if least <= tick <= most]
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)


def colour_bar(figure: Figure, picture: Any, axes: Any, label: str, inches: float) -> None:
    """The scale of a heat map's shades, beside axes that are so many inches high together."""
    bar = figure.colorbar(picture, ax=axes, label=label, aspect=inches / 0.1, pad=0.02)
    bar.outline.set_linewidth(0.6)


def uncertain(corner: tuple[float, float] = (0.0, 0.0)) -> Rectangle:
    """The cell of a heat map whose value is not known."""
    return Rectangle(corner, 1, 1, facecolor="#D9D9D9", edgecolor="none", zorder=1.5)
