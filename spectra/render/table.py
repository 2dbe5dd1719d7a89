"""CSV of one or several reports: one row per compared singular vector."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from spectra.report import ROW_COLUMNS, Report


def to_csv(reports: Sequence[Report]) -> str:
    """The rows of :meth:`Report.rows`."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ROW_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        writer.writerows(report.rows())
    return buffer.getvalue()
