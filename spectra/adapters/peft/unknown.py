"""What lies in an adapter and is no factor that its method is known to have: refused by name, never left out.

A tensor within a module that has factors changes what that module computes, and one with the prefix of a method is
that method's.  A module of its own, such as a new head, may be new.
"""

from __future__ import annotations

import re

from spectra.adapters.peft.keys import StoredKeys, unwrapped
from spectra.errors import UnsupportedMethodError

# What peft 0.21's methods put before the names of their parameters (``prefix`` of each tuner).
PREFIXES = (
    "lora", "hada", "lokr", "vera", "ia3", "oft", "boft", "hra", "fourierft", "vblora", "randlora", "bone", "miss",
    "c3a", "shira", "waveft", "delora", "gralora", "trainable_tokens",
)  # fmt: skip
_METHODS_OWN = re.compile(rf"(?:^|\.)(?:{'|'.join(PREFIXES)})_|_lora_")
_MODULES_OWN = ("weight", "bias")
_HALF_NAMED = re.compile(r"_(A|B)(?=\.weight$|$)")
_WRAPPED = (".base_layer.", ".token_adapter.")  # within them lie the base's own weights


def refuse_unknown(stored: StoredKeys, label: str) -> None:
    """Refuses what is stored beside factors and not understood; ``label`` is what the method is called.

    Raises
    ------
    UnsupportedMethodError : the first such tensor, and why it cannot be left out.
    """
    adapted = {unwrapped(module) for module in stored.modules if module}
    for name, info in stored.plain.items():
        own = stored.own_name(name)
        if own is None or any(part in name for part in _WRAPPED):
            continue
        if _METHODS_OWN.search(own):
            why = f"is no tensor that {label} is known to have, though it is named as one of an adapter method"
        elif (module := _home(own, adapted)) is not None:
            why = f"lies in {module}, which has factors of {label}; {label} is not known to have such a tensor"
        elif (half := _HALF_NAMED.search(own)) and _other(name, half[1]) in stored.plain:
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
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if module in adapted:
            return None if parts[length:] in ([one] for one in _MODULES_OWN) else module
    return None


def _other(name: str, letter: str) -> str:
    """The name of the other half of a factor pair."""
    at = len(name) - len(name.rsplit(f"_{letter}", 1)[-1])
    return f"{name[: at - 1]}{'B' if letter == 'A' else 'A'}{name[at:]}"
