"""Small reports, layers and vectors made by hand."""

from __future__ import annotations

from dataclasses import replace

from spectra.records.layer import Vector
from spectra.records.report import LayerReport, Report


def vector(index, intruder=False, flags=()):
    return Vector(index, 10.0 - index, 0.2 if intruder else 0.9, (0.1, 0.95), 3, 1.0, 0.5, "svd", intruder, flags)


def layer(name, intruders=(), count=10, **changes):
    made = LayerReport(
        name=name,
        module_type=name.split(".")[-1],
        role="linear",
        shape=(4096, 4096),
        stored_shape=(4096, 4096),
        status="analysed",
        update={"kind": "low_rank", "rank": 8, "alpha": 16, "scaling": 2.0, "parameters": 100, "dense_parameters": 900},
        vectors=tuple(vector(i, i in intruders) for i in range(count)),
        intruders=len(intruders),
        intruder_indices=tuple(intruders),
        measures={"update_norm_relative": 0.1, "effective_rank": 7.5},
        random_floor=0.06,
        noise_like_base=False,
    )
    return replace(made, **changes)


def report(layers, **changes):
    made = Report(
        base={"path": "base", "format": "safetensors", "fingerprint": "x"},
        tuned={"path": "tuned", "format": "peft-lora", "rank": 8, "alpha": 16, "scaling": 2.0},
        settings={"top_k": 10, "epsilon": 0.5, "side": "left"},
        layers=tuple(layers),
        skipped=(),
        spectra_version="0",
    )
    return replace(made, **changes)
