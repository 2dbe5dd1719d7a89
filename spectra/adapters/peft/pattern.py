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

SECONDS = 0.5  # of processor time, for all that one pattern table takes: a busy machine refuses nothing
MAX_EXPRESSIONS = 200  # peft itself writes plain names, people a handful of expressions
MAX_LENGTH = 500
MAX_GROUPS = 20
MAX_REPEATS = 10_000  # bounds the product of counted repetitions, which are unrolled when compiled

# A dot that is first, last or beside another one stands for any character: no module is called so.
_LITERAL = re.compile(r"(\^?)([\w\-]+(?:\\?\.[\w\-]+)*)\$?")


class Pattern:
    """Values by pattern; the first entry that matches a module's name, or its end, wins.

    An entry matches as peft has it: ``re.match(rf"(.*\\.)?({key})$", module)``.  In a plain name a
    dot stands for itself.
    """

    def __init__(self, file: Path, values: Mapping[str, float]):
        self.file = file
        self._seconds_left = SECONDS
        self._values = list(values.values())
        self._whole: dict[str, int] = {}  # plain names → the first entry that has them
        self._ends: dict[str, int] = {}
        self._expressions: list[tuple[int, Any]] = []
        for index, key in enumerate(values):
            literal = _LITERAL.fullmatch(key)
            if literal:
                (self._whole if literal[1] else self._ends).setdefault(literal[2].replace("\\", ""), index)
            elif len(self._expressions) == MAX_EXPRESSIONS:
                raise AdapterError(file, f"over {MAX_EXPRESSIONS} patterns that are no plain names: {key[:80]!r}")
            else:
                self._expressions.append((index, self._compile(key)))

    def lookup(self, module: str, default: float) -> float:
        """The value for a module; raises AdapterError where matching takes too long."""
        starts = [0] + [place + 1 for place, letter in enumerate(module) if letter == "."]
        plain = [self._ends.get(module[start:]) for start in starts] + [self._whole.get(module)]
        first = min((index for index in plain if index is not None), default=len(self._values))
        for index, expression in self._expressions:
            if index > first:
                break
            if self._matches(expression, module):
                return self._values[index]
        return self._values[first] if first < len(self._values) else default

    def _matches(self, expression: Any, module: str) -> bool:
        started = time.thread_time()
        try:
            return expression.match(module, timeout=self._seconds_left) is not None
        except TimeoutError:
            raise AdapterError(self.file, f"the pattern {expression.pattern[8:80]!r} takes too long to match") from None
        finally:
            self._seconds_left = max(self._seconds_left - (time.thread_time() - started), 1e-3)

    def _compile(self, key: str) -> Any:
        import regex

        started = time.thread_time()
        counts = [int(number) for number in re.findall(r"\d+", key)] if "{" in key else []
        elaborate = key.count("(") > MAX_GROUPS or math.prod(counts) > MAX_REPEATS or "(?" in key.replace("(?:", "")
        if len(key) > MAX_LENGTH or elaborate:
            raise AdapterError(self.file, f"the pattern {key[:80]!r} is too elaborate to be matched safely")
        try:
            compiled = regex.compile(rf"(.*\.)?({key})$", cache_pattern=False)
        except (regex.error, MemoryError, RecursionError, OverflowError) as error:
            raise AdapterError(self.file, f"the pattern {key[:80]!r} is no regular expression: {error}") from None
        self._seconds_left -= time.thread_time() - started
        if self._seconds_left <= 0:
            raise AdapterError(self.file, f"the pattern {key[:80]!r} takes too long to compile")
        return compiled
