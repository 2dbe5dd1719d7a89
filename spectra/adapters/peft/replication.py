"""``layer_replication``: a model whose layers are ranges of the base's, each copy with factors of its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.plan import PlannedUpdate
from spectra.errors import AdapterError
from spectra.files.checkpoint import Checkpoint

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


def ranges_of(tuned: Checkpoint) -> tuple[tuple[int, int], ...]:
    """The ranges [start, end) of the base's layers that make up an adapter's model; none where it is no such model."""
    if tuned.adapter_config is None or replication(ConfigFields(tuned)) is None:
        return ()
    return tuple((start, end) for start, end in tuned.adapter_config["layer_replication"])


def copies(names: Iterable[str], ranges: Iterable[tuple[int, int]]) -> set[str]:
    """What names of the base's modules or tensors become in a model of such ranges, each as often as its layer."""
    places: dict[int, list[int]] = defaultdict(list)
    for index, layer in enumerate(layer for start, end in ranges for layer in range(start, end)):
        places[layer].append(index)
    copied: set[str] = set()
    for name in names if places else ():
        parts = _LAYER.fullmatch(name)
        if parts is not None:
            copied.update(f"{parts['before']}{index}{parts['after']}" for index in places.get(int(parts["index"]), ()))
    return copied


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
    planned: PlannedUpdate = replace(cast(Any, update), targets=tuple(targets), notes=(*update.notes, note))
    return planned
