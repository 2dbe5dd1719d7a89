"""The parser of the command line: short usage, and errors of two lines that name what was probably meant."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

BAD = 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are two lines: what is wrong, and what to do."""

    def __init__(self, **options: Any):
        # An abbreviated option would change its meaning as soon as another begins alike.
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        print(f"spectra: error: {message}", file=sys.stderr)
        print(self._advice(message), file=sys.stderr)
        raise SystemExit(BAD)

    def _advice(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: (-[^\s=]*)", message)
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        known: list[str] = []
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
        elif choice:
            known = [item.strip(" '") for item in choice[2].split(",")]
        wrong = unknown or choice
        if wrong:
            from difflib import get_close_matches

            near = get_close_matches(wrong[1], known, 1, 0.6)
            if near:
                return f"  did you mean {near[0]}? `{self.prog} --help` lists them all"
        return f"  `{self.prog} --help` tells more"

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but an unknown option is complained of by the command that it was given to."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            parser: Parser = getattr(options, "command", self)
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options


def short_usage(parser: argparse.ArgumentParser) -> str:
    """The arguments and what must be given; the options are listed below it."""
    words = [parser.prog]
    for action in parser._actions:
        name = action.metavar or action.dest
        if not action.option_strings:
            words.append({"+": f"{name} [{name} ...]", "*": f"[{name} ...]"}.get(str(action.nargs), str(name)))
        elif action.required:
            words.append(f"{action.option_strings[0]} {name}")
    return " ".join([*words, "[options]"])
