"""Products with a whole weight, and its norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.updates import products
from spectra.updates.products import frobenius_norm, times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (300, 40), (40, 300), (1, 1), (0, 4)])
def test_the_frobenius_norm_is_that_of_the_entries_in_float64(rng, monkeypatch, dtype, shape):
    monkeypatch.setattr(products, "CHUNK", 64)  # so that parts are many, and the last is short
    W = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    expected = np.linalg.norm(W.double().numpy())
    padded = torch.zeros(shape[0], shape[1] + 3, dtype=dtype)
    padded[:, : shape[1]] = W
    for same in (W, W.T.contiguous().T, padded[:, : shape[1]]):
        assert frobenius_norm(same) == pytest.approx(expected, rel=1e-14)


def test_many_entries_lose_nothing_in_float32(rng):
    W = torch.from_numpy(rng.normal(size=(1500, 1500))).float()
    assert frobenius_norm(W) == pytest.approx(np.linalg.norm(W.double().numpy()), rel=1e-13)


@pytest.mark.parametrize("columns", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_do_not_depend_on_how_a_weight_lies_in_memory(rng, dtype, columns):
    W = torch.from_numpy(rng.normal(size=(30, 20))).to(dtype)
    X = torch.from_numpy(rng.normal(size=(20, columns))).to(dtype)
    expected = W.double().numpy() @ X.double().numpy()
    for same in (W, W.T.contiguous().T, torch.cat([W, W], 1)[:, :20], torch.cat([W, W], 1).T[:20].T):
        found = times(same, X)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double().numpy(), expected, atol=100 * torch.finfo(dtype).eps)
