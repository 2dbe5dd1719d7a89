"""Certificates: what they bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd import Base, Question
from spectra.svd.certificate import Certificate, Rounding
from spectra.svd.lanczos import BlockLanczos, leading_pairs, random_columns
from spectra.updates.algebra import Dense
from tests.support import problems


def leading_space(W0, W1, side, k=3, steps=4):
    """A Lanczos space of W0 that starts from the leading vectors of W1, and what the engine makes of it."""
    base = Base(W0, side)
    leading = leading_pairs(base, Dense(W1).tuned(W0), k, 1e-3)
    assert leading is not None
    W = base.W
    X = leading.Y if base.is_aligned else (W @ leading.half) / leading.sigma[:k].to(W.dtype)
    random = random_columns(W.shape[0], 6, 1) / np.sqrt(W.shape[0])
    space = BlockLanczos(lambda Z: W @ (W.T @ Z), torch.cat([X.double(), random], 1), W.dtype)
    assert space.extend(steps)
    return base, X, Certificate(base, space, X, random, leading, Question(k, 0.5, side), Rounding())


@pytest.mark.parametrize("shape", [(90, 90), (80, 120), (120, 80)], ids=str)
@pytest.mark.parametrize("kind", ["trained", "power law", "heavy tail"])
def test_the_residual_bounds_every_overlap(rng, small_scale, kind, shape):
    """‖y − (M − λ)z‖ as evaluated is never below |⟨x, y⟩|, at each eigenvalue of M and on both sides."""
    W0 = torch.from_numpy(problems.matrix(rng, kind, shape))
    u, v = problems.orthonormal(rng, shape[0], 3), problems.orthonormal(rng, shape[1], 3)
    W1 = W0 + torch.from_numpy(u * (float(torch.linalg.matrix_norm(W0, 2)) * np.array([5, 4, 3])) @ v.T)
    for side in ("left", "right"):
        base, X, found = leading_space(W0, W1, side)
        eigenvalues, vectors = torch.linalg.eigh(base.W @ base.W.T)
        bound, _ = found.residual(eigenvalues, found.C, found.outside)
        assert (bound + found.lost >= (vectors.T @ X).abs() - 1e-9).all()
