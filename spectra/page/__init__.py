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

from spectra.errors import UsageError
from spectra.page.data import MATRICES, page_data
from spectra.page.document import document
from spectra.records.comparison import Comparison, report_labels
from spectra.records.report import Report


def to_html(
    record: Report | Comparison | Sequence[Report], *, matrices: MATRICES = (), unreadable: Sequence[Exception] = ()
) -> str:
    """The page of a report, of several reports, or of a comparison: one self-contained HTML file.

    Parameters
    ----------
    record : what :func:`spectra.audit`, :func:`spectra.audit_many` or :func:`spectra.compare` gave.
    matrices : similarity matrices to show, from :func:`spectra.similarity_matrices` or :func:`spectra.layer_spectra`.
    unreadable : the errors of fine-tunes that could not be read, which the page then names.

    Raises
    ------
    UsageError : there is no report, or plotly is not installed (``pip install 'intruder-spectra[html]'``).

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
    overlaps = record.overlaps if isinstance(record, Comparison) else ()
    return document(reports, labels, page_data(reports, labels, matrices, overlaps=overlaps), unreadable)


def reports_of(record: Comparison | Sequence[Report]) -> Sequence[Report]:
    """The reports of a comparison, or those given."""
    return record.reports if isinstance(record, Comparison) else record
