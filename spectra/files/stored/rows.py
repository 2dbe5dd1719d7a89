"""Parts of a matrix that are rows of it in regular groups: one expert, one projection of several, one head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.files.derived import Alternative, Make, Reader, Weight, read_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Of each of ``groups`` groups of ``width`` rows those from ``start`` to ``stop``."""

    groups: int
    width: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    @property
    def total(self) -> int:
        """How many rows the whole has."""
        return self.groups * self.width

    def of(self, whole: Tensor) -> Tensor:
        """The rows of a tensor of any number of dimensions; a copy, unless there is one group."""
        if self.groups == 1:
            return whole[self.start : self.stop]
        rest = whole.shape[1:]
        return whole.reshape(self.groups, self.width, *rest)[:, self.start : self.stop].reshape(self.count, *rest)

    def __str__(self) -> str:
        if self.groups == 1:
            return f"rows {self.start}:{self.stop}"
        return f"rows {self.start}:{self.stop} of each {self.width}"


@dataclass(frozen=True)
class Part:
    """Makes a weight of rows of another; with ``turned`` of its columns, which become rows."""

    weight: Weight
    rows: Rows
    turned: bool = False

    def __call__(self, read: Reader, leading: slice | None = None) -> Tensor:
        one = self.rows.groups == 1 and not self.turned
        if one:
            part = read_rows(self.weight, read, slice(self.rows.start, self.rows.stop))
        else:
            whole = read_rows(self.weight, read)
            part = self.rows.of(whole.T if self.turned else whole)
        return _leading(part, leading)


@dataclass(frozen=True)
class Member:
    """Makes a matrix (out, in) of one member of a stack (E, out, in); with ``turned`` of (E, in, out)."""

    stack: Weight
    index: int
    turned: bool = False

    def __call__(self, read: Reader, leading: slice | None = None) -> Tensor:
        member = read_rows(self.stack, read, slice(self.index, self.index + 1))[0]
        return _leading(member.T if self.turned else member, leading)


@dataclass(frozen=True)
class Joined:
    """Makes a weight of others one below the other; with ``interleaved`` row by row in turn."""

    weights: Sequence[Weight]
    interleaved: bool = False

    def __call__(self, read: Reader, leading: slice | None = None) -> Tensor:
        import torch

        parts = [read_rows(weight, read) for weight in self.weights]
        joined = torch.stack(parts, dim=1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return _leading(joined, leading)


@dataclass(frozen=True)
class Same:
    """Makes a weight that is another one under its own name."""

    weight: Weight

    def __call__(self, read: Reader, leading: slice | None = None) -> Tensor:
        return read_rows(self.weight, read, leading)


@dataclass(frozen=True)
class Turned:
    """Makes the transpose of what another makes."""

    make: Make

    def __call__(self, read: Reader, leading: slice | None = None) -> Tensor:
        return _leading(self.make(read, None).T, leading)


def own_name(info: Weight) -> str:
    """The name of the weight that it is: its own, unless that is another one's under a name of another writer."""
    return info.uses[0] if isinstance(info, Alternative) and isinstance(info.make, Same) else info.name


def footprint(info: Weight) -> tuple[tuple[str, Rows | None], ...]:
    """The weights of the base that a weight is made of, each with the rows that it has of it; None for all of them."""
    if not isinstance(info, Alternative):
        return ((info.name, None),)
    rows = info.make.rows if isinstance(info.make, Part) and not info.make.turned else None
    return tuple((name, rows) for name in info.uses)


def overlap(one: Rows | None, other: Rows | None) -> bool:
    """Whether two parts of one weight may share rows."""
    if one is None or other is None or (one.groups, one.width) != (other.groups, other.width):
        return True
    return one.start < other.stop and other.start < one.stop


def _leading(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
