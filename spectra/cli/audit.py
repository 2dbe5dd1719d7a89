"""``spectra audit``: flags the intruder dimensions of fine-tunes, and holds them to a gate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from spectra import __version__
from spectra.cli.model_card import add_model_card, addresses, checked_card, further, home, public_root, write_card
from spectra.cli.options import (
    BAD,
    EXIT_CODES,
    GATE,
    OK,
    Commands,
    Unreadable,
    add_base,
    add_computation,
    add_definition,
    add_layers,
    add_output,
    add_partial,
    add_reading,
    add_tuned,
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
    from concurrent.futures import Executor

    from spectra.errors import SpectraError
    from spectra.records.report import Report

FORMATS = ("table", "json", "jsonl", "csv", "parquet", "sarif")
WITHOUT_REPORTS = ("jsonl", "sarif")  # formats that can say what could not be read


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "audit",
        help="flag the intruder dimensions of fine-tunes, per layer and per singular index",
        description="Flags intruder dimensions: leading singular vectors of the fine-tuned weights whose\n"
        "cosine with every singular vector of the base is below a threshold. Several TUNED\ngive a summary table.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_tuned(parser, several=True)
    add_base(parser)
    add_partial(parser)
    add_output(
        parser,
        formats=FORMATS,
        format_help="default: by the ending of FILE, else table; several TUNED as json give one report per line; sarif "
        "is for code scanning",
        verbose_help="draw every layer, list every skipped tensor; print a line per weight, with the memory used, to "
        "standard error",
    )
    add_model_card(parser)
    add_page(parser)
    gate = parser.add_argument_group("gate")
    gate.add_argument("--fail-above", type=int, metavar="N", help="exit with 1 if there are more than N intruders")
    gate.add_argument(
        "--fail-above-share",
        type=_share,
        metavar="SHARE",
        help="exit with 1 if more than this share of the vectors compared are intruders; 10%% or 0.1",
    )
    gate.add_argument(
        "--fail-on",
        choices=("judged", "all", "paper", "new"),
        help="which intruders these two count: judged (outside noise-like bases), all, paper (no embeddings, no "
        "heads), new (judged, since --baseline); default: judged, or new with --baseline",
    )
    gate.add_argument(
        "--baseline",
        metavar="REPORT.json",
        help="an earlier report; fails on any new intruder, unless one of the two allows some",
    )
    add_definition(parser)
    add_layers(parser)
    add_reading(parser)
    add_computation(parser)
    long = parser.add_argument_group("long runs")
    long.add_argument(
        "--resume",
        metavar="RUN.jsonl",
        help="append each weight's results there as they come; rerun the command to continue after any interruption",
    )
    long.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="have the workers of a Dask cluster do it, e.g. tcp://host:8786; they read the same paths",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audits; returns the exit code."""
    from spectra.sources.resolve import fine_tunes_of

    tuned = fine_tunes_of(options.tuned, lambda text: print(f"spectra: note: {text}", file=sys.stderr))
    if options.baseline is not None and len(tuned) > 1:
        raise UsageError("--baseline compares one fine-tune with one earlier report; give one TUNED")
    if options.fail_on == "new" and options.baseline is None:
        raise UsageError("--fail-on new needs --baseline REPORT.json")
    limited = options.fail_above is not None or options.fail_above_share is not None
    if options.fail_on is not None and not limited and options.baseline is None:
        raise UsageError("--fail-on needs --fail-above N or --fail-above-share SHARE")
    card = checked_card(options, len(tuned))
    target = check_output(options.output)
    page = check_page(options)
    check_distinct(output=target, html=page, resume=options.resume, model_card=card)
    options.format = options.format or format_of(target, FORMATS)
    if options.format == "parquet":
        from spectra.render.frames import check_parquet

        check_parquet()
        if target is None:
            raise UsageError("parquet is no text: name a file to write with -o FILE.parquet")

    from spectra.sources.saved import load_report

    baseline = load_report(options.baseline) if options.baseline is not None else None
    from spectra.tasks.audit import audit_many

    return_freed_matrices()
    unreadable = Unreadable()
    try:
        with progress(options.quiet, options.verbose) as show, _executor(options) as executor:
            reports = audit_many(
                tuned, options.base, **settings(options), progress=show,
                on_unreadable=unreadable, resume=options.resume, executor=executor,
            )  # fmt: skip
    except KeyboardInterrupt:
        if options.resume is not None:
            print(
                f"spectra: finished work is saved in {options.resume}; rerun the command to continue",
                file=sys.stderr,
            )
        raise
    if not reports and options.format not in WITHOUT_REPORTS:
        return BAD
    if baseline is not None:
        reports = [report.against(baseline) for report in reports]
    crossed = _crossed(reports, options)
    partial = complain_of_parts(reports, options)
    bad = bool(unreadable) or partial or any(report.failed for report in reports)
    code = BAD if bad else GATE if crossed else OK
    if options.format == "sarif":
        emit(_sarif(reports, unreadable, frozenset(crossed), code, options), target)
    elif target is not None or options.model_card != "-":
        emit(_rendered(reports, unreadable, options), target)
    announce(target, options.format, options)
    if reports:
        write_page(reports, page, options, unreadable)
        if options.model_card is not None:
            write_card(reports[0], card, options)
    complain_of_layers(reports)
    for message in crossed.values():
        print(f"spectra: gate: {message}", file=sys.stderr)
    return code


