"""``spectra completion``: a script that lets a shell complete commands, options, choices and files."""

from __future__ import annotations

import argparse
from typing import Any

from spectra.cli.options import OK, Commands
from spectra.cli.output import emit
from spectra.errors import needs_extra

SHELLS = ("bash", "zsh", "fish")
# How the values of arguments are called that are files or folders; a test holds every argument to this and to FREE.
PATHS = (
    "TUNED", "BASE", "PATH", "FILE", "DIR", "OUT", "ADAPTER", "REPORT.json", "RUN.jsonl", "README.md", "PATH[=WEIGHT]",
    "FOLDER",
)  # fmt: skip
WHERE = """a line for the shell's own configuration:
  bash  eval "$(spectra completion bash)"
  zsh   eval "$(spectra completion zsh)", after compinit
  fish  spectra completion fish | source

or once, so that no shell starts later for it:
  bash  spectra completion bash > ~/.local/share/bash-completion/completions/spectra
  zsh   spectra completion zsh > DIR/_spectra, with DIR among those of $fpath
  fish  spectra completion fish > ~/.config/fish/completions/spectra.fish
"""


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that lets bash, zsh or fish complete these commands",
        description="Prints a script that lets a shell complete commands, options, choices and files.",
        epilog=WHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to read it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the script; returns the exit code."""
    emit(script(options.parser, options.shell), None)
    return OK


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser and of all its commands, whose arguments it marks.

    Raises
    ------
    UsageError : shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise needs_extra("completion needs", "shtab", "completion") from None
    for action in arguments_of(parser):
        if action.metavar in PATHS:
            action.complete = shtab.FILE  # where shtab looks for it
    text: str = shtab.complete(parser, shell)
    return text if text.endswith("\n") else text + "\n"


def arguments_of(parser: argparse.ArgumentParser) -> list[Any]:
    """Every option and positional argument, those of commands included."""
    arguments: list[Any] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                arguments += arguments_of(command)
        else:
            arguments.append(action)
    return arguments
