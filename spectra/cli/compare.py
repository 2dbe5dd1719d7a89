"""``spectra compare``: fine-tunes of one base side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.cli.options import (
    BAD,
    OK,
    TUNED,
    Commands,
    Unreadable,
    add_base,
    add_computation,
    add_definition,
    add_layers,
    add_output,
    add_partial,
    add_reading,
    announce,
    complain_of_layers,
    complain_of_parts,
    format_of,
    is_unicode,
    return_freed_matrices,
    settings,
)
from spectra.cli.output import check_distinct, check_output, emit, progress
from spectra.cli.page import add_page, check_page, write_page
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.records.comparison import Comparison

FORMATS = ("table", "json", "jsonl", "csv")


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "compare",
        help="put fine-tunes of one base side by side: sizes, ranks, intruders, thresholds, overlaps",
        description="Compares fine-tunes of one base: the size and rank of their updates, their intruders in total, by "
        "module type, by epsilon and by the adapter's weight, and how much the updates have in common. Counts are "
        "compared with those of random updates. Each base weight is decomposed only once. A folder of checkpoint-N "
        "folders is a training run.",
    )
    add_compared(parser)
    add_partial(parser)
    add_output(
        parser,
        formats=FORMATS,
        format_help="default: by the ending of FILE, else table; jsonl is JSON on one line",
        verbose_help="add each layer's counts",
    )
    add_page(parser)
    add_definition(parser)
    add_layers(parser)
    add_reading(parser)
    add_computation(parser, engine="cached")
    parser.set_defaults(run=run)


def add_compared(parser: argparse.ArgumentParser, *, draws: int = 20) -> None:
    """What is compared and how thoroughly: ``options.tuned``, ``.merge``, ``.base``, ``.draws``, ``.quick``."""
    parser.add_argument("tuned", nargs="*", metavar="TUNED", help=f"{TUNED}; or a training run")
    parser.add_argument(
        "--merge",
        nargs="+",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="one more fine-tune: these merged, each with its weight, 1 by default (repeatable)",
    )
    add_base(parser)
    depth = parser.add_argument_group("how thoroughly")
    depth.add_argument(
        "--draws",
        type=int,
        default=draws,
        metavar="N",
        help=f"random updates of each layer to compare its count with (default: {draws})",
    )
    depth.add_argument(
        "--quick",
        action="store_true",
        help="leave out what takes many more decompositions: random updates, other adapter weights, spectrum shift",
    )


def run(options: argparse.Namespace) -> int:
    """Compares; returns the exit code."""
    target = check_output(options.output)
    page = check_page(options)
    check_distinct(output=target, html=page)
    options.format = options.format or format_of(target, FORMATS)
    unreadable = Unreadable()
    comparison = compared(options, unreadable)
    emit(_rendered(comparison, options), target)
    announce(target, options.format, options)
    write_page(comparison, page, options, unreadable)
    partial = complain_of_parts(comparison.reports, options)
    return BAD if complain_of_layers(comparison.reports) or partial or unreadable else OK


def compared(options: argparse.Namespace, unreadable: Unreadable) -> Comparison:
    """The comparison that the options ask for."""
    if not options.tuned and not options.merge:
        raise UsageError("nothing to compare: name fine-tunes, or merge some with --merge")
    merge = [[_weighted(part) for part in parts] for parts in options.merge]

    from spectra.tasks.compare import compare, is_saved

    return_freed_matrices()
    if not (options.quick or options.quiet) and options.draws and not any(map(is_saved, options.tuned)):
        print(
            f"spectra: with {options.draws} random updates a layer and counts at other weights, some three times the "
            "work of --quick, which leaves them out",
            file=sys.stderr,
        )
    with progress(options.quiet, options.verbose) as show:
        return compare(
            options.tuned,
            options.base,
            merge=merge,
            draws=options.draws,
            quick=options.quick,
            **settings(options),
            progress=show,
            on_unreadable=unreadable,
        )


def _weighted(part: str) -> tuple[float, str]:
    """PATH=WEIGHT, or PATH for weight 1."""
    path, equals, weight = part.rpartition("=")
    if not equals or Path(part).exists():
        return 1.0, part
    try:
        return float(weight), path
    except ValueError:
        raise UsageError(f"--merge {part}: {weight!r} is no number; expected PATH=WEIGHT") from None


def _rendered(comparison: Comparison, options: argparse.Namespace) -> str:
    if options.format in ("json", "jsonl"):
        return comparison.to_json(indent=1 if options.format == "json" else None) + "\n"
    from spectra.render.comparison import render_comparison, to_csv

    if options.format == "csv":
        return to_csv(comparison)
    return render_comparison(comparison, verbose=options.verbose, ascii_only=not is_unicode(options))
