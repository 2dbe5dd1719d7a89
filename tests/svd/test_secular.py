"""The leading eigenpairs of a diagonal plus a low-rank matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd.secular import DiagonalPlusLowRank


def diagonal_plus_low_rank(rng, p, r, scale=1.0):
    d = torch.from_numpy(np.sort(rng.uniform(0, 1, p) ** 2)[::-1].copy())
    L = torch.from_numpy(scale * rng.normal(size=(p, 2 * r)) / np.sqrt(p))
    K = torch.from_numpy(np.diag(rng.uniform(0.5, 2, r)))
    eye, zero = torch.eye(r, dtype=torch.float64), torch.zeros(r, r, dtype=torch.float64)
    return DiagonalPlusLowRank(d, L, torch.cat([torch.cat([K, eye], 1), torch.cat([eye, zero], 1)]))


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1, 30])
@pytest.mark.parametrize("r", [1, 4, 12])
def test_leading_eigenpairs_of_a_diagonal_plus_low_rank(rng, r, scale):
    H = diagonal_plus_low_rank(rng, 150, r, scale)
    dense = H.matmul(torch.eye(150, dtype=torch.float64))
    theta, vectors = np.linalg.eigh(dense.numpy())
    values, Y, residuals = H.leading(10, 1e-13)
    np.testing.assert_allclose(values, theta[::-1][:10], atol=1e-12 * theta[-1])
    assert (residuals <= 1e-13 * theta[-1]).all()
    overlaps = np.abs((vectors[:, ::-1][:, :10] * Y.numpy()).sum(0))
    np.testing.assert_allclose(overlaps, 1, atol=1e-6)


def test_no_eigenvalue_is_missed(rng):
    for trial in range(50):
        H = diagonal_plus_low_rank(rng, 60, 1 + trial % 5, 10 ** rng.uniform(-3, 2))
        theta = np.linalg.eigvalsh(H.matmul(torch.eye(60, dtype=torch.float64)).numpy())
        for tau in rng.uniform(theta[0], theta[-1], 5):
            assert H.count_above(float(tau)) == np.count_nonzero(theta > tau)


def test_hopeless_problems_are_given_up(rng):
    nothing = torch.zeros(30, 2, dtype=torch.float64)
    H = DiagonalPlusLowRank(nothing[:, 0], nothing, torch.eye(2).double())
    assert H.leading(5, 1e-13) is None
