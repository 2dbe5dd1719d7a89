"""``layer_replication``: a model whose layers are ranges of the base's, each copy with factors of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.plan import PlannedUpdate
from spectra.errors import AdapterError

MAX_LAYERS = 100_000  # of all ranges together; a crafted config could name any number
_LAYER = re.compile(r"(?P<before>(?:.*?\.)?(?:layers|layer|h)\.)(?P<index>\d{1,9})(?P<after>\..+)")


def replication(config: ConfigFields) -> list[int] | None:
    """The base's layer that each layer of the model is, from ranges [start, end); None where nothing is replicated.

    Raises
    ------
    AdapterError : it is no list of ranges.
    """
    given: Any = config.values.get("layer_replication")
    if not given:
        return None
    layers: list[int] = []
    for one in given if isinstance(given, list) else [given]:
        pair = isinstance(one, list) and len(one) == 2 and all(type(end) is int for end in one)
        if not pair or not 0 <= one[0] < one[1] <= MAX_LAYERS or len(layers) + one[1] - one[0] > MAX_LAYERS:
            raise AdapterError(config.file, f"layer_replication: {str(one)[:80]!r}; expected [start, end)")
        layers += range(one[0], one[1])
    return layers


def replicated(file: Path, update: PlannedUpdate, layers: Sequence[int]) -> PlannedUpdate:
    """The update with the base's layer in the names of its targets, and a note that says which that is."""
    match = _LAYER.fullmatch(update.module)
    if match is None:
        return update
    index = int(match["index"])
    if index >= len(layers):
        raise AdapterError(file, f"layer_replication gives {len(layers)} layers, too few for {update.module!r}")
    targets = []
    for target in update.targets:
        parts = _LAYER.fullmatch(target)
        targets.append(target if parts is None else f"{parts['before']}{layers[index]}{parts['after']}")
    note = f"layer_replication: layer {index} of the model is layer {layers[index]} of the base"
    found: PlannedUpdate = replace(cast(Any, update), targets=tuple(targets), notes=(*update.notes, note))
    return found
