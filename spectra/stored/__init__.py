"""What stored tensors mean where they are not the weights themselves.

To add a form: a file here with a function that follows :data:`Maker`, and a line in ``MAKERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spectra.derived import Alternative, Derived, Unreadable, Weight, Weights
from spectra.headers import TensorInfo
from spectra.stored import experts
from spectra.stored.fused import split_fused
from spectra.stored.quantised import quantised

# Given the weights so far and the checkpoint's config.json, the weights that some of them are made into.
Maker = Callable[[Weights, Mapping[str, Any]], Iterable[Derived | Unreadable]]

# In this order: what is quantised is read first, then cut into experts.
MAKERS: tuple[Maker, ...] = (quantised, experts.experts)


def derive(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], *, split: bool = False
) -> dict[str, Derived | Unreadable]:
    """The weights that a checkpoint's tensors are made into, by name; from headers and config alone.

    With ``split``, projections that share a matrix become weights of their own.

    Raises
    ------
    CorruptFileError : what belongs together does not fit; file and tensor are named.
    UsageError : it cannot be told how a matrix is to be split.
    """
    made: dict[str, Derived | Unreadable] = {}
    for maker in (*MAKERS, split_fused) if split else MAKERS:
        made |= {info.name: info for info in maker(weights_of(tensors, made), config)}
    return made


def other_forms(weights: Weights, config: Mapping[str, Any]) -> dict[str, Alternative]:
    """Weights in the forms and under the names that other writers use, by name, where no weight is called so."""
    return {info.name: info for info in experts.other_forms(weights, config) if info.name not in weights}


def weights_of(tensors: Mapping[str, TensorInfo], made: Mapping[str, Derived | Unreadable]) -> dict[str, Weight]:
    """All weights: stored ones that nothing is made of, and those that are made."""
    used = {name for info in made.values() if isinstance(info, Unreadable) or info.whole for name in info.sources}
    cut = {info.part_of for info in made.values() if isinstance(info, Derived)}
    stored = {name: info for name, info in tensors.items() if name not in used | cut}
    return stored | {name: info for name, info in made.items() if name not in cut}
