"""The command line: parse, call, render, exit code.

One file a command; ``options.py`` has what they share.  Nothing heavy is imported before a command
runs, so that ``spectra --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spectra import __version__
from spectra.cli import audit, cache, compare, completion, inspect, mitigate, plot, ranks
from spectra.cli.options import BAD, INTERRUPTED, complain
from spectra.errors import SpectraError

COMMANDS = (audit, compare, plot, ranks, mitigate, cache, inspect, completion)  # in --help's order


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectra",
        description="What did this fine-tune do to the spectrum of the weights?",
        epilog="`spectra COMMAND --help` tells more.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"spectra {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    parser.set_defaults(parser=parser)  # for the command that completes all others
    return parser
