"""What lies in an adapter beside the factors, and makes its plan whole.

What lies in an adapter and is no factor that its method is known to have: refused by name, never left out.

A tensor within a module that has factors changes what that module computes, and one with the prefix of a method is
that method's.  A module of its own, such as a new head, may be new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from spectra.adapters.peft.fields import common
from spectra.adapters.peft.keys import BASE_COPY, StoredKeys, unwrapped
from spectra.adapters.peft.method import MethodUpdate
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped
from spectra.adapters.unsupported import foreign_method
from spectra.errors import AdapterError, UnsupportedMethodError

# What peft 0.21's methods put before the names of their parameters (``prefix`` of each tuner).
PREFIXES = (
    "lora", "hada", "lokr", "vera", "ia3", "oft", "boft", "hra", "fourierft", "vblora", "randlora", "bone", "miss",
    "c3a", "shira", "waveft", "delora", "gralora", "trainable_tokens",
)  # fmt: skip
_METHODS_OWN = re.compile(rf"(?:^|\.)(?:{'|'.join(PREFIXES)})_|_lora_")
_MODULES_OWN = ("weight", "bias")
_HALF_NAMED = re.compile(r"_(A|B)(?=\.weight$|$)")
_WRAPPED = (".base_layer.", ".token_adapter.")  # within them lie the base's own weights


def plan_of(
    stored: StoredKeys, label: str, own: Iterable[MethodUpdate], base_model: Any, skipped: Iterable[Skipped] = ()
) -> Plan:
    """The plan of an adapter of another method than LoRA: its modules' updates, and all that is stored beside them.

    ``label`` is what the method is called, ``base_model`` the config's name of the base, ``skipped`` what is left
    out already.

    Raises
    ------
    UnsupportedMethodError : a tensor is another method's, or not understood.
    """
    copies = stored.copies()
    left_out = list(skipped)
    updates: list[PlannedUpdate] = []
    for update in own:
        copy = copies.get(f"{update.module}.weight")
        if copy is not None and stored.plain.pop(copy[0], None) is not None:
            update = replace(update, base_copy=copy[1].name)
            left_out.append(Skipped(copy[1].name, BASE_COPY, "no_update"))
        updates.append(update)
    facts = {
        "rank": common(update.rank for update in updates),
        "alpha": common(update.alpha for update in updates),
        "scaling": common(update.scaling for update in updates),
        "use_rslora": False,
        "use_dora": False,
        "conditional": False,
        "base_model_name_or_path": base_model,
    }
    for planned in stored_whole(stored, label):
        if isinstance(planned, Skipped):
            left_out.append(planned)
        else:
            updates.append(planned)
    return Plan(f"peft-{label.lower()}", tuple(updates), tuple(left_out), facts)


def stored_whole(stored: StoredKeys, label: str) -> Iterator[PlannedUpdate | Skipped]:
    """How each tensor beside the factors is treated; ``label`` is what the method is called.

    Raises
    ------
    UnsupportedMethodError : one that is another method's, or not understood, and why it cannot be left out.
    """
    foreign = foreign_method(stored.plain)
    if foreign is not None:
        info = stored.plain[foreign[0]]
        raise UnsupportedMethodError(info.file, f"{label} does not hold this: it belongs to {foreign[1]}", info.name)
    _refuse_unknown(stored, label)
    if not stored.has_factors:
        raise AdapterError(
            stored.file, f"holds no factor of {label}: the adapter was saved incompletely, or its config is another's"
        )
    for name, info in stored.plain.items():
        yield stored.saved(name, info)


def _refuse_unknown(stored: StoredKeys, label: str) -> None:
    adapted = {unwrapped(module) for module in stored.modules if module}
    for name, info in stored.plain.items():
        own = stored.own_name(name)
        if own is None or any(part in name for part in _WRAPPED):
            continue
        if _METHODS_OWN.search(own):
            why = f"is no tensor that {label} is known to have, though it is named as one of an adapter method"
        elif (module := _home(own, adapted)) is not None:
            why = f"lies in {module}, which has factors of {label}; {label} is not known to have such a tensor"
        elif (half := _HALF_NAMED.search(own)) and _other_half(name) in stored.plain:
            why = (
                "is no name of peft's for a factor: an adapter that is called 'lora' is saved so, since peft takes "
                f"its name out of every key. Rename '…{half[0]}' to '….lora{half[0]}', or save it under another name"
            )
        else:
            continue
        raise UnsupportedMethodError(info.file, f"{why}; nothing was analysed", info.name)


def _home(own: str, adapted: set[str]) -> str | None:
    """The adapted module that a tensor lies in without being its weight or bias, or None."""
    parts = own.split(".")
    homes = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    module = next((home for home in homes if home in adapted), None)
    return None if module is None or own.removeprefix(f"{module}.") in _MODULES_OWN else module


def _other_half(name: str) -> str:
    """The name of the other half of a factor pair."""
    return _HALF_NAMED.sub(lambda half: f"_{'B' if half[1] == 'A' else 'A'}", name)
