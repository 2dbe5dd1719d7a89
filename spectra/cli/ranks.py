"""``spectra ranks``: which rank and which alpha, and the adapter that a full fine-tune amounts to."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from spectra.cli.options import (
    BAD,
    OK,
    TUNED,
    Commands,
    add_base,
    add_computation,
    add_initial,
    add_layers,
    add_output,
    add_split,
    announce,
    complain,
    format_of,
    is_unicode,
    return_freed_matrices,
)
from spectra.cli.output import check_output, emit, progress
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.records.ranks import RankReport
    from spectra.tasks.extract import Extraction

FORMATS = ("table", "json", "jsonl", "csv")
CHOICE = ("energy", "max_rank", "by", "use_rslora", "alpha")
READING = ("include", "exclude", "device", "threads", "allow_pickle", "local_files_only")


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "ranks",
        help="say what rank each layer really uses; suggest rank and alpha as a PEFT config",
        description="Says what rank each layer's update really uses, what a lower one would lose, and suggests rank "
        "and alpha as a PEFT config. Of a full fine-tune, --extract writes the suggested low-rank adapter.",
    )
    parser.add_argument("tuned", metavar="TUNED", help=TUNED)
    add_base(parser)
    add_initial(parser)
    add_split(parser)
    choice = parser.add_argument_group("how to choose")
    choice.add_argument(
        "--energy",
        type=float,
        default=0.9,
        metavar="E",
        help="the share of each update's squared norm that its rank shall hold (default: 0.9)",
    )
    choice.add_argument("--max-rank", type=int, metavar="R", help="no rank above this (default: the break-even rank)")
    choice.add_argument(
        "--by",
        choices=("layer", "type", "model"),
        default="layer",
        help="one rank for each layer, each module type, or the whole model (default: layer)",
    )
    choice.add_argument(
        "--rslora", dest="use_rslora", action="store_true", help="for rsLoRA, whose scaling is alpha/sqrt(r)"
    )
    choice.add_argument(
        "--alpha",
        metavar="A",
        help="a number, or a multiple of the rank such as 2r (default: 2r; with --rslora, one number)",
    )
    add_layers(parser)
    add_computation(parser, names=("dtype", "device", "workers", "threads"))
    extract = parser.add_argument_group("extraction")
    extract.add_argument("--extract", metavar="OUT", help="write the suggested adapter of a full fine-tune there")
    extract.add_argument(
        "--factors-only",
        dest="whole",
        action="store_false",
        help="leave out what factors cannot carry: norms, biases, embeddings, new heads (default: modules_to_save)",
    )
    extract.add_argument("--force", action="store_true", help="replace an adapter that lies at OUT")
    add_output(
        parser,
        formats=FORMATS,
        format_help="default: what the ending of FILE says, else table; jsonl is the json in one line",
        verbose_help="list every layer, and a config of any length",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reports, and extracts; returns the exit code."""
    target = check_output(options.output)
    options.format = options.format or format_of(target, FORMATS)
    if options.extract is None and (options.force or not options.whole):
        raise UsageError("--force and --factors-only go with --extract OUT")
    if options.extract is not None and options.initial_adapter is not None:
        raise UsageError("--extract is of full fine-tunes, --initial-adapter of adapters")
    if options.extract is not None and options.split_fused:
        raise UsageError("--extract writes factors for modules as the model has them, not for parts of them")
    return_freed_matrices()

    from spectra.tasks.extract import extract_adapter
    from spectra.tasks.ranks import suggest_ranks

    chosen: dict[str, Any] = {name: getattr(options, name) for name in (*CHOICE, *READING)}
    extraction = None
    with progress(options.quiet, options.verbose) as show:
        if options.extract is not None:
            extraction = extract_adapter(
                options.tuned, options.extract, options.base, **chosen, whole=options.whole, force=options.force,
                progress=show,
            )  # fmt: skip
            report = extraction.report
        else:
            report = suggest_ranks(
                options.tuned, options.base, **chosen, dtype=options.dtype, workers=options.workers,
                initial_adapter=options.initial_adapter, split_fused=options.split_fused, progress=show,
            )  # fmt: skip
    emit(_rendered(report, options), target)
    announce(target, options.format, options)
    if extraction is not None:
        _tell(extraction, options)
    for item in report.failed:
        complain(f"{item['name']}: {item['status']}: {item['error']}")
    return BAD if report.failed else OK


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


def _rendered(report: RankReport, options: argparse.Namespace) -> str:
    if options.format in ("json", "jsonl"):
        return report.to_json() + "\n"
    from spectra.render.ranks import render_ranks, to_csv

    if options.format == "csv":
        return to_csv([report])
    return render_ranks(report, verbose=options.verbose, ascii_only=not is_unicode(options))
