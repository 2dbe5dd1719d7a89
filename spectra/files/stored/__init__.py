"""What stored tensors mean where they are not the weights themselves.

To add a form: a file here with a function that follows :data:`Maker`, and a line in ``MAKERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Alternative, Derived, Unreadable, Weight, Weights, sources_of
from spectra.files.headers import TensorInfo
from spectra.files.stored import experts
from spectra.files.stored.fused import split_fused
from spectra.files.stored.quantised import quantised

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
    CorruptFileError : what belongs together does not fit, or two weights have one name; file and tensor are named.
    """
    made: dict[str, Derived | Unreadable] = {}
    for maker in (*MAKERS, split_fused) if split else MAKERS:
        weights = weights_of(tensors, made)
        fresh: dict[str, Derived | Unreadable] = {}
        for info in maker(weights, config):
            _check_alone(info, weights.get(info.name), fresh.get(info.name))
            fresh[info.name] = info
        made |= fresh
    return made


def _check_alone(info: Derived | Unreadable, before: Weight | None, beside: Derived | Unreadable | None) -> None:
    """A made weight takes the name of what it is made of, of no other; raises CorruptFileError."""
    if before is not None and set(sources_of(before)) <= set(info.sources):
        before = None
    other = before or beside
    if other is not None:
        raise CorruptFileError(
            info.file,
            f"two weights have this name: one made of {_listed(info)}, the other of {_listed(other)}",
            info.name,
        )


def _listed(info: Weight) -> str:
    return ", ".join(map(repr, sources_of(info)[:2]))


def other_forms(
    weights: Weights, config: Mapping[str, Any], tuned: Mapping[str, Any] | None = None
) -> dict[str, Alternative | Unreadable]:
    """Weights in the forms and under the names that other writers use, by name, where no weight is called so.

    ``tuned`` is the config of the fine-tune whose forms they are, if it has one.
    """
    return {info.name: info for info in experts.other_forms(weights, config, tuned or {}) if info.name not in weights}


def weights_of(tensors: Mapping[str, TensorInfo], made: Mapping[str, Derived | Unreadable]) -> dict[str, Weight]:
    """All weights: stored ones that nothing is made of, and those that are made."""
    used = {name for info in made.values() if isinstance(info, Unreadable) or info.whole for name in info.sources}
    cut = {info.part_of for info in made.values()}
    gone = used | cut
    stored = {name: info for name, info in tensors.items() if name not in gone}
    return stored | {name: info for name, info in made.items() if name not in cut}
