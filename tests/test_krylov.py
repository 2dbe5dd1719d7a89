"""The Krylov engine: never a false certificate, and the exact engine's verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spectra
from spectra.analysis import find_intruders
from spectra.svd import Question, krylov
from spectra.updates import LowRank
from tests import problems, reference

SHAPES = [(64, 64), (96, 96), (48, 80), (80, 48), (96, 128)]


@pytest.fixture
def small_scale(monkeypatch):
    """Lets the engine try itself on matrices far below the size from which it pays."""
    monkeypatch.setattr(krylov, "FIRST_STEPS", 2)
    monkeypatch.setattr(krylov, "FEWEST_STEPS", 2)
    monkeypatch.setattr(krylov, "MORE_STEPS", 1)
    monkeypatch.setattr(krylov, "LARGEST_SHARE", 1.2)
    monkeypatch.setattr(krylov, "RANDOM_COLUMNS", 6)


def random_case(trial):
    """(W0, B, A, side, k): any spectrum and shape; every other one hides mass near ε² on one base vector."""
    rng = np.random.default_rng([5, trial])
    spectrum = sorted(problems.SPECTRA)[rng.integers(len(problems.SPECTRA))]
    m, n = SHAPES[rng.integers(len(SHAPES))]
    side = ("left", "right")[rng.integers(2)]
    k, r = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    W0 = problems.matrix(rng, spectrum, (m, n)).astype(np.float32)
    size = float(np.linalg.norm(W0, 2))
    if trial % 2:
        B, A = rng.normal(size=(m, r)), rng.normal(size=(r, n))
        return W0, B * size * rng.choice([0.01, 0.2, 0.7, 3]) / np.linalg.norm(B @ A, 2), A, side, k
    U, _, _ = np.linalg.svd(W0.astype(float), full_matrices=False)
    cosine, weights = rng.uniform(0.4, 0.6), rng.normal(size=min(m, n))
    chosen = rng.integers(weights.size)
    weights[chosen] = 0
    weights *= np.sqrt(1 - cosine**2) / np.linalg.norm(weights)
    weights[chosen] = cosine
    v = rng.normal(size=n)
    return W0, (U @ weights * size * rng.choice([2, 10, 50]))[:, None], v[None] / np.linalg.norm(v), side, k


@pytest.mark.parametrize("part", range(10))
def test_never_a_false_certificate(small_scale, part):
    certified = intruders = 0
    for trial in range(200 * part, 200 * part + 200):
        W0, B, A, side, k = random_case(trial)
        tuned = LowRank(torch.from_numpy(B), torch.from_numpy(A), 1.0).tuned(torch.from_numpy(W0))
        engine = krylov.KrylovEngine()
        comparison = engine._certified(engine.prepare(torch.from_numpy(W0), side), tuned, Question(k, 0.5, side))
        if comparison is None:
            continue  # to the exact engine, which is tested elsewhere
        certified += 1
        expected = reference.max_cosines(W0, W0.astype(float) + B @ A, k, side)
        for match, value in zip(comparison.matches, expected, strict=True):
            assert value is not None
            assert (match.bounds[1] < 0.5) == (value < 0.5), f"trial {trial}"
            assert match.bounds[0] - 2e-6 <= value <= match.bounds[1] + 2e-6, f"trial {trial}"
            intruders += match.bounds[1] < 0.5
    assert certified > 15, "too few certificates to prove anything"
    assert intruders > 5


def test_the_residual_bounds_every_overlap(rng, small_scale):
    """‖y − (M − λ)z‖ as evaluated is never below |⟨y, x⟩|, at each eigenvalue of M."""
    for kind in ("trained", "power law", "heavy tail"):
        W0 = torch.from_numpy(problems.matrix(rng, kind, (90, 90)))
        B, A = torch.from_numpy(rng.normal(size=(90, 2))), torch.from_numpy(rng.normal(size=(2, 90)))
        lanczos = krylov._Lanczos(W0, B, A, 10)
        assert lanczos.extend(4)
        verdict = krylov._Verdict(lanczos, Question(3))
        eigenvalues, X = torch.linalg.eigh(W0 @ W0.T)
        for j in range(3):
            y = lanczos.basis @ (verdict.Q @ verdict.C[:, j])
            bound, _ = verdict._residual(eigenvalues, verdict.C[:, j])
            assert (bound >= (X.T @ y).abs() - 1e-9).all()


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(3)
    W0 = problems.trained_like(rng, 1024, 1024).astype(np.float32)
    B, A = rng.normal(size=(1024, 8)), rng.normal(size=(8, 1024))
    return W0, 4 * B / 32, A / 32


@pytest.mark.parametrize("side", ["left", "right"])
def test_large_weights_are_decided_without_a_decomposition(large, side):
    W0, B, A = large
    fast = find_intruders(W0, B=B, A=A, side=side)
    exact = find_intruders(W0, B=B, A=A, side=side, engine="exact")
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
        assert fast.measures[name] == pytest.approx(value, rel=1e-4)
    assert fast.noise_like_base is exact.noise_like_base


def test_the_answer_is_the_same_every_time(large):
    W0, B, A = large
    assert find_intruders(W0, B=B, A=A) == find_intruders(W0, B=B, A=A)


def test_what_it_cannot_do_goes_to_the_exact_engine(large):
    W0, B, A = (item[:400] if item.shape[0] == 1024 else item for item in large)
    assert find_intruders(W0.T, B=A.T, A=B.T, engine="krylov").engine == "exact", "tall: null space on the left"
    assert find_intruders(W0, W0 + B @ A, engine="krylov").engine == "exact", "dense"
    wide = np.random.default_rng(0).normal(size=(400, 40)), np.random.default_rng(1).normal(size=(40, 1024))
    assert find_intruders(W0, B=wide[0], A=wide[1], engine="krylov").engine == "exact", "too high a rank"
    assert find_intruders(W0, B=B, A=A, engine="krylov", top_k=200).engine == "exact", "too many vectors"


def test_a_report_says_how_it_was_decided(large, make_base, make_adapter):
    W0, B, A = large
    base = make_base({"layer.0.q.weight": W0})
    report = spectra.audit(make_adapter({"layer.0.q": (B.astype("f4"), A.astype("f4"))}, lora_alpha=8), base)
    layer = report.layers[0]
    assert layer.engine == "krylov"
    assert any("certificates" in note for note in layer.notes)
    assert layer.intruders == len(find_intruders(W0, B=B, A=A, engine="exact").intruders)
