"""Singular triplets, whatever the spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd import Base
from spectra.svd.triplets import leading_triplets
from spectra.updates.algebra import LowRank
from tests.support.problems import SPECTRA, matrix, with_spectrum
from tests.support.updates import an_update, exact


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 40), (72, 24), (24, 72)])
def test_triplets_are_triplets_whatever_the_spectrum(rng, spectrum, shape):
    W0 = torch.from_numpy(matrix(rng, spectrum, shape)).float()
    tuned = an_update(rng, "lora", W0, 2, 0.3 * float(W0.norm())).tuned(W0)
    for side in ("left", "right"):
        found = leading_triplets(Base(W0, side), tuned, 6)
        W1 = exact(tuned)
        U, V = found.U.numpy(), found.V.numpy()
        top = found.values[0]
        assert np.abs(U.T @ U - np.eye(U.shape[1])).max() < 1e-12
        assert np.abs(V.T @ V - np.eye(V.shape[1])).max() < 1e-12
        lost = np.linalg.norm(W1 @ V - U * found.s, axis=0)
        assert np.all(lost <= found.residuals + 1e-12 * top)
        assert found.residual < 64 * 2.0**-23  # the width of a cluster
        np.testing.assert_allclose(found.values, np.linalg.svd(W1, compute_uv=False), atol=1e-7 * top)


def test_a_large_weight_that_lanczos_does_not_resolve_is_decomposed(rng):
    p = 1030
    s = np.linspace(1.001, 1.0, p)
    W0 = torch.from_numpy(with_spectrum(rng, p, p, s)[0]).float()
    tuned = LowRank(torch.zeros(p, 1), torch.zeros(1, p), 1.0).tuned(W0)
    found = leading_triplets(Base(W0), tuned, 3)
    assert found.residual < 1e-5
    assert found.values.size == p
