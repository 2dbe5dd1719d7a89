"""How a PEFT config names modules, so that it means exactly those that were meant.

PEFT takes an entry of ``target_modules`` for every module whose name is it or ends in a dot and it, and a key of
``rank_pattern`` and ``alpha_pattern`` for a regular expression over the end of a name, of which the first that
matches wins (``check_target_module_exists`` and ``get_pattern_key`` of peft 0.21).  Before 0.15 an entry that begins
with ``^`` matched nothing, and a whole name only where it stands there as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value", int, float)


class ModuleNames:
    """The modules that a config is about, by names that are short where that is no ambiguity, else whole.

    Parameters
    ----------
    types : full name → module type of each module meant.
    others : full names of the model's other modules, as far as known.
    """

    def __init__(self, types: Mapping[str, str], others: Iterable[str]):
        self.types = dict(types)
        self.known = {*self.types, *others}
        for name in list(self.known):  # the modules that these lie in have names, too
            parts = name.split(".")
            self.known.update(".".join(parts[:length]) for length in range(1, len(parts)))

    def _short(self, kind: str, members: Collection[str]) -> str | None:
        """The shortest end of a module type's name that no module outside ``members`` shares."""
        parts = kind.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            if all(name in members for name in self.known if f".{name}".endswith(f".{end}")):
                return end
        return None

    def _cover(self, members: Sequence[str]) -> dict[str, bool]:
        """What names these modules and no others, and whether it is a whole name."""
        inside = set(members)
        shorts = {kind: self._short(kind, inside) for kind in dict.fromkeys(self.types[name] for name in members)}
        choices = ((shorts[self.types[name]], name) for name in members)
        return {short or name: short is None for short, name in choices}

    def pattern(self, values: Mapping[str, Value], default: Value | None = None) -> tuple[Value, dict[str, Value]]:
        """(default, ``rank_pattern`` or ``alpha_pattern``); a default that is not given makes it as short as can be.

        ``values`` has one for each module that is meant.
        """
        groups: dict[Value, list[str]] = defaultdict(list)
        for name, value in values.items():
            groups[value].append(name)
        covers = {value: self._cover(members) for value, members in groups.items()}
        if default is None:
            default = max(groups, key=lambda value: (len(covers[value]), len(groups[value]), value))
        entries = [
            (key, whole, value) for value in sorted(groups) if value != default for key, whole in covers[value].items()
        ]
        for name, meant in values.items():
            matching = (value for key, whole, value in entries if _names(key, whole, name))
            if next(matching, default) != meant:
                raise AssertionError(f"the pattern gives {name} another value than was meant")
        return default, {self._entry(key, whole): value for key, whole, value in entries}

    def _entry(self, key: str, whole: bool) -> str:
        """The key of a pattern: a whole name as it is where it can mean nothing else, which every PEFT understands."""
        last = key.rpartition(".")[2]
        plain = re.fullmatch(r"[\w.\-]+", key) and not any(
            name != key and name.endswith(last) and re.fullmatch(rf"(.*\.)?{key}", name) for name in self.known
        )
        if whole and plain:
            return key
        return ("^" if whole else "") + _escaped(key)

    def targets(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(``target_modules``, ``exclude_modules``): PEFT takes whatever ends in one of the former."""
        cover = self._cover(list(self.types))
        ends = tuple(f".{name}" for name, whole in cover.items() if whole)
        more = sorted(name for name in self.known - self.types.keys() if name.endswith(ends))
        return tuple(cover), tuple(more)


def _names(key: str, whole: bool, module: str) -> bool:
    """Whether an entry is about a module, as PEFT has it: by its whole name, or by the end of it."""
    return module == key or (not whole and module.endswith("." + key))


def _escaped(name: str) -> str:
    """As a regular expression, which is what PEFT takes the keys of its patterns for."""
    return name.replace(".", r"\.") if re.fullmatch(r"[\w.\-]+", name) else re.escape(name)
