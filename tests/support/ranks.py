"""Ranks of layers and reports on them, made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spectra.analysis.ranks import layer_rank, suggest
from spectra.records.ranks import RankReport


def of_matrix(dW, name="layers.0.q_proj", role="linear", kind="dense", trained_rank=None, parameters=None):
    s = np.linalg.svd(dW, compute_uv=False)
    return layer_rank(
        s[:trained_rank], dW.shape, name=name, role=role, kind=kind, trained_rank=trained_rank,
        parameters=dW.size if parameters is None else parameters, base_norm_fro=10.0,
    )  # fmt: skip


def with_rank(name, rank, shape=(64, 64), **changes):
    """A layer whose ``rank`` equal directions are all it has, so that any energy above 1 − 1/rank needs them all."""
    made = layer_rank(
        np.ones(rank), shape, name=name, role="linear", kind="low_rank", trained_rank=rank,
        parameters=rank * sum(shape), base_norm_fro=10.0,
    )  # fmt: skip
    return replace(made, **changes)


def suggested(layers, **options):
    return suggest(layers, **options)


def report(layers, suggestion, **changes):
    made = RankReport(
        base={"path": "base"},
        tuned={"path": "tuned", "format": "full"},
        settings={"energy": 0.9, "workers": 1},
        layers=tuple(layers),
        suggestion=suggestion,
        skipped=({"name": "norm.weight", "reason": "not a matrix"},),
        failed=(),
        spectra_version="0",
        seconds=1.5,
    )
    return replace(made, **changes)


def model_of(count):
    """A report on a model of so many layers, with ranks that differ from layer to layer."""
    rng = np.random.default_rng(count)
    layers = [
        with_rank(f"model.layers.{i}.{kind}", int(rng.integers(2, 30)), (512, 512))
        for i in range(count)
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    layers.append(with_rank("model.embed_tokens", 3, role="embedding"))
    return report(layers, suggested(layers))
