"""``spectra extract``: the low-rank adapter that a full fine-tune amounts to."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from spectra.cli.options import (
    BAD,
    OK,
    TUNED,
    Commands,
    add_access,
    add_base,
    add_computation,
    add_layers,
    add_output,
    announce,
    format_of,
    return_freed_matrices,
)
from spectra.cli.output import check_output, emit, progress
from spectra.cli.ranks import CHOICE, FORMATS, add_choice, complain_of, rendered

if TYPE_CHECKING:
    from spectra.tasks.extract import Extraction

PASSED = ("include", "exclude", "allow_pickle", "local_files_only", "dtype", "device", "workers", "threads")


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "extract",
        help="extract a low-rank adapter from a full fine-tune",
        description="Truncates each layer's change of a full fine-tune to the rank that `spectra ranks` suggests, and "
        "writes a PEFT LoRA adapter of it.",
    )
    parser.add_argument("tuned", metavar="TUNED", help=TUNED)
    add_base(parser)
    result = parser.add_argument_group("result")
    result.add_argument("--to", metavar="OUT", required=True, help="the folder to write, which must be new")
    result.add_argument(
        "--factors-only",
        dest="whole",
        action="store_false",
        help="leave out what factors cannot carry: norms, biases, embeddings, new heads (default: modules_to_save)",
    )
    result.add_argument("--force", action="store_true", help="replace an adapter at OUT")
    add_output(
        parser,
        formats=FORMATS,
        format_help="of the report on ranks; default: by the ending of FILE, else table",
        verbose_help="list every layer, and the whole config",
    )
    add_choice(parser)
    add_layers(parser)
    add_access(parser)
    add_computation(parser, names=("dtype", "device", "workers", "threads"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Extracts; returns the exit code."""
    target = check_output(options.output)
    options.format = options.format or format_of(target, FORMATS)
    return_freed_matrices()

    from spectra.tasks.extract import extract

    chosen = {name: getattr(options, name) for name in (*CHOICE, *PASSED)}
    with progress(options.quiet, options.verbose) as show:
        extraction = extract(
            options.tuned, options.base, to=options.to, whole=options.whole, force=options.force, **chosen,
            progress=show,
        )  # fmt: skip
    emit(rendered(extraction.report, options), target)
    announce(target, options.format, options)
    _tell(extraction, options)
    return BAD if complain_of(extraction.report) else OK


def _tell(extraction: Extraction, options: argparse.Namespace) -> None:
    """Says what was written; what is left out counts as a message even when quiet."""
    worst = max(extraction.relative_errors, key=lambda name: extraction.relative_errors[name])
    if not options.quiet:
        carried = f", and {len(extraction.whole)} modules whole" if extraction.whole else ""
        print(
            f"spectra: wrote {extraction.folder}: factors of {len(extraction.relative_errors)} layers{carried}; the "
            f"largest error is {extraction.relative_errors[worst]:.1%}, in {worst}",
            file=sys.stderr,
        )
    for remark in extraction.remarks:
        print(f"spectra: note: {remark}", file=sys.stderr)
    for tensor, reason in extraction.left_out.items():
        print(f"spectra: left out: {tensor}: {reason}", file=sys.stderr)
