"""What a record that is about a part of a fine-tune says first, in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from spectra.errors import in_one_line
from spectra.records.coverage import Coverage, unseen_in

REASONS = 3  # that are spelled out; the record has all of them


class Covering(Protocol):
    """A record of one fine-tune."""

    @property
    def tuned(self) -> Mapping[str, Any]: ...
    @property
    def coverage(self) -> Coverage: ...
    @property
    def skipped(self) -> Sequence[Mapping[str, Any]]: ...


def partial(record: Covering) -> str | None:
    """ "N of M updates were not looked at", without a full stop; None where all were that should have been."""
    coverage = record.coverage
    if not coverage.is_partial:
        return None
    were = "was" if coverage.unseen == 1 else "were"
    return f"{coverage.unseen} of {coverage.found} updates {were} not looked at"


def unseen(record: Covering) -> list[str]:
    """Why, a line a reason: how many updates, which, and what is known of them."""
    reasons: dict[str, list[str]] = {}
    for item in unseen_in(record.skipped):
        reasons.setdefault(str(item["reason"]), []).append(str(item["name"]))
    lines = []
    for reason, names in sorted(reasons.items(), key=lambda entry: -len(entry[1]))[:REASONS]:
        named = names[0] if len(names) == 1 else f"{len(names)} such as {names[0]}"
        lines.append(in_one_line(f"{named}: {reason}", 600))
    if len(reasons) > REASONS:
        lines.append(f"for {len(reasons) - REASONS} other reasons, others")
    return lines


def headline(record: Covering) -> str | None:
    """The first lines of a text on a part of a fine-tune; None where it is the whole."""
    said = partial(record)
    return None if said is None else "\n".join([f"Partial: {said}.", *(f"  {line}" for line in unseen(record))])
