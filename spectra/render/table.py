"""CSV of reports, comparisons and rank reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectra.records.report import ROW_COLUMNS, Report


def to_csv(reports: Sequence[Report]) -> str:
    """The rows of :meth:`Report.rows`: one per compared singular vector."""
    return as_csv(ROW_COLUMNS, (row for report in reports for row in report.rows()))


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A header and one line a row; None is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