def _executor(options: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    if options.dask is None:
        return nullcontext()
    from spectra.runs.workers import dask_executor

    return dask_executor(options.dask)


def _rendered(
    reports: Sequence[Report], unreadable: Sequence[SpectraError], options: argparse.Namespace
) -> str | bytes:
    several = len(reports) + len(unreadable) > 1
    if options.format == "json" and not several:
        return reports[0].to_json() + "\n"
    if options.format in ("json", "jsonl"):
        lines = [report.to_json(indent=None) for report in reports]
        lines += [json.dumps({"schema": "spectra.unreadable/1", "error": str(error)}) for error in unreadable]
        return "".join(line + "\n" for line in lines)
    if options.format == "csv":
        from spectra.render.table import to_csv

        return to_csv(reports)
    if options.format == "parquet":
        from spectra.render.frames import to_parquet

        return to_parquet(reports)
    from spectra.render.text import render_report, render_summary

    if several:
        return render_summary(reports, unreadable)
    return render_report(reports[0], verbose=options.verbose, ascii_only=not is_unicode(options))


def _sarif(
    reports: Sequence[Report],
    unreadable: Sequence[SpectraError],
    crossed: frozenset[str],
    code: int,
    options: argparse.Namespace,
) -> str:
    from spectra.render.sarif import Scanned, to_sarif

    scanned = Scanned(
        files={str(report.tuned["path"]): _files(report, options) for report in reports},
        crossed=crossed,
        unreadable=unreadable,
        exit_code=code,
        root=public_root(),
        url=home(),
        further=further(options),
        allow_partial=options.allow_partial,
        addresses=addresses(reports, options),
    )
    return to_sarif(reports, scanned, version=__version__)


def _files(report: Report, options: argparse.Namespace) -> Mapping[str | None, Path]:
    """Module → the file that holds its weights; under None that of any other."""
    from spectra.sources.resolve import Access, open_tuned

    tuned = open_tuned(report.tuned["path"], Access(options.allow_pickle, local_files_only=True))
    files: dict[str | None, Path] = {None: tuned.files[0]}
    if len(tuned.files) > 1:
        files |= {name.removesuffix(".weight"): info.file for name, info in tuned.tensors.items()}
    return files


def _share(text: str) -> Fraction:
    """A share of vectors, written as 10% or 0.1."""
    try:
        share = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 10% or 0.1, got {text!r}")
    return share


def _crossed(reports: Sequence[Report], options: argparse.Namespace) -> dict[str, str]:
    """The paths of the fine-tunes that a gate holds back, each with what to say of it."""
    limit, share = options.fail_above, options.fail_above_share
    if limit is None and share is None and options.baseline is not None:
        limit = 0
    scope = options.fail_on or ("new" if options.baseline is not None else "judged")
    crossed = {}
    for report in reports:
        path, total, compared = str(report.tuned["path"]), report.total(scope), report.compared(scope)
        found = []
        if limit is not None and total > limit:
            found.append(f"{total}, more than {limit}")
        if share is not None and total > share * compared:
            found.append(
                f"{total} of {compared:,} vectors ({total / compared:.1%}), more than {float(100 * share):.4g}%"
            )
        if found:
            crossed[path] = f"{path}: intruders ({scope}): {'; '.join(found)}"
    return crossed
