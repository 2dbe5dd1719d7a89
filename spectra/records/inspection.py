"""What a path holds and how it would be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectra.records.shown import Shown


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """What was found at a path.

    ``updates`` are the layers an audit would analyse, with the base weight each belongs to where a
    base was found; ``problem`` says why a base could not be matched, ``caveat`` what the base's precision means, and
    ``beside`` names what else in the folder holds weights, which is not read.
    """

    path: str
    layout: str
    format: str
    files: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]
    dtypes: dict[str, int]
    not_read: tuple[str, ...]
    quantised: str | None
    parameters: int
    facts: dict[str, Any]
    updates: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    base: str | None
    problem: str | None
    caveat: str | None = None
    beside: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Inspection of {self.path}: {self.format}, {len(self.updates)} updates>"
