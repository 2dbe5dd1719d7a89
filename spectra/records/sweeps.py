"""Numbers read off a report: intruders at other thresholds and depths, and means over layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from spectra.errors import UsageError
from spectra.records.report import DECIDED_STATUSES, LayerReport, Report

EPSILONS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # of a sweep, where none are given


def intruders_at(report: Report, epsilon: float | None = None, top_k: int | None = None) -> int:
    """Intruders in the judged layers at another ``epsilon``, or among fewer vectors, than the report was made with.

    Raises
    ------
    UsageError : more vectors than were compared, or cosines that were only bounded and whose bounds
        do not say.
    """
    return sum(layer_intruders_at(layer, report, epsilon, top_k) for layer in report.judged)


def layer_intruders_at(
    layer: LayerReport, report: Report, epsilon: float | None = None, top_k: int | None = None
) -> int:
    """The same for one of the report's layers."""
    if top_k is not None and top_k > report.settings["top_k"]:
        raise UsageError(f"top-k = {top_k}, but only {report.settings['top_k']} vectors of a layer were compared")
    count = 0
    for vector in layer.vectors:
        if top_k is not None and vector.index >= top_k:
            continue
        if epsilon is None:
            count += vector.intruder
        elif vector.max_cosine is not None:
            count += vector.max_cosine < epsilon
        elif "null_space" not in vector.flags:
            lower, upper = vector.max_cosine_bounds
            if lower < epsilon <= upper:
                raise UsageError(
                    f"{layer.name}: the cosine of vector {vector.index} is only known to lie in "
                    f"[{lower:.2f}, {upper:.2f}], so it cannot be held against epsilon = {epsilon}; "
                    "use the exact or the cached engine"
                )
            count += upper < epsilon
    return count


def by_epsilon(report: Report, epsilons: Iterable[float] = EPSILONS) -> list[tuple[float, int]]:
    """(ε, intruders) for each ε; raises as :func:`intruders_at` does."""
    return [(epsilon, intruders_at(report, epsilon)) for epsilon in epsilons]


def by_top_k(report: Report, depths: Iterable[int] | None = None) -> list[tuple[int, int]]:
    """(k, intruders among the k leading vectors of each layer), for each k up to the report's own."""
    depths = range(1, report.settings["top_k"] + 1) if depths is None else depths
    return [(k, intruders_at(report, top_k=k)) for k in depths]


def decided(report: Report) -> list[LayerReport]:
    """The layers that have vectors."""
    return [layer for layer in report.layers if layer.status in DECIDED_STATUSES]


def mean_measure(report: Report, name: str) -> float | None:
    """The mean of one measure over the layers that have it, or None."""
    known = [value for layer in decided(report) if (value := layer.measures.get(name)) is not None]
    return fmean(known) if known else None


def mean_update_size(report: Report) -> float | None:
    """The mean over layers of ‖dW‖_F / ‖W0‖_F."""
    return mean_measure(report, "update_norm_relative")


def trainable_ratio(report: Report) -> float | None:
    """The values stored in the updates / those of the weights they change."""
    changed = [layer for layer in report.layers if layer.status != "unchanged"]
    whole = sum(int(layer.update["dense_parameters"]) for layer in changed)
    return sum(int(layer.update["parameters"]) for layer in changed) / whole if whole else None


def free_weight(report: Report) -> tuple[float | None, str | None]:
    """(weight, layer): the adapter weight at which the first intruder of all layers appears, and where.

    Layers whose base is plain noise do not count: anything moves their vectors.  (None, None) where no layer has
    one within the weights tried, or none were tried.
    """
    thresholds = [
        (float(layer.weights["threshold"]), layer.name)
        for layer in report.layers
        if layer.weights is not None and layer.weights["threshold"] is not None and not layer.noise_like_base
    ]
    return min(thresholds) if thresholds else (None, None)


def by_weight(report: Report) -> list[tuple[float, int]]:
    """(weight, intruders) of W0 + weight·dW in the judged layers, at the weights that each was tried at."""
    curves = [dict(map(tuple, layer.weights["counts"])) for layer in report.judged if layer.weights is not None]
    if not curves:
        return []
    shared = set(curves[0]).intersection(*curves[1:])
    return [(weight, sum(curve[weight] for curve in curves)) for weight in sorted(shared)]


def null_totals(report: Report) -> list[int] | None:
    """The total of each draw of random updates over the judged layers; None where they were not drawn."""
    counts: list[Sequence[int]] = [layer.null["counts"] for layer in report.judged if layer.null is not None]
    if not counts or len(counts) < len(report.judged):
        return None
    return [sum(draw) for draw in zip(*counts, strict=True)]


def null_p_value(report: Report) -> float | None:
    """(1 + draws with at least as many intruders) / (1 + draws); Phipson & Smyth 2010."""
    totals = null_totals(report)
    if totals is None:
        return None
    return (1 + sum(total >= report.total() for total in totals)) / (1 + len(totals))
