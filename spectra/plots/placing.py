"""Labels beside points, none over another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from spectra.plots.style import GREY, SMALL, settle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 4.0  # points between a point and its label
MARK = 3.0  # points from the middle of a point to its edge
DISTANCES = (1.0, *(1.5 * step for step in range(1, 50)))  # of GAP, tried one after the other
# Right, left, above, below, and between; the first that is free is taken.
DIRECTIONS = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 68, 112, 292, 248)
SIDES = {1: "left", 0: "center", -1: "right"}
HEIGHTS = {1: "bottom", 0: "center", -1: "top"}


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def common(self, other: Box) -> float:
        """The area that the two share."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.top, other.top) - max(self.bottom, other.bottom)
        return across * down if across > 0 and down > 0 else 0.0


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes each point's name beside it where it covers neither a point nor another name.

    The nearest free place is taken, a step away where points crowd, and if possible one that is nearer to no other
    point; a thin line leads to one that is not next to its own.  A name for which there is none within the axes
    takes the place where it covers least.
    """
    settle(figure)
    scale = figure.dpi / 72
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    taken = [Box(x - MARK * scale, y - MARK * scale, x + MARK * scale, y + MARK * scale) for x, y in pixels]
    inside = Box(*axes.get_window_extent().extents)
    for (x, y), point, name in zip(pixels, points, names, strict=True):
        label = axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=SMALL, annotation_clip=False
        )
        size = label.get_window_extent()
        others = [(a, b) for a, b in pixels if math.hypot(x - a, y - b) > 1]
        crowd = sum(math.hypot(x - a, y - b) < 3 * GAP * scale for a, b in pixels) > 1
        least = (math.inf, True)
        for dx, dy in _offsets(crowd):
            right, up = _sign(dx), _sign(dy)
            left = x + dx * scale - size.width * (1 - right) / 2
            bottom = y + dy * scale - size.height * (1 - up) / 2
            box = Box(left, bottom, left + size.width, bottom + size.height)
            covered = sum(map(box.common, taken)) + size.width * size.height - box.common(inside)
            begins = x + dx * scale, y + dy * scale
            astray = any(math.dist(begins, other) < math.dist(begins, (x, y)) for other in others)
            if (round(covered, 3), astray) < least:
                least, best, place = (round(covered, 3), astray), box, (dx, dy)
            if least == (0.0, False):
                break
        taken.append(best)
        label.set(position=place, ha=SIDES[_sign(place[0])], va=HEIGHTS[_sign(place[1])])
        if math.hypot(*place) > 1.5 * GAP:
            axes.annotate(
                "", point, xytext=place, textcoords="offset points", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": MARK},
            )  # fmt: skip


def _offsets(crowd: bool) -> Iterator[tuple[float, float]]:
    """Where a label may begin, in points from its point, the nearest first."""
    for distance, degrees in itertools.product(DISTANCES[2 * crowd :], DIRECTIONS):
        angle = math.radians(degrees)
        yield round(GAP * distance * math.cos(angle), 3), round(GAP * distance * math.sin(angle), 3)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
