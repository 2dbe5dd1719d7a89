"""``spectra verify``: that a repaired folder is what its record says."""

from __future__ import annotations

import argparse

from spectra.cli.options import (
    GATE,
    OK,
    Commands,
    add_access,
    add_base,
    add_computation,
    is_unicode,
    return_freed_matrices,
)
from spectra.cli.output import check_output, emit, progress

FORMATS = ("table", "json", "jsonl", "csv")
PASSED = ("dtype", "device", "threads", "allow_pickle", "local_files_only")
EXIT_CODES = """exit codes:
  0  it is the repair that its record describes
  1  it is not
  2  bad usage, or something that could not be read
"""


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="check that a repaired folder is what its record says",
        description="Computes every changed weight anew from the fine-tune that was repaired, by the record\n"
        "in the folder, and compares; every other tensor and file must be the fine-tune's, bit by bit.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tuned", metavar="TUNED", help="a folder that spectra repair wrote")
    parser.add_argument(
        "--source", metavar="TUNED", help="the fine-tune it was made from (default: where the record says)"
    )
    add_base(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    output.add_argument("-o", "--output", metavar="FILE", help="write the report there instead of to standard output")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument("--verbose", action="store_true", help="list every layer")
    add_access(parser)
    add_computation(parser, names=("dtype", "device", "threads"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Checks; returns the exit code."""
    target = check_output(options.output)
    return_freed_matrices()

    from spectra.render.repair import render_verification, to_csv
    from spectra.repairs.verify import verify

    chosen = {name: getattr(options, name) for name in PASSED}
    with progress(options.quiet, options.verbose) as show:
        check = verify(options.tuned, options.base, source=options.source, **chosen, progress=show)
    if options.format in ("json", "jsonl"):
        text = check.to_json(indent=1 if options.format == "json" else None) + "\n"
    elif options.format == "csv":
        text = to_csv(check)
    else:
        text = render_verification(check, verbose=options.verbose, ascii_only=not is_unicode(options))
    emit(text, target)
    return OK if check.holds else GATE
