"""Measures against plain formulas on dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.analysis import measures
from spectra.analysis.layer import find_intruders
from spectra.svd.matching import CAPTURE_ENERGY
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
    assert measures.intruder_energy_share(()) == 0
