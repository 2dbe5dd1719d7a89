"""Scaled singular vectors against the formula done literally, in float64 and with full decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.analysis.layer import LayerAnalysis
from spectra.analysis.scaling import edited_dense, edited_update, outcome_of, scaled
from spectra.errors import NonFiniteError, UsageError
from spectra.svd import Base, Question, choose_engine
from spectra.svd.triplets import leading_triplets
from spectra.updates.algebra import Dense, DenseWeight, FactoredWeight, LowRank, TunedWeight
from tests.support.problems import SHAPES, matrix, orthonormal, planted, trained_like, with_spectrum
from tests.support.reference import formula, values_after
from tests.support.updates import an_update, exact

F64 = torch.float64


def rewritten(tuned: TunedWeight, change, scaling: float, rank=None, dtype=torch.float32) -> TunedWeight:
    if isinstance(tuned, FactoredWeight):
        return edited_update(tuned, change, scaling, rank=rank, dtype=dtype).tuned(tuned.W0)
    return DenseWeight(tuned.W0, edited_dense(tuned, change, dtype).to(tuned.W0.dtype))


@pytest.mark.parametrize("kind", ["lora", "dora", "dense"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_result_is_the_formula_and_its_singular_values_are_as_promised(rng, kind, shape, side):
    for scaling in (2.0, -0.7):
        W0 = torch.from_numpy(trained_like(rng, *shape)).float()
        tuned = an_update(rng, kind, W0, min(3, *shape), scaling).tuned(W0)
        chosen = {0: 0.4} if min(shape) < 4 else {0: 0.4, 2: 0.0, 3: 1.5}
        triplets = leading_triplets(Base(W0, side), tuned, max(chosen) + 1).take(list(chosen))
        change = scaled(triplets, np.array(list(chosen.values())))
        after = exact(rewritten(tuned, change, scaling))
        before = exact(tuned)
        assert np.linalg.norm(after - formula(before, chosen)) <= 1e-6 * np.linalg.norm(before)
        found = np.linalg.svd(after, compute_uv=False)
        np.testing.assert_allclose(found, values_after(before, chosen), atol=1e-6 * float(found.max()))
        size = np.sqrt(sum(((1 - lam) * s) ** 2 for s, lam in zip(triplets.s, chosen.values(), strict=True)))
        assert change.norm == pytest.approx(size, rel=1e-10)


@pytest.mark.parametrize("shape", [(1100, 1100), (1100, 1500), (1500, 1100)])
def test_large_weights_are_not_decomposed(rng, shape, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    W0 = torch.randn(m, n, generator=generator) * 0.02
    U = torch.linalg.qr(torch.randn(m, 14, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, 14, generator=generator)).Q
    W0 += (U * torch.logspace(1.3, 0.6, 14)) @ V.T
    tuned = LowRank(torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator) / m, 6.0).tuned(W0)
    monkeypatch.setattr("spectra.svd.triplets.decompose_gram", lambda *_, **__: pytest.fail("decomposed"))
    found = leading_triplets(Base(W0), tuned, 4)
    chosen = {0: 0.5, 3: 0.0}
    triplets = found.take(list(chosen))
    after = rewritten(tuned, scaled(triplets, np.array([0.5, 0.0])), 6.0)
    want = formula(exact(tuned), chosen)
    assert np.linalg.norm(exact(after) - want) <= 1e-6 * np.linalg.norm(want)


def test_of_tied_vectors_the_flagged_one_is_scaled(rng):
    """Equal singular values: a base vector and an intruder, in any mixture that LAPACK likes."""
    m, n, sigma = 60, 50, 5.0
    W0, U, V = with_spectrum(rng, m, n, np.linspace(2, 1, n) + sigma * (np.arange(n) == 0) - 2 * (np.arange(n) == 0))
    y = orthonormal(rng, m, n + 1)
    y = y[:, 0] - U @ (U.T @ y[:, 0])  # orthogonal to all of W0's
    y /= np.linalg.norm(y)
    rest = W0 - U[:, [-1]] @ (U[:, [-1]].T @ W0)
    W1 = rest + sigma * np.outer(y, V[:, -1])  # ties with σ₁ = 5
    base, tuned = torch.from_numpy(W0), Dense(torch.from_numpy(W1)).tuned(torch.from_numpy(W0))
    question = Question(top_k=5)
    analysis = LayerAnalysis(base, question, choose_engine("auto"))
    findings = analysis.of(tuned)
    (index,) = findings.intruders
    assert "cluster" in findings.vectors[index].flags
    triplets = analysis.triplets(tuned, index + 1).take([index])
    assert abs(float(triplets.U[:, 0].numpy() @ y)) == pytest.approx(1, abs=1e-6)
    after = Dense(edited_dense(tuned, scaled(triplets, np.zeros(1)), F64)).tuned(base)
    np.testing.assert_allclose(exact(after), rest, atol=1e-5)
    assert analysis.of(after).intruders == ()


def test_a_planted_intruder_leaves_nothing_behind(rng):
    for shape in ((60, 60), (90, 40), (40, 90)):
        W0, W1, index = planted(rng, shape, 0.3, 8.0)
        base, tuned = torch.from_numpy(W0), Dense(torch.from_numpy(W1)).tuned(torch.from_numpy(W0))
        analysis = LayerAnalysis(base, Question(), choose_engine("auto"))
        assert analysis.of(tuned).intruders == (index,)
        triplets = analysis.triplets(tuned, 1)
        after = Dense(edited_dense(tuned, scaled(triplets.take([0]), np.zeros(1)), F64)).tuned(base)
        assert analysis.of(after).intruders == ()


def test_dora_keeps_its_scales_and_its_zero_rows(rng):
    W0 = torch.from_numpy(trained_like(rng, 30, 40)).float()
    W0[4] = 0
    update = an_update(rng, "dora", W0)
    update.B[4] = 0  # a row that is zero in W0 + B·A
    update.magnitude[7] = 0  # a row that the magnitude takes away
    update.magnitude[9] *= -1
    tuned = update.tuned(W0)
    triplets = leading_triplets(Base(W0), tuned, 2)
    new = edited_update(tuned, scaled(triplets, np.array([0.3, 0.6])), 2.0, dtype=torch.float32)
    after = new.tuned(W0)
    want = formula(exact(tuned), {0: 0.3, 1: 0.6})
    assert np.linalg.norm(exact(after) - want) <= 1e-6 * np.linalg.norm(want)
    rows = torch.arange(30) != 7  # where the magnitude is zero D is, too
    assert after.left is not None
    assert tuned.left is not None
    torch.testing.assert_close(after.left[rows], tuned.left[rows], rtol=1e-5, atol=0)
    assert new.A.shape[0] == 5


def test_the_kept_rank_is_the_best_approximation(rng):
    for kind in ("lora", "dora"):
        W0 = torch.from_numpy(trained_like(rng, 40, 30)).float()
        tuned = an_update(rng, kind, W0, 4).tuned(W0)
        triplets = leading_triplets(Base(W0), tuned, 2)
        change = scaled(triplets, np.array([0.2, 0.2]))
        after = rewritten(tuned, change, 2.0, rank=4, dtype=F64)
        outcome = outcome_of(tuned, change, after, triplets)
        left = 1.0 if tuned.left is None else tuned.left.numpy()[:, None]
        beside = formula(exact(tuned), {0: 0.2, 1: 0.2}) - left * W0.double().numpy()
        tail = np.linalg.svd(beside, compute_uv=False)[4:]
        assert outcome.error == pytest.approx(np.linalg.norm(tail), rel=1e-6)
        achieved = np.diag(triplets.U.numpy().T @ exact(after) @ triplets.V.numpy()) / triplets.s
        np.testing.assert_allclose(outcome.scales, achieved, rtol=1e-9)
        assert outcome.error > 1e-3  # something was lost, or this says nothing


def test_the_outcome_is_measured_on_what_is_stored(rng):
    W0 = torch.from_numpy(trained_like(rng, 300, 64)).float()  # more rows than one slab
    tuned = an_update(rng, "lora", W0).tuned(W0)
    triplets = leading_triplets(Base(W0), tuned, 1)
    change = scaled(triplets, np.array([0.5]))
    after = rewritten(tuned, change, 2.0, dtype=torch.bfloat16)
    outcome = outcome_of(tuned, change, after, triplets)
    W1, stored, base = exact(tuned), exact(after), W0.double().numpy()
    meant = formula(W1, {0: 0.5})
    for value, matrix_ in (
        (outcome.before, W1), (outcome.meant, meant), (outcome.after, stored), (outcome.update_before, W1 - base),
        (outcome.update_meant, meant - base), (outcome.update_after, stored - base), (outcome.change, stored - W1),
        (outcome.error, stored - meant),
    ):  # fmt: skip
        assert value == pytest.approx(np.linalg.norm(matrix_), rel=1e-7, abs=1e-9)
    assert 1e-4 < outcome.error / outcome.update_meant < 1e-2  # bfloat16, not float32


def test_what_cannot_be_written_is_refused(rng):
    W0 = torch.from_numpy(trained_like(rng, 20, 20)).float()
    tuned = an_update(rng, "lora", W0).tuned(W0)
    change = scaled(leading_triplets(Base(W0), tuned, 1), np.array([0.5]))
    with pytest.raises(UsageError, match="scaling = 0"):
        edited_update(tuned, change, 0.0, dtype=torch.float32)
    huge = FactoredWeight(W0, tuned.B * 1e6, tuned.A * 1e6)
    with pytest.raises(NonFiniteError, match="float16 cannot hold"):
        edited_update(huge, change, 1.0, dtype=torch.float16)


def test_weights_of_nothing(rng):
    """Zero weights, and vectors beyond the rank."""
    zero = torch.zeros(12, 8)
    tuned = LowRank(torch.zeros(12, 1), torch.zeros(1, 8), 1.0).tuned(zero)
    found = leading_triplets(Base(zero), tuned, 3)
    assert found.s.max() == 0 == found.residual
    W0 = torch.from_numpy(matrix(rng, "rank deficient", (20, 20))).float()
    found = leading_triplets(Base(W0), LowRank(torch.zeros(20, 1), torch.zeros(1, 20), 1.0).tuned(W0), 15)
    assert found.s.size == 10


@pytest.mark.parametrize("size", [1e-30, 1e20])
def test_tiny_and_huge_weights(rng, size):
    W0 = torch.from_numpy(trained_like(rng, 30, 20) * size).float()
    tuned = LowRank(torch.randn(30, 2), torch.randn(2, 20) * size, 0.5).tuned(W0)
    triplets = leading_triplets(Base(W0), tuned, 1)
    after = rewritten(tuned, scaled(triplets, np.array([0.5])), 0.5)
    want = formula(exact(tuned), {0: 0.5})
    assert np.linalg.norm(exact(after) - want) <= 1e-6 * np.linalg.norm(want)
