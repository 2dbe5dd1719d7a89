"""After the layers are analysed: random updates are drawn, as many as a share of the audit's own work allows.

Which layers can have intruders by chance is known only then (:mod:`spectra.analysis.chance`).  Where they are few, each
gets up to 20 random updates, where they are many, two; and where that would be too much, a random choice of the layers
gets them and stands for the others.  Work is reckoned from shapes and ranks, not measured, so that the same inputs give
the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from spectra.analysis.chance import Chance, RandomUpdates
from spectra.errors import ConvergenceError
from spectra.records.chance import NOT_DRAWN
from spectra.records.report import LayerReport
from spectra.runs.settings import Settings
from spectra.svd import Question
from spectra.svd.threads import using_threads

SHARE = 0.08  # of the audit's own work, without what the thresholds take
AT_LEAST = 0.5  # seconds, however small the audit: of a small model nearly every layer is drawn
NO_TIME = "left out, so that the audit takes not much longer"
FEWEST, MOST = 2, 20  # draws of a layer: two tell a spread


def facts_of(chance: Chance | None, null: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a layer's record says before anything is drawn for it, or with what a comparison drew (``null``)."""
    if chance is None:
        return None
    if chance.below:
        return _fact("below")
    if null is not None and null["drawn"]:
        return _fact("drawn", null["counts"], spectrum="computed")
    return _fact("unknown", reason=NOT_DRAWN if chance.reason is None else chance.reason)


def with_chance(
    layers: Mapping[str, LayerReport], open_ones: Mapping[str, RandomUpdates], settings: Settings
) -> dict[str, LayerReport]:
    """The layers of one report, by name and in its order, with what random updates of them gave.

    ``open_ones`` : what to draw them from, of the layers that can have intruders by chance.
    """
    todo = [(name, open_ones[name]) for name in layers if name in open_ones and not layers[name].noise_like_base]
    budget = max(AT_LEAST, SHARE * sum(seconds_of(layer) for layer in layers.values()))
    once = sum(updates.seconds for _, updates in todo)
    if not once:
        return dict(layers)
    chosen, draws = todo, min(MOST, int(budget / once))
    if draws < FEWEST:
        number, draws = int(len(todo) * budget / (FEWEST * once)), FEWEST
        chosen = sorted(todo, key=lambda item: item[1].seed)[:number]  # seeds are digests of names: a random choice

    def drawn(item: tuple[str, RandomUpdates]) -> tuple[str, dict[str, Any]]:
        name, updates = item
        with using_threads(1):  # a setting of this very thread
            return name, _drawn(updates, settings.question, draws)

    facts = {name: _fact("left_out", reason=NO_TIME) for name, _ in todo}
    with ThreadPoolExecutor(max(settings.workers, settings.threads)) as pool:
        facts |= dict(pool.map(drawn, chosen))
    return {
        name: replace(layer, expected_by_chance=facts[name]) if name in facts else layer
        for name, layer in layers.items()
    }


def _drawn(updates: RandomUpdates, question: Question, draws: int) -> dict[str, Any]:
    try:
        counts = updates.counts(question, draws)
    except ConvergenceError as error:
        return _fact("unknown", reason=f"a random update could not be decomposed: {error}")
    return _fact("drawn", [int(count) for count in counts], spectrum="estimated" if updates.estimated else "computed")


def _fact(
    how: str, counts: list[int] | None = None, *, spectrum: str | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"how": how, "counts": counts or [], "spectrum": spectrum, "reason": reason}


def seconds_of(layer: LayerReport) -> float:
    """About what the analysis of a layer takes on one core: within a factor of three of what was measured on one
    machine."""
    if not layer.vectors:
        return 0.0
    p, q = min(layer.shape), max(layer.shape)
    if layer.engine == "krylov":
        return 8e-8 * p * q
    return (1.0 if layer.engine == "exact" else 0.8) * (4e-3 + 1e-9 * p * p * q)
