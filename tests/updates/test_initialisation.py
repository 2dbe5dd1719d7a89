"""What an initialisation took out of the base: condensed, and how surely it is known."""

from __future__ import annotations

import numpy as np
import torch

from spectra.updates.initialisation import condensed, leading, of_first_columns
from tests.support.seeds import each_seed


def test_factors_are_condensed_without_loss():
    torch.manual_seed(0)
    B, A = torch.randn(9, 6, dtype=torch.float64), torch.randn(6, 14, dtype=torch.float64)
    B2, A2 = condensed(torch.cat([B, -B[:, :2]], 1), torch.cat([A, A[:2]], 0))
    torch.testing.assert_close(B2 @ A2, B[:, 2:] @ A[2:])
    torch.testing.assert_close(B2.T @ B2, A2 @ A2.T)


@each_seed(range(20))
def test_the_bound_holds_for_float32_decompositions(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    m, n = (int(x) for x in rng.integers(5, 80, size=2))
    W, rank = torch.randn(m, n), int(rng.integers(1, min(m, n)))
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    found = leading(W, rank)
    assert torch.linalg.norm((U[:, :rank] * s[:rank]).double() @ V[:rank].double() - found.B @ found.A) <= found.error
    Q, R = torch.linalg.qr(W)
    found = of_first_columns(W, rank)
    assert torch.linalg.norm(Q[:, :rank].double() @ R[:rank].double() - found.B @ found.A) <= found.error
