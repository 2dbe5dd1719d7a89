"""``spectra ranks``: which rank and which alpha."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.cli.options import (
    BAD,
    OK,
    TUNED,
    Commands,
    add_base,
    add_computation,
    add_layers,
    add_output,
    add_partial,
    add_reading,
    announce,
    complain,
    complain_of_parts,
    format_of,
    is_unicode,
    return_freed_matrices,
)
from spectra.cli.output import check_output, emit, progress
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.records.ranks import RankReport

FORMATS = ("table", "json", "jsonl", "csv")
CHOICE = ("energy", "max_rank", "by", "use_rslora", "alpha")
PASSED = (
    "include", "exclude", "split_fused", "ignore_options", "initial_adapter", "allow_pickle", "local_files_only",
    "dtype", "device", "workers", "threads", "hash_contents",
)  # fmt: skip


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "ranks",
        help="show what rank each layer really uses; suggest rank and alpha as a PEFT config",
        description="Shows what rank each layer's update really uses and what a lower one would lose, and suggests "
        "rank and alpha as a PEFT config; -o adapter_config.json writes the config alone. `spectra extract` writes the "
        "adapter of a full fine-tune.",
    )
    parser.add_argument("tuned", metavar="TUNED", help=TUNED)
    add_base(parser)
    add_partial(parser)
    add_choice(parser)
    add_output(
        parser,
        formats=FORMATS,
        format_help="default: by the ending of FILE, else table; jsonl is JSON on one line",
        verbose_help="list every layer, and the whole config",
    )
    add_layers(parser)
    add_reading(parser)
    add_computation(parser, names=("dtype", "device", "workers", "threads", "hash_contents"))
    parser.set_defaults(run=run)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """How ranks and alphas are chosen: the attributes of ``CHOICE``."""
    choice = parser.add_argument_group("how to choose")
    choice.add_argument(
        "--energy",
        type=float,
        default=0.9,
        metavar="E",
        help="the share of each update's squared norm that its rank must keep (default: 0.9)",
    )
    choice.add_argument("--max-rank", type=int, metavar="R", help="no rank above this (default: the break-even rank)")
    choice.add_argument(
        "--by",
        choices=("layer", "type", "model"),
        default="layer",
        help="one rank for each layer, each module type, or the whole model (default: layer)",
    )
    choice.add_argument(
        "--rslora", dest="use_rslora", action="store_true", help="suggest for rsLoRA (scaling alpha/sqrt(r))"
    )
    choice.add_argument(
        "--alpha",
        metavar="A",
        help="a number, or a multiple of the rank such as 2r (default: 2r; with --rslora a number is needed)",
    )


def run(options: argparse.Namespace) -> int:
    """Reports; returns the exit code."""
    target = check_output(options.output)
    options.format = options.format or format_of(target, FORMATS)
    return_freed_matrices()

    from spectra.tasks.ranks import ranks

    chosen = {name: getattr(options, name) for name in (*CHOICE, *PASSED)}
    with progress(options.quiet, options.verbose) as show:
        report = ranks(options.tuned, options.base, **chosen, progress=show)
    emit(rendered(report, options), target)
    announce(target, options.format, options)
    partial = complain_of_parts([report], options)
    return BAD if complain_of(report) or partial else OK


def complain_of(report: RankReport) -> bool:
    """Names every layer that could not be analysed; whether there is one."""
    for item in report.failed:
        complain(f"{item['name']}: {item['status']}: {item['error']}")
    return bool(report.failed)


def rendered(report: RankReport, options: argparse.Namespace) -> str:
    """The report as the options want it; the config alone where a file of its name is to be written."""
    if options.output is not None and Path(options.output).name == "adapter_config.json":
        if report.suggestion is None:
            raise UsageError(f"{report.tuned['path']}: no linear layer changed, so there is no config to write")
        return json.dumps(report.suggestion.peft_config(), indent=2) + "\n"
    if options.format in ("json", "jsonl"):
        return report.to_json() + "\n"
    from spectra.render.ranks import render_ranks, to_csv

    if options.format == "csv":
        return to_csv([report])
    return render_ranks(report, verbose=options.verbose, ascii_only=not is_unicode(options))
