"""The report as a page: one file that works offline, a pure function of records.

``document.py`` writes what is read (verdicts, provenance, what was skipped), ``data.py`` what the script counts and
draws, ``assets/`` holds the style and the script, ``library.py`` the plotting library that the page carries.
Names from files are text wherever they stand: escaped in what is written, ``textContent`` in what the script makes.

The page holds the records as JSON with every ``<``, ``>`` and ``&`` escaped, plotly.js gzipped, and our own script.
Its Content-Security-Policy names the hashes of these two scripts and forbids everything else, so that nothing in a
file's names can run and nothing is loaded or sent.  Cosines are whole ten-thousandths, rounded down, so that every ε
of four decimals counts as it does in Python; at the report's own ε its verdicts stand, and where only bounds are
known, counts are ranges.  The matrices of the worst layers are computed after the audit, so that they cost it nothing
and it may have been resumed or done elsewhere: by Lanczos from 1024 on, and a weight that Lanczos cannot resolve is
left out.

To add a part: a ``<section>`` in ``assets/body.html``.  What it shows comes from ``data.py``; a figure is
``figure(element, build)``, drawn when it comes into view and again when ε changes.  Names from files are made with
``make(…, {textContent})`` or pass through ``plain()`` into plotly; the browser tests have hostile ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from spectra.errors import UsageError
from spectra.page.data import MATRICES, page_data
from spectra.page.document import document
from spectra.records.comparison import Comparison, report_labels
from spectra.records.report import Report
from spectra.render.naming import public_names, without_paths


def to_html(
    record: Report | Comparison | Sequence[Report],
    *,
    matrices: MATRICES = (),
    unreadable: Sequence[Exception] = (),
    root: str | PurePath | None = None,
) -> str:
    """The page of a report, of several reports, or of a comparison: one self-contained HTML file.

    Parameters
    ----------
    record : what :func:`spectra.audit`, :func:`spectra.audit_many` or :func:`spectra.compare` gave.
    matrices : similarity matrices to show, from :func:`spectra.similarity_matrices` or :func:`spectra.layer_spectra`.
    unreadable : the errors of fine-tunes that could not be read, which the page then names.
    root : the folder from which absolute paths below it are shown.  Of all other absolute paths the page shows the last
        parts alone: it is made to be handed on, and names no folder of this machine.

    Raises
    ------
    UsageError : there is no report, or plotly is not installed (``pip install '.[html]'``).

    Examples
    --------
    >>> import spectra
    >>> report = spectra.audit("fixtures/lora-r4")
    >>> page = spectra.to_html(report, matrices=spectra.similarity_matrices(report))
    >>> page.splitlines()[0]
    '<!doctype html>'
    """
    reports = [record] if isinstance(record, Report) else list(reports_of(record))
    if not reports:
        raise UsageError("nothing to show: there is no report")
    labels = report_labels(reports)
    reports, problems = without_folders(reports, [str(error) for error in unreadable], root)
    overlaps = record.overlaps if isinstance(record, Comparison) else ()
    return document(reports, labels, page_data(reports, labels, matrices, overlaps=overlaps), problems)


def without_folders(
    reports: Sequence[Report], problems: Sequence[str], root: str | PurePath | None
) -> tuple[list[Report], list[str]]:
    """The reports and problems with paths as they may be shown elsewhere: no absolute ones."""
    absolute = [
        str(path)
        for report in reports
        for path in (report.tuned.get("path"), report.base.get("path"))
        if path is not None and PurePath(path).is_absolute()
    ]
    names = public_names(absolute, root)

    def said(text: str | None) -> str | None:
        return None if text is None else without_paths(text, names, root)

    shown = [
        replace(
            report,
            tuned={**report.tuned, "path": names.get(str(report.tuned.get("path")), report.tuned.get("path"))},
            base={**report.base, "path": names.get(str(report.base.get("path")), report.base.get("path"))},
            layers=tuple(replace(layer, error=said(layer.error)) if layer.error else layer for layer in report.layers),
        )
        for report in reports
    ]
    return shown, [without_paths(problem, names, root) for problem in problems]


def reports_of(record: Comparison | Sequence[Report]) -> Sequence[Report]:
    """The reports of a comparison, or those given."""
    return record.reports if isinstance(record, Comparison) else record
