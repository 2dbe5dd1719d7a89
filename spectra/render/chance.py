"""A report's count against chance, and how far its updates are from their first intruder, in words."""

from __future__ import annotations

from spectra.records.chance import ExpectedByChance
from spectra.records.report import Report
from spectra.render.columns import decimals, plural


def by_chance(expected: ExpectedByChance) -> str:
    """The count that random updates with the same singular values have, for a cell: "157 ± 9", or "-".

    ± is how far a random total lies from the mean: its standard deviation, and what is not known of the mean.
    """
    if expected.intruders is None or expected.spread is None:
        return "-"
    if not expected.drawn:
        return "0"
    digits = 0 if expected.intruders >= 100 else 1
    return f"{expected.intruders:.{digits}f} ± {expected.spread:.{digits}f}"


def chance_in_words(report: Report) -> str:
    """The same for a line of facts, with what it rests on."""
    expected = report.expected_by_chance
    if expected.intruders is None:
        return f"not known: {expected.reason}"
    small = f"{plural(expected.below, 'layer')} changed too little for any" if expected.below else ""
    if not expected.drawn:
        return f"0 in random updates with the same singular values: {small}"
    drawn = f"{expected.draws} drawn for each of {plural(expected.drawn, 'layer')}"
    if expected.left_out:
        drawn += f", which stand for another {expected.left_out}: the mean is known to ±{expected.error:.1f}"
    about = f"; {small}" if small else ""
    if expected.spectra == "estimated":
        about += "; from an estimate of the base's singular values"
    return f"{by_chance(expected)} in random updates with the same singular values ({drawn}{about})"


def nearness(report: Report) -> str | None:
    """How large the largest update is beside the size at which a random one has its first intruder, for a line of
    facts; None where that size is not known of any layer."""
    ratio = report.update_over_threshold
    if ratio is None:
        return None
    layer = max(report.judged, key=lambda layer: layer.measures.get("update_over_threshold") or 0.0)
    above = sum(int(layer.measures.get("values_over_threshold") or 0) for layer in report.judged)
    said = f"‖dW‖₂ is at most {decimals(ratio, 2)} of the size at which a random update has its first intruder"
    return f"{said} ({layer.name})" + (f"; {plural(above, 'singular value')} of dW above it" if above else "")
