"""``spectra inspect``: says what files hold and how they would be read, from headers alone."""

from __future__ import annotations

import argparse

from spectra.cli.options import BAD, OK, READING, TUNED, Commands, add_layers, add_reading, complain
from spectra.cli.output import emit
from spectra.errors import SpectraError, UsageError


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="say what files hold and how they would be read, from headers alone",
        description="Says what each path holds, how it would be read, and which base it belongs to. "
        "Reads headers and configs only.",
    )
    parser.add_argument("tuned", nargs="+", metavar="TUNED", help=TUNED)
    parser.add_argument(
        "--base", metavar="BASE", help="match against this base (default: the one the adapter's config names)"
    )
    add_layers(parser)
    add_reading(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Inspects every path, also after one that cannot be read; returns the exit code."""
    from spectra.render.inspection import render_inspection, to_json
    from spectra.tasks.inspect import inspect

    if options.initial_adapter is not None and len(options.tuned) > 1:
        raise UsageError("--initial-adapter is the initial adapter of one fine-tune; give one TUNED")
    inspections, code = [], OK
    for path in options.tuned:
        try:
            inspections.append(inspect(path, options.base, **{name: getattr(options, name) for name in READING}))
        except SpectraError as error:
            complain(error)
            code = BAD
        else:
            if options.base is not None and inspections[-1].problem:  # the one that was named does not fit
                complain(inspections[-1].problem)
                code = BAD
    if inspections:
        text = (
            to_json(inspections)
            if options.format == "json"
            else render_inspection(inspections, verbose=options.verbose)
        )
        emit(text, None)
    return code
