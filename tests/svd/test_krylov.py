"""The Krylov engine: never a false certificate, and the exact engine's verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spectra
from spectra.analysis.layer import find_intruders
from spectra.svd import Base, Question, certificate, krylov
from spectra.svd.lanczos import leading_pairs
from spectra.updates.algebra import Dense, LowRank, RowScaled
from tests.support import problems, reference


def test_a_small_singular_value_of_a_tall_base_is_not_overlooked(rng, small_scale):
    """On the longer side an intruder's residual says nothing about vectors whose singular value is tiny."""
    s = np.concatenate([[6, 5], np.linspace(2, 1, 61), [0.01]])
    W0, U, _ = problems.with_spectrum(rng, 160, 64, s)
    y = 0.8 * U[:, -1] + 0.6 * np.linalg.qr(np.c_[U, rng.normal(size=160)])[0][:, -1]
    v = rng.normal(size=64) / 8
    B, A = torch.from_numpy(50 * y[:, None]), torch.from_numpy(v[None])
    tuned = LowRank(B, A, 1.0).tuned(torch.from_numpy(W0).float())
    value = reference.max_cosines(W0, W0 + (B @ A).numpy(), 1)[0]
    assert value is not None
    assert value > 0.7
    comparison = krylov.certified(Base(tuned.W0, "left"), tuned, Question(1))
    assert comparison is None or comparison.matches[0].bounds[1] >= 0.7


def small_update(rng, kind):
    """(W0, update, W1): W1's leading gaps are about 1, its update has a norm of 0.1."""
    W0 = problems.with_spectrum(rng, 96, 128, np.concatenate([[9, 8, 7, 6, 5], np.linspace(2, 0.5, 91)]))[0]
    B, A = problems.orthonormal(rng, 96, 2), 0.1 * problems.orthonormal(rng, 128, 2).T
    if kind == "lora":
        return W0, LowRank(torch.from_numpy(B), torch.from_numpy(A), 1.0), W0 + B @ A
    if kind == "dora":
        magnitude = np.linalg.norm(W0 + B @ A, axis=1) * (1 + 1e-3 * rng.normal(size=96))
        W1 = (W0 + B @ A) * (magnitude / np.linalg.norm(W0 + B @ A, axis=1))[:, None]
        return W0, RowScaled(torch.from_numpy(B), torch.from_numpy(A), 1.0, torch.from_numpy(magnitude)), W1
    W1 = W0 + 0.1 * rng.normal(size=W0.shape) / 128
    return W0, Dense(torch.from_numpy(W1).float()), W1


