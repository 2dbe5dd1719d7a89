"""The cached-base engine: one decomposition of W0, exact cosines for every fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from spectra.analysis.layer import LayerAnalysis, find_intruders
from spectra.errors import ConvergenceError
from spectra.svd import ENGINES, Base, Question, cached, choose_engine, secular, short_spectrum
from spectra.svd import base as base_module
from spectra.updates.algebra import Dense, LowRank, RowScaled, Update
from tests.support import problems, reference

UPDATES: dict[str, Callable[..., tuple[Update, np.ndarray]]] = {
    "low rank": lambda rng, W0, B, A: (LowRank(B, A, 0.5), W0 + 0.5 * (B @ A).numpy()),
    "dense": lambda rng, W0, B, A: (
        Dense((torch.from_numpy(W0) + 0.5 * B @ A).float()),
        (W0 + 0.5 * (B @ A).numpy()).astype(np.float32).astype(float),
    ),
    "row scaled": lambda rng, W0, B, A: (
        RowScaled(B, A, 0.5, torch.from_numpy(np.linalg.norm(W0, axis=1))),
        (W0 + 0.5 * (B @ A).numpy())
        * (np.linalg.norm(W0, axis=1) / np.linalg.norm(W0 + 0.5 * (B @ A).numpy(), axis=1))[:, None],
    ),
}


@pytest.mark.parametrize("shape", [(120, 120), (90, 200), (200, 90)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", UPDATES)
def test_exact_cosines_without_a_second_decomposition(rng, kind, side, shape, monkeypatch):
    monkeypatch.setattr(cached, "ExactEngine", None)  # it must not be needed
    rounded = problems.trained_like(rng, *shape).astype(np.float32)
    B, A = (torch.from_numpy(rng.normal(size=s)) for s in ((shape[0], 3), (3, shape[1])))
    update, W1 = UPDATES[kind](rng, rounded.astype(float), 0.8 * B, 0.15 * A)
    W0 = torch.from_numpy(rounded)
    comparison = ENGINES["cached"]().compare(Base(W0, side), update.tuned(W0), Question(6, 0.5, side))
    expected = reference.max_cosines(W0.double().numpy(), W1, 6, side)
    assert min(value for value in expected if value is not None) < 0.5
    for match, value in zip(comparison.matches, expected, strict=True):
        assert value is not None
        assert match.max_cosine is not None
        assert match.max_cosine == pytest.approx(value, abs=1e-5)
        assert match.bounds[0] - 1e-9 <= value <= match.bounds[1] + 1e-9
        assert match.base_index is not None


@pytest.mark.parametrize("engine", ["auto", "cached"])
def test_one_decomposition_serves_all_fine_tunes(rng, monkeypatch, engine):
    calls = []

    def counted(*args):
        calls.append(args)
        return short_spectrum(*args)

    monkeypatch.setattr(base_module, "short_spectrum", counted)
    W0 = torch.from_numpy(problems.trained_like(rng, 260, 300)).float()
    analysis = LayerAnalysis(W0, Question(), choose_engine(engine), fine_tunes=4)
    for _ in range(4):
        B, A = torch.from_numpy(rng.normal(size=(260, 2))), torch.from_numpy(0.02 * rng.normal(size=(2, 300)))
        found = analysis.of(LowRank(B, A, 1.0).tuned(W0))
        assert found.engine == "cached"
        assert found.intruders == find_intruders(W0, B=B, A=A, engine="exact").intruders
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(120, 120), (90, 200), (200, 90)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stored_spectrum_serves_both_sides(rng, monkeypatch, shape, side):
    monkeypatch.setattr(cached, "ExactEngine", None)
    W0 = torch.from_numpy(problems.trained_like(rng, *shape)).float()
    kept = short_spectrum(W0)
    monkeypatch.setattr(base_module, "short_spectrum", None)
    B, A = torch.from_numpy(rng.normal(size=(shape[0], 2))), torch.from_numpy(0.1 * rng.normal(size=(2, shape[1])))
    base = Base(W0, side, stored=lambda: kept)
    assert base.has_spectrum
    comparison = ENGINES["auto"]().compare(base, LowRank(B, A, 1.0).tuned(W0), Question(5, 0.5, side))
    assert comparison.engine == "cached"
    expected = reference.max_cosines(W0.double().numpy(), W0.double().numpy() + (B @ A).numpy(), 5, side)
    assert [match.max_cosine for match in comparison.matches] == pytest.approx(expected, abs=1e-5)


def test_a_spectrum_of_another_weight_is_noticed(rng):
    W0 = torch.from_numpy(problems.trained_like(rng, 120, 160)).float()
    kept = short_spectrum(W0)
    assert not Base(W0.clone(), stored=lambda: kept).stale
    turned = replace(kept, vectors=torch.from_numpy(problems.orthonormal(rng, 120, 120)).float())
    small = W0.clone()
    small[3] *= 1 + 1e-3
    cases = [(W0 * 1.001, kept), (small, kept), (W0.flip(0), kept), (W0, turned), (W0[:, :140], kept), (W0[:100], kept)]
    B, A = torch.from_numpy(rng.normal(size=(120, 2))), torch.from_numpy(0.1 * rng.normal(size=(2, 160)))
    for weight, spectrum in cases:
        base = Base(weight, stored=partial(copy, spectrum))
        assert not base.has_stored
        assert base.stale
    analysis = LayerAnalysis(small, Question(), choose_engine("cached"), stored=lambda: kept)
    found = analysis.of(LowRank(B, A, 1.0).tuned(small))
    assert "stale_cache" in found.flags
    assert found.intruders == find_intruders(small, B=B, A=A, engine="exact").intruders


def test_what_float32_leaves_open_is_computed_in_float64(rng, monkeypatch):
    """A cosine within a few 1e-3 of epsilon: the float32 pass must hand over, not guess."""
    monkeypatch.setattr(cached, "SMALL", 64)
    asked = []
    original = cached._by_algebra

    def noted(base, factors, k, precise):
        asked.append(precise)
        return original(base, factors, k, precise)

    monkeypatch.setattr(cached, "_by_algebra", noted)
    W0, W1, _ = problems.planted(rng, (128, 128), 0.5 + 1.5e-3, sigma=5.0)
    U, s, Vh = np.linalg.svd(W1 - W0)
    B, A = U[:, :3] * s[:3], Vh[:3]
    assert s[3] < 1e-10
    tuned = LowRank(torch.from_numpy(B), torch.from_numpy(A), 1.0).tuned(torch.from_numpy(W0).float())
    value = reference.max_cosines(tuned.W0.double().numpy(), tuned.W0.double().numpy() + B @ A, 1)[0]
    assert value is not None
    for epsilon, expected in ((0.3, [False]), (value + 1.2e-3, [False]), (value, [False, True])):
        asked.clear()
        ENGINES["cached"]().compare(Base(tuned.W0), tuned, Question(1, epsilon))
        assert asked == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("engine", ["exact", "cached", "krylov", "auto"])
def test_an_update_outside_the_span_of_a_square_base(rng, engine, side):
    """A zero row and column, as pruning leaves them, and an update that lives there alone."""
    W0 = problems.trained_like(rng, 300, 300)
    W0[17], W0[:, 40] = 0, 0
    B, A = np.zeros((300, 1)), np.zeros((1, 300))
    B[17], A[0, 40] = 30, 1
    found = find_intruders(W0, B=B, A=A, engine=engine, side=side, top_k=4)
    assert found.intruders == (0,)
    assert found.vectors[0].sigma == pytest.approx(30)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_a_stored_spectrum_is_told_apart_at_any_scale(rng, scale):
    W0 = torch.from_numpy(problems.trained_like(rng, 60, 80) * scale).float()
    kept = short_spectrum(W0)
    assert Base(W0, stored=lambda: kept).has_stored
    assert not Base(W0.flip(0), stored=lambda: kept).has_stored
    zero = short_spectrum(torch.zeros(60, 80))
    assert not Base(W0, stored=lambda: zero).has_stored


def test_a_count_that_fails_hands_over(rng, monkeypatch):
    """LAPACK gave up on the inertia of a flat base, whose entries all lie next to the shift."""
    W0 = torch.from_numpy(problems.trained_like(rng, 90, 120))
    B, A = torch.from_numpy(rng.normal(size=(90, 2))), torch.from_numpy(0.1 * rng.normal(size=(2, 120)))
    tuned = LowRank(B, A, 1.0).tuned(W0)
    expected = ENGINES["exact"]().compare(Base(W0, "left"), tuned, Question())
    original, small = vars(secular)["eigh"], 4

    def fails(matrix):
        if matrix.shape[0] == small:
            raise ConvergenceError("too many repeated eigenvalues")
        return original(matrix)

    monkeypatch.setattr(secular, "eigh", fails)
    found = ENGINES["cached"]().compare(Base(W0, "left"), tuned, Question())
    assert found.engine == "exact"
    assert [match.max_cosine for match in found.matches] == pytest.approx(
        [match.max_cosine for match in expected.matches], abs=1e-9
    )
