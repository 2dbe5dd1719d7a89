"""Updates as operators against their dense form."""

from __future__ import annotations

import torch

from spectra.updates.algebra import Dense, LowRank, RowScaled, Update, merged
from tests.support import problems


def test_operators_agree_with_their_dense_form(rng):
    """matmul, rmatmul, block, delta and low_rank of every kind of update, against dense()."""
    W0 = torch.from_numpy(problems.trained_like(rng, 14, 11))
    B, A = torch.from_numpy(rng.normal(size=(14, 3))), torch.from_numpy(rng.normal(size=(3, 11)))
    X, Y = torch.from_numpy(rng.normal(size=(11, 4))), torch.from_numpy(rng.normal(size=(14, 4)))
    magnitude = torch.from_numpy(rng.uniform(0.5, 2, size=14))
    for update in (LowRank(B, A, 0.5), RowScaled(B, A, 0.5, magnitude), Dense(W0 + 0.5 * B @ A)):
        tuned = update.tuned(W0)
        W1 = tuned.dense()
        torch.testing.assert_close(tuned.matmul(X), W1 @ X)
        torch.testing.assert_close(tuned.rmatmul(Y), W1.T @ Y)
        torch.testing.assert_close(tuned.block(slice(2, 9), slice(1, 5)), W1[2:9, 1:5])
        torch.testing.assert_close(tuned.delta(), W1 - W0)
        factors = tuned.low_rank()
        if factors is not None:
            torch.testing.assert_close(factors[0] @ factors[1], W1 - W0)
        assert not tuned.is_unchanged()
    torch.testing.assert_close(W0 + 0.5 * B @ A, LowRank(B, A, 0.5).tuned(W0).dense())
    assert LowRank(B * 0, A, 0.5).tuned(W0).is_unchanged()
    assert Dense(W0.clone()).tuned(W0).is_unchanged()
    norms = W0.norm(dim=1)
    assert RowScaled(B * 0, A, 0.5, norms).tuned(W0).is_unchanged()
    assert RowScaled(B * 0, A, 0.5, norms.float()).tuned(W0).is_unchanged(), "as an untrained DoRA stores them"
    assert not RowScaled(B * 0, A, 0.5, 2 * norms).tuned(W0).is_unchanged()


def test_operators_of_float32_weights_round_each_entry_once(rng):
    W0 = torch.from_numpy(problems.trained_like(rng, 600, 7)).float()
    B, A = torch.from_numpy(rng.normal(size=(600, 2))), torch.from_numpy(rng.normal(size=(2, 7)))
    exact = W0.double() + (1 / 3) * B @ A
    W1 = LowRank(B, A, 1 / 3).tuned(W0).dense()
    assert W1.dtype == torch.float32
    assert torch.equal(W1, exact.float())


def test_scaled_updates_keep_their_form(rng):
    W0 = torch.from_numpy(rng.normal(size=(12, 9)))
    B, A = torch.from_numpy(rng.normal(size=(12, 2))), torch.from_numpy(rng.normal(size=(2, 9)))
    magnitude = torch.from_numpy(rng.uniform(1, 2, size=12))
    updates: list[Update] = [LowRank(B, A, 0.5), RowScaled(B, A, 0.5, magnitude), Dense(W0 + B @ A)]
    for update in updates:
        tuned = update.tuned(W0)
        expected = W0 + 0.3 * (tuned.dense() - W0)
        assert torch.allclose(tuned.scaled(0.3).dense(), expected, atol=1e-12)
        assert (tuned.scaled(0.3).low_rank() is None) == (tuned.low_rank() is None)
    parts = [(weight, update.tuned(W0)) for weight, update in zip((0.2, 0.3, -1.0), updates, strict=True)]
    for chosen in (parts, parts[:2], parts[:1]):
        total = W0 + sum(weight * (tuned.dense() - W0) for weight, tuned in chosen)
        assert torch.allclose(merged(W0, chosen).dense(), total, atol=1e-12)
    assert merged(W0, parts[:1]).low_rank() is not None
