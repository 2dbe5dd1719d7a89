"""What the exact engine decomposes, and how often."""

from __future__ import annotations

import torch

from spectra.analysis.layer import find_intruders
from spectra.svd import Base, Question, choose_engine, decompose, decompose_gram, exact
from spectra.svd import base as base_module
from tests.support import problems
from tests.support.updates import updates


def test_only_open_verdicts_are_settled_in_float64(rng, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return decompose_gram(*args, **options)

    monkeypatch.setattr(exact, "decompose_gram", counted)
    for cosine, expected in ((0.3, False), (0.5003, True), (0.7, False)):
        W0, W1, _ = problems.planted(rng, (96, 96), cosine, sigma=5.0)
        calls.clear()
        found = find_intruders(W0, W1, top_k=1)
        assert bool(calls) is expected
        assert ("settled_in_float64" in found.flags) is expected


def test_the_base_is_decomposed_once_for_all_fine_tunes(rng, monkeypatch):
    calls = []

    def counted(W, *args, **options):
        calls.append(W)
        return decompose(W, *args, **options)

    monkeypatch.setattr(exact, "decompose", counted)
    monkeypatch.setattr(base_module, "decompose", counted)
    W0 = torch.from_numpy(problems.trained_like(rng, 40, 40)).float()
    engine = choose_engine("exact")
    base = Base(W0, "left")
    for _ in range(3):
        update, _ = updates(rng, W0.numpy(), "low rank")
        engine.compare(base, update.tuned(W0), Question())
    assert sum(W is W0 for W in calls) == 1
    assert len(calls) == 4
