"""Records of repairs and of their verifications, made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spectra.records.repair import LayerCheck, LayerRepair, Repair, ScaledVector, Verification
from spectra.records.report import LayerReport, Report

SHA = "sha256:" + "0" * 64
FACTS = {"fingerprint": SHA, "fingerprint_covers": "headers", "fingerprint_headers": SHA}
AUDITED = {
    "top_k": 10, "epsilon": 0.5, "side": "left", "engine": "auto", "device": "cpu", "threads": 1, "workers": 2,
    "include": [], "exclude": [], "hash_contents": False,
}  # fmt: skip


def vector(index=0, scale=0.7, **changes):
    made = ScaledVector(
        index=index, sigma=2.0 - index / 10, scale=scale, scale_achieved=scale, sigma_after=scale * (2.0 - index / 10),
        energy=0.04, energy_after=0.0202, index_after=index + 2, max_cosine=0.21, intruder=True,
    )  # fmt: skip
    return replace(made, **changes)


def layer(number=0, vectors=None, **changes):
    vectors = (vector(),) if vectors is None else tuple(vectors)
    made = LayerRepair(
        name=f"model.layers.{number}.self_attn.q_proj", module_type="self_attn.q_proj", role="linear", shape=(128, 64),
        kind="low_rank", vectors=vectors, intruders_before=3, intruders_after=3, update_norm=4.0, update_norm_after=3.0,
        update_change=0.25, update_error=2.5e-8, weight_error=3e-9, residual=1e-7, rank=4, rank_after=4 + len(vectors),
        parameters=768, parameters_after=192 * (4 + len(vectors)), dtype="F32", noise_like_base=False,
    )  # fmt: skip
    return replace(made, **changes)


def audit(intruders=6, layers=4, **changes):
    found = tuple(
        LayerReport(
            name=f"model.layers.{number}.self_attn.q_proj", module_type="self_attn.q_proj", role="linear",
            shape=(128, 64), stored_shape=(128, 64), status="analysed",
            update={"kind": "low_rank", "rank": 4, "alpha": 8, "scaling": 2.0, "parameters": 8, "dense_parameters": 9},
            intruders=intruders if number == 0 else 0,
        )
        for number in range(layers)
    )  # fmt: skip
    made = Report(
        base={"path": "base", "format": "safetensors", "changed_since_cached": False, **FACTS},
        tuned={"path": "out", "format": "peft-lora", "rank": None, "alpha": None, **FACTS},
        settings={**AUDITED, "dtype": "float32"},
        layers=found,
        skipped=(),
        spectra_version="0",
        seconds=1.5,
    )
    return replace(made, **changes)


def record(layers=None, **changes):
    made = Repair(
        base={"path": "base", "format": "safetensors", "changed_since_cached": False, **FACTS},
        source={"path": "tuned", "format": "peft-lora", "rank": 4, "alpha": 8, "scaling": 2.0, **FACTS},
        output={"path": "out", "format": "peft-lora", "rank": None, "alpha": None, "scaling": None, **FACTS},
        settings={
            "method": "intruders",
            "scale": 0.7,
            "which": "all",
            "noise_like": False,
            "keep_rank": False,
            "merged": False,
            "store_dtype": None,
            "dtype": "float32",
            **AUDITED,
        },  # fmt: skip,
        layers=(layer(0, [vector(0), vector(3, index_after=None)]), layer(2)) if layers is None else tuple(layers),
        audit=audit(),
        intruders_before=6,
        left_behind={"optimizer.pt": "weights in another format", "runs": "a folder"},
        remarks=("the adapter's own evaluation results are those of the source",),
        spectra_version="0",
        seconds=2.5,
    )
    return replace(made, **changes)


def check(**changes):
    layers = (LayerCheck("a", 2e-8, 1e-6, True), LayerCheck("b", 5e-8, 1e-6, True))
    return replace(Verification("out", "tuned", layers), **changes)


MANY = {
    "plain": record(),
    "dry run": record(output=None),
    "no audit": record(output=None, audit=None),
    "nothing chosen": record(layers=()),
    "scale 1": record([layer(0, [vector(scale=1.0)])]),
    "removed": record([layer(0, [vector(scale=0.0, scale_achieved=1e-9, index_after=None)])]),
    "by pattern": record(
        settings={**record().settings, "scale": {"*": 0.7, "q_proj": 0.5}, "which": {"layers.0.": [0, 3]}},
    ),
    "whole": record(
        [layer(kind="dense", rank=None, rank_after=None, parameters_after=768, dtype="BF16")],
        settings={**record().settings, "merged": True},
    ),
    "merged": record([layer(rank_after=None)], settings={**record().settings, "merged": True, "workers": 1}),
    "unknown": record(
        [layer(0, [vector(max_cosine=None)], update_change=None, update_error=None, weight_error=None)],
    ),
    "noise": record([layer(noise_like_base=True), layer(1, noise_like_base=None)]),
    "not only intruders": record([layer(0, [vector(), vector(1, intruder=False, max_cosine=0.99)])]),
    "keep rank": record(
        [layer(0, [vector(scale_achieved=0.742, sigma_after=1.484)], rank_after=4)],
        settings={**record().settings, "keep_rank": True},
    ),
}  # fmt: skip
each = pytest.mark.parametrize("made", MANY.values(), ids=MANY)


AMISS = {
    "holds": check(),
    "differs": check(layers=(LayerCheck("a", 2e-3, 1e-6, False), LayerCheck("b", 5e-8, 1e-6, True))),
    "unreadable": check(layers=(LayerCheck("a", None, 1e-6, False),), problems=("a.safetensors: is missing",)),
    "problem": check(problems=("the source has changed",)),
    "empty": check(layers=()),
}
