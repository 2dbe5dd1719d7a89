"""Weights that a checkpoint does not store as such, but that follow from what it stores.

Quantised weights, one expert of a stack, one projection of several in one matrix: each is made of stored tensors when
it is asked for, and is known by name, dtype and shape before that, as stored tensors are from their headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from spectra.files.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Reader(Protocol):
    """Reads a stored tensor, or those of its leading rows that are asked for without the rest."""

    def __call__(self, name: str, rows: slice | None = None, /) -> Tensor: ...


# Makes a weight, or those of its leading rows that are asked for, from the stored tensors.
Make = Callable[[Reader, slice | None], "Tensor"]


@dataclass(frozen=True)
class Derived(TensorInfo):
    """A weight made of stored tensors.

    ``name``, ``dtype`` and ``shape`` are its own; the name may be that of a stored tensor, which it then stands for.
    ``file`` and ``span`` are those of its first source.

    Attributes
    ----------
    sources : names of the stored tensors it is made of.
    make : makes it; given rows, only those.  Its result has ``shape`` (or that many rows) and ``dtype``.
    how : for people: "nf4 in blocks of 64", "expert 3 of experts.gate_up_proj"; "" of a tensor as it is.
    quantised : what it was quantised as ("nf4", "fp8", …), None where every value is as it was stored.
    part_of : the weight, stored or derived, that it is a part of, and that is no weight of its own any more.
    whole : whether it uses up its sources, so that they are not weights of their own either.
    """

    sources: tuple[str, ...] = ()
    make: Make = field(default=None, compare=False, repr=False)  # type: ignore[assignment]
    how: str = ""
    quantised: str | None = None
    part_of: str | None = None
    whole: bool = True

    def read(self, read: Reader, rows: slice | None = None) -> Tensor:
        """The weight, or some of its leading rows."""
        return self.make(read, rows)


@dataclass(frozen=True)
class Alternative(Derived):
    """Weights in the form, or under the name, that another writer gives them; ``uses`` are their own names.

    It is looked up for what no weight is called, and takes no weight's place.
    """

    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable(TensorInfo):
    """A weight that is there by name, but in a form that is not read; ``reason`` says why.

    Its shape is () where that is not known; ``part_of`` is as in :class:`Derived`, ``uses`` as in :class:`Alternative`.
    """

    sources: tuple[str, ...] = ()
    reason: str = ""
    part_of: str | None = None
    uses: tuple[str, ...] = ()


def in_component(info: Derived | Unreadable, component: str) -> Derived | Unreadable:
    """A weight of one of a pipeline's models, under the names that it and what it is made of have in the pipeline."""

    def make(read: Reader, rows: slice | None = None) -> Tensor:
        def own(name: str, part: slice | None = None, /) -> Tensor:
            return read(f"{component}.{name}", part)

        assert isinstance(info, Derived)
        return info.make(own, rows)

    names = tuple(f"{component}.{name}" for name in info.sources)
    part_of = None if info.part_of is None else f"{component}.{info.part_of}"
    if isinstance(info, Unreadable):
        return replace(info, name=f"{component}.{info.name}", sources=names, part_of=part_of)
    return replace(info, name=f"{component}.{info.name}", sources=names, make=make, part_of=part_of)


Weight = TensorInfo  # stored, Derived or Unreadable
Weights = Mapping[str, Weight]


def sources_of(info: Weight) -> tuple[str, ...]:
    """The stored tensors that a weight is made of: itself, where it is stored."""
    return info.sources if isinstance(info, Derived | Unreadable) else (info.name,)


def read_rows(info: Weight, read: Reader, rows: slice | None = None) -> Tensor:
    """A weight, stored or derived, or some of its leading rows: what makers of weights from weights build on."""
    return info.read(read, rows) if isinstance(info, Derived) else read(info.name, rows)
