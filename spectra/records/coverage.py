"""How much of a fine-tune a record is about: which of its updates were looked at, and why the others were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# What is not analysed and is an update of the fine-tune, by the ``kind`` of a record's ``skipped`` entries; and what of
# that makes a record partial.
UNSEEN = ("not_placed", "not_read")
KINDS = ("left_out", "without_spectrum", "new", *UNSEEN)


@dataclass(frozen=True)
class Coverage:
    """The updates of a fine-tune, counted by what became of them.

    Attributes
    ----------
    found : all of them; a file of weights that was not read counts as one.
    analysed : those that the record has layers of, unchanged ones too.
    failed : layers that could not be analysed.
    left_out : by the user's patterns.
    without_spectrum : vectors, scalars, and tensors that are no matrix.
    new : modules that the base does not have, such as a new head.
    not_placed : those whose base weight was not found.
    not_read : those whose values, or whose base weight's, are stored in a form or a file that is not read.
    share_of_parameters : of all trained values those of the analysed updates, 0 to 1; None where the number of values
        of something is not known.
    """

    found: int
    analysed: int
    failed: int
    left_out: int
    without_spectrum: int
    new: int
    not_placed: int
    not_read: int
    share_of_parameters: float | None

    @property
    def unseen(self) -> int:
        """The updates that should have been looked at and were not: those not placed, and those not read."""
        return self.not_placed + self.not_read

    @property
    def is_partial(self) -> bool:
        """Whether the record is about a part of the fine-tune, not by the user's choice."""
        return self.unseen > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def coverage_of(analysed: Iterable[int], failed: Iterable[int], skipped: Iterable[Mapping[str, Any]]) -> Coverage:
    """The coverage of a record.

    Parameters
    ----------
    analysed, failed : the number of trained values of each layer.
    skipped : the record's entries, with ``kind`` and ``parameters``.
    """
    done, failures = list(analysed), list(failed)
    others = [item for item in skipped if item.get("kind") in KINDS]
    counts = Counter(item["kind"] for item in others)
    sizes: list[int | None] = [*done, *failures, *(item.get("parameters") for item in others)]
    known: list[int] = [size for size in sizes if size is not None]
    total = sum(known)
    share = sum(done) / total if total and len(known) == len(sizes) else None
    return Coverage(
        found=len(sizes), analysed=len(done), failed=len(failures), share_of_parameters=share,
        **{kind: counts[kind] for kind in KINDS},
    )  # fmt: skip


def unseen_in(skipped: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of ``skipped`` that make a record partial."""
    return [item for item in skipped if item.get("kind") in UNSEEN]
