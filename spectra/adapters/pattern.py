"""PEFT's ``rank_pattern`` and ``alpha_pattern``: values by regular expressions over module names.

Whoever made the adapter wrote the expressions, so they are not ours to trust: most are plain names
and compared as such, the others are checked before they are compiled and matched with a time limit.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectra.errors import AdapterError

SECONDS = 1.0  # for all matches of one pattern table
MAX_LENGTH = 500
MAX_GROUPS = 20
MAX_REPEATS = 10_000  # bounds the product of counted repetitions, which are unrolled when compiled

_LITERAL = re.compile(r"(\^?)((?:[\w\-]|\\?\.)+)\$?")


class Pattern:
    """Values by pattern; the first entry that matches a module's name, or its end, wins.

    An entry matches as peft has it: ``re.match(rf"(.*\\.)?({key})$", module)``.  In a plain name a
    dot stands for itself.
    """

    def __init__(self, file: Path, values: Mapping[str, float]):
        self.file = file
        self._entries = [(self._compile(key), value) for key, value in values.items()]
        self._seconds_left = SECONDS

    def lookup(self, module: str, default: float) -> float:
        """The value for a module; raises AdapterError where matching takes too long."""
        for entry, value in self._entries:
            if isinstance(entry, tuple):
                anchored, name = entry
                if module == name or (not anchored and module.endswith("." + name)):
                    return value
            elif self._matches(entry, module):
                return value
        return default

    def _matches(self, expression: Any, module: str) -> bool:
        started = time.monotonic()
        try:
            return expression.match(module, timeout=self._seconds_left) is not None
        except TimeoutError:
            raise AdapterError(self.file, f"the pattern {expression.pattern[8:80]!r} takes too long to match") from None
        finally:
            self._seconds_left = max(self._seconds_left - (time.monotonic() - started), 1e-3)

    def _compile(self, key: str) -> Any:
        literal = _LITERAL.fullmatch(key)
        if literal:
            return bool(literal[1]), literal[2].replace("\\", "")
        import regex

        counts = [int(number) for number in re.findall(r"\d+", key)] if "{" in key else []
        elaborate = key.count("(") > MAX_GROUPS or math.prod(counts) > MAX_REPEATS or "(?" in key.replace("(?:", "")
        if len(key) > MAX_LENGTH or elaborate:
            raise AdapterError(self.file, f"the pattern {key[:80]!r} is too elaborate to be matched safely")
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, MemoryError, RecursionError, OverflowError) as error:
            raise AdapterError(self.file, f"the pattern {key[:80]!r} is no regular expression: {error}") from None
