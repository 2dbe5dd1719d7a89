"""Block Lanczos: leading vectors and norms against full decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd import Base
from spectra.svd.lanczos import leading_pairs, random_columns, spectral_norm
from spectra.updates.algebra import Dense
from tests.support import problems


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_leading_vectors_are_those_of_the_svd(rng, small_scale, shape, side):
    W1 = problems.trained_like(rng, *shape)
    base = Base(torch.from_numpy(W1).float(), side)
    leading = leading_pairs(base, Dense(base.W0).tuned(base.W0), 4, 1e-3)
    assert leading is not None
    U, s, Vh = np.linalg.svd(W1, full_matrices=False)
    np.testing.assert_allclose(leading.sigma[:4], s[:4], rtol=1e-5)
    assert not leading.is_degenerate(shape)
    exact = U if side == "left" else Vh.T
    ours = leading.Y if base.is_aligned else leading.half / leading.sigma[:4].float()
    signs = np.sign((exact[:, :4] * ours.numpy()).sum(0))
    errors = np.linalg.norm(exact[:, :4] * signs - ours.numpy(), axis=0)
    assert (errors <= leading.direction_errors(base.is_aligned).numpy() + 1e-6).all()


def test_ties_and_null_space_are_left_to_the_exact_engine(rng, small_scale):
    tied = problems.with_spectrum(rng, 96, 96, np.concatenate([[5, 3, 3], np.linspace(1, 0.5, 93)]))[0]
    thin = problems.with_spectrum(rng, 96, 96, np.concatenate([[5, 3], np.zeros(94)]))[0]
    for W in (tied, thin, np.zeros((96, 96))):
        base = Base(torch.from_numpy(W).float(), "left")
        assert leading_pairs(base, Dense(base.W0).tuned(base.W0), 3, 1e-3) is None


def test_spectral_norm(rng):
    for shape in ((300, 300), (100, 700), (700, 100), (5, 3)):
        W = problems.trained_like(rng, *shape)
        assert spectral_norm(torch.from_numpy(W).float()) == pytest.approx(np.linalg.norm(W, 2), rel=1e-5)
    assert spectral_norm(torch.zeros(40, 40)) == 0
    assert random_columns(4, 2, 1).equal(random_columns(4, 2, 1))
