"""What a benchmark is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Options of the command; None leaves a number to the benchmark."""

    quick: bool = False
    full: bool = False
    repeat: int = 5
    sizes: tuple[int, ...] | None = None
    rank: int = 16
    width: int | None = None
    layers: int | None = None
    trials: int | None = None
    large: int | None = None
    seed: int = 0
    workers: int = 1
    scratch: Path | None = None

    def scale(self, *, quick: T, default: T, full: T | None = None) -> T:
        """Whichever of them goes with ``--quick`` and ``--full``."""
        if self.quick:
            return quick
        return full if self.full and full is not None else default


class Benchmark(Protocol):
    """What every module of a benchmark offers; the docstring says what it measures and how.

    ``run`` yields the rows of a table as they come, and remarks; a row with ``agrees`` False fails the command.
    ``notes`` are further sentences that belong under the table, ``draw`` fills a plot.
    """

    TITLE: str

    @staticmethod
    def run(options: Options) -> Iterator[Row | str]: ...
    @staticmethod
    def notes(rows: list[Row]) -> list[str]: ...
    @staticmethod
    def draw(rows: list[Row], axes: Axes) -> None: ...
