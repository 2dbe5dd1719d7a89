"""Measures against plain formulas on dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.analysis import measures
from spectra.analysis.layer import find_intruders
from spectra.svd.matching import CAPTURE_ENERGY
from spectra.updates.algebra import Dense, LowRank, RowScaled
from tests.support import problems


def plain(W0, W1):
    dW = W1 - W0
    s = np.linalg.svd(dW, compute_uv=False)
    p = s / s.sum()
    p = p[p > 1e-12]
    return {
        "base_norm_fro": np.linalg.norm(W0),
        "base_norm_spectral": np.linalg.norm(W0, 2),
        "base_over_noise": np.linalg.norm(W0, 2) / (W0**2).mean() ** 0.5 / sum(np.sqrt(W0.shape)),
        "update_norm_fro": np.linalg.norm(dW),
        "update_norm_spectral": s[0],
        "update_norm_relative": np.linalg.norm(dW) / np.linalg.norm(W0),
        "update_norm_spectral_relative": s[0] / np.linalg.norm(W0, 2),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "stable_rank": np.linalg.norm(dW) ** 2 / s[0] ** 2,
    }


@pytest.mark.parametrize("shape", [(30, 30), (50, 20), (20, 50)])
def test_layer_measures(rng, shape):
    W0 = problems.trained_like(rng, *shape)
    B, A = rng.normal(size=(shape[0], 3)), rng.normal(size=(3, shape[1]))
    found = find_intruders(W0, B=B, A=A, scaling=0.1, dtype="float64")
    W1 = W0 + 0.1 * B @ A
    for name, value in plain(W0, W1).items():
        assert found.measures[name] == pytest.approx(value, rel=1e-9), name
    s1 = np.linalg.svd(W1, compute_uv=False)[:10]
    share = (s1[list(found.intruders)] ** 2).sum() / (s1**2).sum()
    assert found.measures["intruder_energy_share"] == pytest.approx(share, rel=1e-9)
    dense = find_intruders(W0, W1, dtype="float64")
    for name, value in plain(W0, W1).items():
        assert dense.measures[name] == pytest.approx(value, rel=1e-6), name


def test_base_capture(rng):
    W0, U, _ = problems.with_spectrum(rng, 40, 40, np.linspace(3, 0.1, 40))
    energy = np.cumsum(np.linspace(3, 0.1, 40) ** 2)
    top = int(np.searchsorted(energy, CAPTURE_ENERGY * energy[-1])) + 1
    W1 = W0 + 2 * rng.normal(size=(40, 1)) @ rng.normal(size=(1, 40)) / 6
    found = find_intruders(W0, W1, dtype="float64")
    U1 = np.linalg.svd(W1)[0]
    for vector in found.vectors:
        expected = np.linalg.norm(U[:, :top].T @ U1[:, vector.index])
        assert vector.base_capture == pytest.approx(expected, abs=1e-9)


def test_ranks_of_known_spectra():
    assert measures.effective_rank(np.ones(7)) == pytest.approx(7)
    assert measures.effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert measures.effective_rank(np.zeros(3)) == 0
    assert measures.stable_rank(3.0, 2.0) == pytest.approx(2.25)
    assert measures.stable_rank(0.0, 0.0) == 0
    assert measures.norm_fro(np.array([3e-200, 4e-200])) == pytest.approx(5e-200)
    assert measures.norm_fro(np.zeros(2)) == 0
    assert measures.intruder_energy_share(()) == 0


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
