"""What the page's script works on: records as compact JSON, rounded to what is seen."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from spectra.errors import in_one_line
from spectra.records import sweeps
from spectra.records.layer import LayerSpectra, Similarity, Vector
from spectra.records.report import CANNOT_TELL, LEVELS, LayerReport, Report
from spectra.render.chance import by_chance

DIGITS = 4  # of singular values, norms and ranks
STEPS = 10_000  # cosines are whole numbers of these, so that any epsilon with four decimals counts as it would exactly
LOOSE = 2e-3  # of an enclosure; a narrower one is not seen
MATRICES = Sequence[Similarity | LayerSpectra]


def as_script(value: Any) -> str:
    """JSON that can stand inside of a script element, whatever the strings in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"), sort_keys=True)
    for mark in "<>&":  # what is beyond ASCII, U+2028 among it, is escaped already
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def page_data(
    reports: Sequence[Report], labels: Sequence[str], matrices: MATRICES, *, overlaps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that the script reads."""
    return {
        "steps": STEPS,
        "levels": [list(item) for item in LEVELS],
        "cannotTell": CANNOT_TELL,
        "reports": [
            _report(report, label, [one for one in matrices if one.tuned == label])
            for report, label in zip(reports, labels, strict=True)
        ],
        "overlaps": [
            {"a": item["a"], "b": item["b"], "overlap": rounded(item["overlap"]), "random": rounded(item["random"])}
            for item in overlaps
        ],
    }


def rounded(value: Any) -> Any:
    """A number with as many digits as are seen; None stays None."""
    return value if value is None or isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def steps_of(cosine: float) -> int:
    """The largest number n with n / STEPS ≤ cosine, as floats compare: so cosine < E / STEPS just where n < E."""
    n = int(cosine * STEPS)
    while n / STEPS > cosine:
        n -= 1
    while (n + 1) / STEPS <= cosine:
        n += 1
    return n


def _report(report: Report, label: str, matrices: MATRICES) -> dict[str, Any]:
    types = list(dict.fromkeys(layer.module_type for layer in report.layers))
    place = {layer.name: number for number, layer in enumerate(report.layers)}
    totals, (threshold, _) = sweeps.null_totals(report), sweeps.free_weight(report)
    return {
        "label": in_one_line(label),
        "method": report.tuned["format"],
        "rank": report.tuned.get("rank"),
        "alpha": report.tuned.get("alpha"),
        "epsilon": report.settings["epsilon"],
        "topK": report.settings["top_k"],
        "side": report.settings["side"],
        "size": rounded(sweeps.mean_update_size(report)),
        "effectiveRank": rounded(sweeps.mean_measure(report, "effective_rank")),
        "parameters": report.summary["trainable_parameters"],
        "failed": report.summary["layers_failed"],
        "chance": chance_data(report),
        "p": None if totals is None else rounded(sweeps.null_p_value(report)),
        "energy": rounded(sweeps.mean_measure(report, "intruder_energy_share")),
        "nearest": rounded(report.update_over_threshold),
        "threshold": rounded(threshold),
        "weights": [[rounded(weight), count] for weight, count in sweeps.by_weight(report)],
        "types": [in_one_line(kind) for kind in types],
        "layers": [_layer(layer, types) for layer in report.layers],
        "facets": facets(report.layers),
        "depths": depths(report.layers),
        "matrices": {str(place[one.name]): _matrix(one.cosines) for one in matrices if one.name in place},
    }


def _layer(layer: LayerReport, types: Sequence[str]) -> dict[str, Any]:
    """Arrays run over the layer's vectors; what is empty or null is left out."""
    vectors = layer.vectors
    value = {
        "name": in_one_line(layer.name),
        "type": types.index(layer.module_type),
        "role": layer.role,
        "shape": list(layer.shape),
        "status": layer.status,
        "update": {key: layer.update.get(key) for key in ("kind", "rank", "alpha", "scaling", "parameters")},
        "index": [vector.index for vector in vectors],
        "cosine": [None if vector.max_cosine is None else steps_of(vector.max_cosine) for vector in vectors],
        "bounds": {str(place): _bounds(vector) for place, vector in enumerate(vectors) if _is_loose(vector)},
        "sigma": [rounded(vector.sigma) for vector in vectors],
        "baseIndex": [vector.base_index for vector in vectors],
        "capture": [None if vector.base_capture is None else round(vector.base_capture, 3) for vector in vectors],
        "intruder": [place for place, vector in enumerate(vectors) if vector.intruder],
        "flags": {str(place): list(vector.flags) for place, vector in enumerate(vectors) if vector.flags},
        "decidedBy": sorted({vector.decided_by for vector in vectors}),
        "measures": {key: rounded(number) for key, number in layer.measures.items() if number is not None},
        "floor": rounded(layer.random_floor),
        "noise": bool(layer.noise_like_base),
        "layerFlags": list(layer.flags),
        "notes": [in_one_line(note) for note in layer.notes],
        "error": None if layer.error is None else in_one_line(layer.error),
        "engine": layer.engine,
        "residual": rounded(layer.residual),
        "weights": None if layer.weights is None else [list(item) for item in layer.weights["counts"]],
        "threshold": None if layer.weights is None else rounded(layer.weights["threshold"]),
        "chance": _chance(layer),
        "p": None if layer.null is None else rounded(layer.null["p_value"]),
    }
    return {key: item for key, item in value.items() if item is not None and item != [] and item != {}}


def _chance(layer: LayerReport) -> float | None:
    """The mean count of random updates of a layer, where it is known."""
    fact = layer.expected_by_chance
    if fact is None or fact["how"] not in ("drawn", "below"):
        return None
    return rounded(fmean(fact["counts"])) if fact["counts"] else 0


def chance_data(report: Report) -> list[Any] | None:
    """[mean, text] of the count of random updates of a report; None where it is not known."""
    expected = report.expected_by_chance
    return None if expected.intruders is None else [rounded(expected.intruders), by_chance(expected)]


def _is_loose(vector: Vector) -> bool:
    lower, upper = vector.max_cosine_bounds
    return vector.max_cosine is None or upper - lower > LOOSE


def _bounds(vector: Vector) -> list[int]:
    lower, upper = vector.max_cosine_bounds
    return [steps_of(lower), steps_of(upper)]


def _matrix(cosines: np.ndarray) -> dict[str, Any]:
    """A byte an entry, 255 for 1: a picture shows no more."""
    shades = np.round(np.clip(cosines, 0, 1) * 255).astype(np.uint8)
    return {"rows": shades.shape[0], "columns": shades.shape[1], "shades": base64.b64encode(shades.tobytes()).decode()}


def facets(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """The panels of the map: a module type each, its layers as rows; types of one layer share the last one.

    Each has ``title`` (None where its layers have no type in common), ``layers`` (numbers) and ``labels`` (what tells
    their names apart).
    """
    groups: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        if layer.vectors:
            groups.setdefault(layer.module_type, []).append(number)
    single = [number for members in groups.values() if len(members) == 1 for number in members]
    panels: list[tuple[str | None, list[int]]] = [
        (kind, members) for kind, members in groups.items() if len(members) > 1
    ]
    if single:
        panels.append((None, sorted(single)))
    return [
        {
            "title": None if title is None else in_one_line(title),
            "layers": members,
            "labels": [in_one_line(label) for label in distinct([layers[number].name for number in members])],
        }
        for title, members in panels
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """The names without the dotted parts that all of them begin and end with; a name alone stays whole."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    shortest = min(map(len, parts))
    begin = next((i for i in range(shortest) if len({own[i] for own in parts}) > 1), shortest)
    rest = [own[begin:] for own in parts]
    shortest = min(map(len, rest))
    end = next((i for i in range(shortest) if len({own[-1 - i] for own in rest}) > 1), shortest)
    return [".".join(own[: len(own) - end]) or name for own, name in zip(rest, names, strict=True)]


def depths(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """The blocks of the model, in order: ``label``, and ``layers`` (numbers).

    A block is named by what a layer's name has up to its first number; layers outside of any block are left out.
    """
    blocks: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        parts = layer.name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if layer.vectors and first is not None and first + 1 < len(parts):
            blocks.setdefault(".".join(parts[: first + 1]), []).append(number)
    return [
        {"label": in_one_line(label), "layers": members}
        for label, members in zip(distinct(list(blocks)), blocks.values(), strict=True)
    ]
