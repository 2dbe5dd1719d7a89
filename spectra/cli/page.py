"""The HTML report that a command writes beside its other output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.cli.options import announce, complain
from spectra.cli.output import check_output, emit, progress
from spectra.errors import SpectraError, UsageError

if TYPE_CHECKING:
    from spectra.records.comparison import Comparison
    from spectra.records.report import Report

MATRICES = 12  # of one fine-tune; several share three times as many


def add_page(parser: argparse.ArgumentParser) -> None:
    """The page and how many matrices are in it: ``options.html``, ``options.matrices``."""
    page = parser.add_argument_group("HTML report")
    page.add_argument("--html", metavar="FILE", help="also write a page there: one file that works offline")
    page.add_argument(
        "--matrices",
        type=int,
        metavar="N",
        help="how many layers of each fine-tune get a similarity matrix, those with the most intruders first; they are "
        f"read a second time (default: {MATRICES}, fewer if there are several fine-tunes; 0: none)",
    )


def check_page(options: argparse.Namespace) -> Path | None:
    """Where the page goes, checked before any work.

    Raises
    ------
    UsageError : no page can be written there, or plotly is not installed.
    """
    if options.matrices is not None and (options.matrices < 0 or options.html is None):
        raise UsageError("--matrices N is a number of at least 0, and goes with --html FILE")
    target = check_output(options.html)
    if target is not None:
        from spectra.page.library import check_library

        check_library()
    return target


def write_page(
    record: Comparison | Sequence[Report],
    target: Path | None,
    options: argparse.Namespace,
    unreadable: Sequence[SpectraError] = (),
) -> None:
    """Writes the page, where one was asked for."""
    if target is None:
        return
    from spectra.cli.model_card import public_root
    from spectra.page import reports_of, to_html
    from spectra.tasks.similarity import similarity_matrices

    reports = reports_of(record)
    number = options.matrices
    if number is None:
        number = MATRICES if len(reports) == 1 else max(1, 3 * MATRICES // len(reports))
    matrices = []
    try:
        with progress(options.quiet) as show:
            matrices = similarity_matrices(
                reports, number=number, allow_pickle=options.allow_pickle, initial_adapter=options.initial_adapter,
                device=options.device, threads=options.threads, progress=show,
            )  # fmt: skip
    except SpectraError as error:  # files that went away after the audit; the page says that it has no matrices
        complain(error)
    emit(to_html(record, matrices=matrices, unreadable=unreadable, root=public_root()), target)
    announce(target, "html", options)
