"""Low-rank factors against plain SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.analysis import truncation
from spectra.analysis.truncation import low_rank_factors
from spectra.errors import ConvergenceError, NonFiniteError, UsageError
from spectra.svd import decompose
from spectra.updates.algebra import Dense, LowRank, RowScaled

SHAPES = [(40, 40), (70, 30), (30, 70), (1, 20)]


def updates(rng, m, n, dtype=torch.float32):
    """One tuned weight of each kind, with its dW in float64."""
    W0 = torch.from_numpy(rng.normal(size=(m, n))).to(dtype)
    W1 = W0 + torch.from_numpy(0.1 * rng.normal(size=(m, n)) * 0.8 ** np.arange(n)).to(dtype)
    B, A = torch.from_numpy(rng.normal(size=(m, 3))), torch.from_numpy(rng.normal(size=(3, n)))
    magnitude = torch.from_numpy(rng.uniform(1, 2, size=m))
    whole = W0.double() + 0.5 * B @ A
    dora = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    return {
        "dense": (Dense(W1).tuned(W0), W1.double() - W0.double()),
        "low rank": (LowRank(B, A, 0.5).tuned(W0), 0.5 * B @ A),
        "dora": (RowScaled(B, A, 0.5, magnitude).tuned(W0), dora - W0.double()),
    }


@pytest.mark.parametrize("gram", [False, True], ids=["svd", "gram"])
@pytest.mark.parametrize("kind", ["dense", "low rank", "dora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_the_best_of_their_rank(rng, monkeypatch, shape, kind, gram):
    if gram:
        monkeypatch.setattr(truncation, "SVD_UP_TO", 0)
    tuned, dW = updates(rng, *shape)[kind]
    s = np.linalg.svd(dW.numpy(), compute_uv=False)
    size = np.linalg.norm(s)
    for rank, scaling in [(1, 2.0), (3, 0.25), (12, 2.0), (min(shape), 1.0), (max(shape) + 5, 3.0)]:
        found = low_rank_factors(tuned, rank, scaling)
        assert found.B.shape == (shape[0], rank)
        assert found.A.shape == (rank, shape[1])
        assert found.B.dtype == found.A.dtype == torch.float32
        product = scaling * found.B.double() @ found.A.double()
        best = np.linalg.norm(s[rank:]) / size
        lost = float((dW - product).norm()) / size
        assert lost == pytest.approx(best, abs=1e-6)
        assert found.relative_error == pytest.approx(lost, abs=1e-12)
        U, sigma, Vh = np.linalg.svd(dW.numpy(), full_matrices=False)
        np.testing.assert_allclose(product, (U[:, :rank] * sigma[:rank]) @ Vh[:rank], atol=1e-6 * s[0])
        kept = min(rank, s.size)
        mine = found.singular_values  # of a low-rank update, its three
        np.testing.assert_allclose(mine, s[: mine.size], atol=1e-7 * s[0])
        alike = min(kept, 3)  # where the values are not rounding
        np.testing.assert_allclose(found.B.norm(dim=0)[:alike], found.A.norm(dim=1)[:alike], rtol=1e-4)


def test_factors_of_a_float64_weight_are_no_worse_than_float32(rng):
    tuned, dW = updates(rng, 30, 20, torch.float64)["dense"]
    found = low_rank_factors(tuned, 20, 1.0)
    assert 0 < found.relative_error < 1e-7
    assert float((dW - found.B.double() @ found.A.double()).norm() / dW.norm()) == pytest.approx(found.relative_error)


def test_a_low_rank_update_is_never_decomposed_whole(rng, monkeypatch):
    seen = []

    def watched(matrix, *args, original=torch.linalg.svd, **options):
        seen.append(tuple(matrix.shape))
        return original(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    monkeypatch.setattr(truncation, "_difference", lambda tuned: pytest.fail("dW was formed"))
    low_rank_factors(updates(rng, 70, 30)["low rank"][0], 2, 1.0)
    assert seen == [(3, 3)]


def test_the_gram_path_is_taken_beyond_its_size(rng, monkeypatch):
    tuned = updates(rng, 30, 20)["dense"][0]
    monkeypatch.setattr(truncation, "SVD_UP_TO", 19)
    monkeypatch.setattr(truncation, "decompose", lambda *_: pytest.fail("a full SVD"))
    low_rank_factors(tuned, 2, 1.0)


def test_no_change_has_zero_factors(rng):
    W0 = torch.from_numpy(rng.normal(size=(9, 6))).float()
    for tuned in (Dense(W0.clone()).tuned(W0), LowRank(torch.zeros(9, 2), torch.ones(2, 6), 1.0).tuned(W0)):
        found = low_rank_factors(tuned, 2, 2.0)
        assert not found.B.any()
        assert not found.A.any()
        assert found.relative_error == 0


def test_what_cannot_be_factored_is_an_error(rng, monkeypatch):
    W0 = torch.zeros(9, 6)
    bad = W0.clone()
    bad[2, 3] = torch.nan
    for tuned in (Dense(bad).tuned(W0), LowRank(bad, torch.ones(6, 6), 1.0).tuned(torch.zeros(9, 6))):
        with pytest.raises(NonFiniteError):
            low_rank_factors(tuned, 2, 1.0)
    good = updates(rng, 30, 20)["dense"][0]
    for rank, scaling in [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("inf")), (2, float("nan"))]:
        with pytest.raises(UsageError, match=r"expected (at least 1|a positive number)"):
            low_rank_factors(good, rank, scaling)

    def wrong(dW, side, original=decompose):
        found = original(dW, side)
        found.vectors[:, :2] = found.vectors[:, -2:]
        return found

    monkeypatch.setattr(truncation, "decompose", wrong)
    with pytest.raises(ConvergenceError, match="rank 2 should lose"):
        low_rank_factors(good, 2, 1.0)