@pytest.mark.parametrize("kind", ["lora", "dora", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_small_updates_are_proven_small(rng, small_scale, kind, side):
    W0, update, W1 = small_update(rng, kind)
    tuned = update.tuned(torch.from_numpy(W0).float())
    comparison = krylov.certified(Base(tuned.W0, side), tuned, Question(5, 0.5, side))
    assert comparison is not None
    assert {match.decided_by for match in comparison.matches} == {"bound"}
    for match, value in zip(comparison.matches, reference.max_cosines(W0, W1, 5, side), strict=True):
        assert value is not None
        assert match.bounds[0] <= value + 1e-6
        assert match.bounds[0] >= 0.5
    assert comparison.base_norm_spectral == pytest.approx(9, rel=1e-4)


def test_no_small_update_is_proven_that_makes_an_intruder(rng, small_scale):
    """Updates that turn two leading vectors into each other by 60°, with the least norm that does."""
    proven = 0
    for trial in range(60):
        gap = rng.uniform(0.05, 1)
        s = np.concatenate([[5 + gap, 5], np.linspace(2, 0.5, 94)])
        W0, U, V = problems.with_spectrum(rng, 96, 96, s)
        angle = rng.uniform(0, np.pi / 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        W1 = W0 + U[:, :2] @ (turn @ np.diag(s[:2]) @ turn.T - np.diag(s[:2])) @ V[:, :2].T
        tuned = Dense(torch.from_numpy(W1).float()).tuned(torch.from_numpy(W0).float())
        base = Base(tuned.W0, "left")
        leading = leading_pairs(base, tuned, 2, 1e-3)
        assert leading is not None
        comparison = krylov.proven_small(base, leading, tuned, Question(2, 0.75))
        if comparison is not None:
            proven += 1
            for match, value in zip(comparison.matches, reference.max_cosines(W0, W1, 2), strict=True):
                assert value is not None
                assert match.bounds[0] <= value + 1e-5, f"trial {trial}"
    assert 3 <= proven < 40


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(3)
    W0 = problems.trained_like(rng, 1024, 1024).astype(np.float32)
    B, A = rng.normal(size=(1024, 8)), rng.normal(size=(8, 1024))
    return W0, 4 * B / 32, A / 32


@pytest.mark.parametrize("kind", ["lora", "dense", "tall", "wide"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_large_weights_are_decided_without_a_decomposition(large, side, kind):
    W0, B, A = large
    if kind == "tall":
        W0, A = W0[:, :700], A[:, :700]
    elif kind == "wide":
        W0, B = W0[:700], B[:700]
    update = {"W1": W0 + B @ A} if kind == "dense" else {"B": B, "A": A}
    fast = find_intruders(W0, **update, side=side, engine="krylov")
    exact = find_intruders(W0, **update, side=side, engine="exact")
    assert (fast.engine, exact.engine) == ("krylov", "exact")
    assert fast.intruders == exact.intruders != ()
    for quick, slow in zip(fast.vectors, exact.vectors, strict=True):
        assert slow.max_cosine is not None
        assert quick.max_cosine_bounds[0] - 1e-5 <= slow.max_cosine <= quick.max_cosine_bounds[1] + 1e-5
        assert quick.sigma == pytest.approx(slow.sigma, rel=1e-5)
        assert quick.decided_by == "certificate"
        if quick.max_cosine is not None:
            assert quick.max_cosine == pytest.approx(slow.max_cosine, abs=1e-4)
    for name, value in exact.measures.items():
        if kind == "dense" and name in ("effective_rank", "rank_90", "rank_99"):
            assert fast.measures[name] is None, "it would take a decomposition of the update"
        elif name in ("predicted_threshold", "update_over_threshold"):
            assert fast.measures[name] == pytest.approx(value, rel=0.02), "from an estimate of the base's spectrum"
        elif name == "values_over_threshold":
            assert fast.measures[name] in (value, None)
        else:
            assert fast.measures[name] == pytest.approx(value, rel=1e-4)
    assert fast.noise_like_base is exact.noise_like_base


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_few_vectors_are_asked_for(large, top_k):
    W0, B, A = large
    for update in ({"B": B, "A": A}, {"B": 0.01 * B, "A": A}, {"W1": W0 + B @ A}):
        fast, exact = (find_intruders(W0, **update, top_k=top_k, engine=name) for name in ("krylov", "exact"))
        assert fast.engine == "krylov"
        assert fast.intruders == exact.intruders


def test_the_answer_is_the_same_every_time(large):
    W0, B, A = large
    assert find_intruders(W0, B=B, A=A) == find_intruders(W0, B=B, A=A)


def test_what_it_cannot_do_goes_to_the_decomposed_base(large):
    W0, B, A = large
    assert find_intruders(W0, B=B, A=A, engine="krylov", top_k=200).engine == "cached", "too many vectors"
    close = find_intruders(W0, B=B, A=A, engine="exact").vectors[0].max_cosine
    assert close is not None
    found = find_intruders(W0, B=B, A=A, engine="krylov", epsilon=round(close, 3))
    assert found.engine in ("cached", "exact"), "borderline"
    assert "borderline" in found.vectors[0].flags


def test_a_march_that_gets_nowhere_ends(large, monkeypatch):
    W0, B, A = large
    monkeypatch.setattr(certificate, "MAX_EVALUATIONS", 10)
    tuned = LowRank(torch.from_numpy(B), torch.from_numpy(A), 1.0).tuned(torch.from_numpy(W0))
    assert krylov.certified(Base(tuned.W0, "left"), tuned, Question()) is None


def test_a_report_says_how_it_was_decided(large, make_base, make_adapter):
    W0, B, A = large
    base = make_base({"layer.0.q.weight": W0})
    report = spectra.audit(make_adapter({"layer.0.q": (B.astype("f4"), A.astype("f4"))}, lora_alpha=8), base)
    layer = report.layers[0]
    assert layer.engine == "krylov"
    assert any("certificates" in note for note in layer.notes)
    assert layer.intruders == len(find_intruders(W0, B=B, A=A, engine="exact").intruders)


def test_a_report_on_a_small_update(large, make_base, make_adapter):
    W0, B, A = large
    U, _, Vh = np.linalg.svd(W0.astype(float))
    W0 = (U * np.concatenate([np.linspace(9, 5, 10), np.linspace(2, 1, 1014)]) @ Vh).astype("f4")
    base = make_base({"layer.0.q.weight": W0})
    folder = make_adapter({"layer.0.q": (B.astype("f4"), 1e-3 * A.astype("f4"))}, lora_alpha=8)
    report, exact = spectra.audit(folder, base), spectra.audit(folder, base, engine="exact")
    layer = report.layers[0]
    assert (layer.status, layer.intruders) == ("proved_small", 0)
    assert any("size of the update" in note for note in layer.notes)
    assert report.summary["layers_proved_small"] == 1
    assert report.summary["vectors_compared"] == exact.summary["vectors_compared"] == 10
    assert exact.layers[0].status == "analysed"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("beside", "decided"), [(0.0018, True), (0.0004, False), (-0.0004, False), (-0.0018, True)], ids=str
)
def test_a_cosine_beside_epsilon_is_decided_where_it_can_be(rng, side, beside, decided):
    """W1's third vector is turned out of W0's towards many others, to a cosine that near epsilon."""
    s = np.concatenate([np.linspace(2, 1.2, 12), np.linspace(1, 0.3, 500)])
    W0, U, V = problems.with_spectrum(rng, 512, 512, s)
    kept = U if side == "left" else V
    others = kept[:, 14:] @ rng.normal(size=498)
    cosine = 0.5 - beside
    turned = cosine * kept[:, 2] + np.sqrt(1 - cosine**2) * others / np.linalg.norm(others)
    flipped = kept[:, 2] - turned  # a reflection takes the one to the other
    H = np.eye(512) - 2 * np.outer(flipped, flipped) / (flipped @ flipped)
    W1 = H @ W0 if side == "left" else W0 @ H
    base, tuned = Base(torch.from_numpy(W0).float(), side), Dense(torch.from_numpy(W1).float())
    found = krylov.certified(base, tuned.tuned(base.W0), Question(6, 0.5, side))
    assert (found is not None) == decided
    if found is not None:
        third = found.matches[2]
        assert third.bounds[1] < 0.5 if beside > 0 else third.bounds[0] > 0.5
