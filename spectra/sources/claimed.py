"""The base that an adapter's config names, held against the one that is used, as far as this machine can tell."""

from __future__ import annotations

import re
from dataclasses import replace

from spectra.errors import SpectraError
from spectra.files.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from spectra.files.fingerprints import digest_of_file
from spectra.sources.resolve import LOCAL, base_of

COMPARED = 3  # tensors whose values are compared, the smallest
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+", re.ASCII)


def about_claimed(tuned: Checkpoint, base: Checkpoint, agrees: bool | None, allow_pickle: bool = False) -> str | None:
    """What there is to say where the config names another base than the one used; None where there is nothing.

    Parameters
    ----------
    agrees : what :func:`spectra.sources.resolve.named_base` says.
    allow_pickle : whether the named base's weights may be pickled.
    """
    claimed = (tuned.adapter_config or {}).get("base_model_name_or_path")
    if agrees or not claimed or not isinstance(claimed, str) or tuned.in_memory or base.in_memory:
        return None
    says = f"the adapter's config names {claimed!r} as its base"
    try:
        path = base_of(tuned, replace(LOCAL, allow_pickle=allow_pickle))
        there = open_checkpoint(path, as_base=True, allow_pickle=allow_pickle)
    except (SpectraError, OSError):
        if not _HUB_ID.fullmatch(claimed):
            return None  # a path on another machine
        return f"{says}; whether this is that model is not known, since this machine has no copy of it that can be read"
    return f"{says}; {_compared(there, base)}"


def _compared(there: Checkpoint, here: Checkpoint) -> str:
    for name in (*there.tensors, *here.tensors):
        mine, theirs = here.tensors.get(name), there.tensors.get(name)
        if mine is None or theirs is None:
            return f"that is another model: {name!r} is only in {(there if mine is None else here).path}"
        if mine.shape != theirs.shape:
            return f"that is another model: {name!r} has shape {list(theirs.shape)} there, {list(mine.shape)} here"
    common = sorted(there.tensors, key=lambda name: (there.tensors[name].size, name))
    pairs = [(there.tensors[name], here.tensors[name]) for name in common if there.tensors[name].size]
    alike = [(one, other) for one, other in pairs if one.dtype == other.dtype and one.as_stored and other.as_stored]
    if not alike:
        return "its copy here has the same names and shapes, in another precision; the values were not compared"
    differing = next((one.name for one, other in alike[:COMPARED] if _digest(one) != _digest(other)), None)
    if differing is not None:
        return f"that is another model, or another state of this one: {differing!r} has other values there"
    return (
        f"its copy on this machine has the same names and shapes, and the same values in the {len(alike[:COMPARED])} "
        "tensors that were compared"
    )


def _digest(info: TensorInfo) -> str | None:
    try:
        return digest_of_file(info)
    except SpectraError:
        return None
