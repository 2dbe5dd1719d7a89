"""Options of an ``adapter_config.json`` that change no weight: those known to, and those that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from spectra.adapters.peft.fields import COMMON_FIELDS, INERT
from spectra.adapters.peft.lora import KNOWN_FIELDS, OWN_FIELDS
from spectra.adapters.peft.methods import METHODS
from spectra.adapters.peft.refused import OPTIONS
from spectra.adapters.plan import Skipped
from spectra.errors import UsageError
from spectra.files.checkpoint import Checkpoint

_READ = COMMON_FIELDS | KNOWN_FIELDS | OWN_FIELDS | OPTIONS.keys()
_READ |= frozenset(field for method in METHODS.values() for field in method.fields)


def without_options(tuned: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The fine-tune with options of its config as if they were not there.

    Raises
    ------
    UsageError : there is no such option, or it is one that says how the factors are meant.
    """
    names = tuple(dict.fromkeys(names))
    if not names:
        return tuned
    config: dict[str, Any] = dict(tuned.adapter_config or {})
    for name in names:
        if name in _READ:
            raise UsageError(f"{tuned.adapter_config_file}: the option {name} says how the factors are meant, so it is "
                             "not ignored")  # fmt: skip
        if name not in config:
            raise UsageError(f"{tuned.adapter_config_file}: has no option {name}, which was to be ignored")
    aside = {f"adapter_config.json: {name}": f"= {config.pop(name)!r:.80}: ignored, as was asked for" for name in names}
    return replace(tuned, adapter_config=config, aside={**tuned.aside, **aside})


def inert_options(tuned: Checkpoint) -> Iterator[Skipped]:
    """The options of its config that are known to change no weight."""
    for name, value in (tuned.adapter_config or {}).items():
        if name in INERT and value:
            yield Skipped(f"adapter_config.json: {name}", f"an option of {INERT[name]}", "no_update")
