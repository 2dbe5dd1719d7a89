"""The command line: parse, call, render, exit code.

One file a command; ``options.py`` has what they share.  Nothing heavy is imported before a command
runs, so that ``spectra --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spectra import __version__
from spectra.cli import audit, cache, compare, completion, extract, inspect, plot, ranks, repair, verify
from spectra.cli.options import BAD, INTERRUPTED, OK, complain
from spectra.cli.parser import Parser, short_usage
from spectra.errors import SpectraError
from spectra.runs.neighbours import let_others_work

COMMANDS = (audit, compare, plot, ranks, extract, repair, verify, cache, inspect, completion)  # in --help's order


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = command_line()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        parser.print_help()
        return OK
    options = parser.parse_args(given)
    let_others_work()
    try:
        code: int = options.run(options)
        return code
    except SpectraError as error:
        complain(error)
        return BAD
    except KeyboardInterrupt:
        print("spectra: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # a disk or a network that fails where nobody expected it
        complain(error)
        return BAD


def command_line() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="spectra",
        usage="spectra COMMAND ...",
        description="What did this fine-tune do to the spectrum of the weights?",
        epilog="See `spectra COMMAND --help`.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"spectra {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog="spectra")
    for command in COMMANDS:
        command.add(commands)
    for one in commands.choices.values():
        one.usage = short_usage(one)
        one.set_defaults(command=one)
    parser.set_defaults(parser=parser)  # for the command that completes all others
    return parser
