"""What every record offers beside its own numbers: it shows itself, and goes through its layers.

Text, pages and figures are made by what lies above records, so these methods go through the package's table of public
names, which loads each when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from spectra.errors import MissingLayerError

NEAR = 3  # names that an error suggests
SHORT = 3  # layers that the repr of a tuple of them shows


class Named(Protocol):
    """A layer."""

    @property
    def name(self) -> str: ...


Layer = TypeVar("Layer", bound=Named)


class Layers(tuple[Layer, ...], Generic[Layer]):
    """A tuple of layers, with a short ``repr`` however many there are."""

    __slots__ = ()

    def __repr__(self) -> str:
        more = f", … {len(self) - SHORT} more" if len(self) > SHORT else ""
        return f"({', '.join(map(repr, self[:SHORT]))}{more})"


class Shown:
    """A record that prints and draws itself."""

    def __bool__(self) -> bool:
        return True  # also one without layers

    def to_text(self, *, verbose: bool = False) -> str:
        """What the command that makes such a record prints of it."""
        import spectra

        text: str = spectra.to_text(self, verbose=verbose)  # type: ignore[arg-type]  # of each record's own class
        return text

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline and a small table."""
        import spectra

        shown: str = spectra.to_table_html(self)
        return shown


class OfLayers(Shown, Generic[Layer]):
    """A record with layers: iterated over, counted, and found by name or place."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", Layers(self.layers))  # the dataclasses are frozen

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, key: str | int) -> Layer:
        """The layer of that name, or at that place.

        Raises
        ------
        MissingLayerError : no such layer, which is a UsageError and a KeyError; the nearest names are said.
        IndexError : no such place.
        """
        if not isinstance(key, str):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise MissingLayerError(missing(key, [layer.name for layer in self.layers]))


def missing(key: str, names: list[str]) -> str:
    """That no layer has this name, and which have a similar one."""
    from difflib import get_close_matches

    near = [name for name in names if key in name][:NEAR] or get_close_matches(key, names, NEAR, 0.5)
    advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"no layer is called {key!r:.120}{advice}"
