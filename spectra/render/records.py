"""Any record as the text that the command line prints of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from spectra.records.comparison import Comparison
from spectra.records.inspection import Inspection
from spectra.records.ranks import RankReport
from spectra.records.repair import Repair, Verification
from spectra.records.report import Report
from spectra.render.comparison import render_comparison
from spectra.render.inspection import render_inspection
from spectra.render.ranks import render_ranks
from spectra.render.repair import render_repair, render_verification
from spectra.render.text import render_report, render_summary

Record: TypeAlias = Report | Comparison | RankReport | Repair | Verification | Inspection


def to_text(record: Record | Sequence[Report], *, verbose: bool = False) -> str:
    """What the command that makes such a record prints of it; of several reports, the table with a row each.

    Examples
    --------
    >>> import spectra
    >>> print(spectra.to_text(spectra.audit("fixtures/lora-r4")).partition(" of")[0])
    Intruder dimensions: 35
    """
    if isinstance(record, Comparison):
        return render_comparison(record, verbose=verbose)
    if isinstance(record, RankReport):
        return render_ranks(record, verbose=verbose)
    if isinstance(record, Repair):
        return render_repair(record, verbose=verbose)
    if isinstance(record, Verification):
        return render_verification(record, verbose=verbose)
    if isinstance(record, Inspection):
        return render_inspection([record], verbose=verbose)
    if isinstance(record, Report):
        return render_report(record, verbose=verbose)
    return render_summary(record)
