"""Counts of random updates against the definition on whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.analysis import null
from spectra.analysis.null import null_counts, p_value
from spectra.svd import Question
from spectra.svd.secular import DiagonalPlusLowRank
from tests.support import problems, reference

SPECTRUM = np.concatenate([[6.0, 4.5, 3.0], np.linspace(2, 0.5, 17)])
UPDATES = {"rank 1": np.array([1.5]), "rank 3": np.array([2.0, 1.0, 0.5]), "dense": np.linspace(1.0, 0.1, 20)}
SHAPES = {"square": (20, 20), "tall": (33, 20), "wide": (20, 33)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("update", sorted(UPDATES))
def test_distribution(rng, update, shape, side):
    """Means and variances of 600 draws each, within 4.5 standard errors; the counts are not all alike."""
    question = Question(top_k=6, epsilon=0.6, side=side)
    found = null_counts(SPECTRUM, SHAPES[shape], UPDATES[update], question, draws=600, seed=3)
    expected = problems.literal_null_counts(rng, SPECTRUM, SHAPES[shape], UPDATES[update], question, 600)
    assert found.min() >= 0
    assert found.max() <= 6
    assert found.std() > 0
    for moment in (lambda counts: counts, lambda counts: (counts - expected.mean()) ** 2):
        ours, theirs = moment(found.astype(float)), moment(expected.astype(float))
        error = np.sqrt(ours.var() / ours.size + theirs.var() / theirs.size)
        assert abs(ours.mean() - theirs.mean()) < 4.5 * error


@pytest.fixture
def drawn(monkeypatch):
    """Collects the random factors in the order in which they are drawn."""
    factors = []
    draw = null.haar

    def collect(*size):
        factors.append(draw(*size))
        return factors[-1]

    monkeypatch.setattr(null, "haar", collect)
    return factors


def counts_of(drawn, s, shape, sigma, question):
    """The definition on the very updates that were drawn, in the basis of W0's vectors."""
    W0 = np.zeros((min(shape), max(shape)))
    np.fill_diagonal(W0, s)
    for E, F in zip(drawn[::2], drawn[1::2], strict=True):
        W1 = W0 + E.numpy() * sigma @ F.numpy().T
        is_turned = shape[0] > shape[1] or (shape[0] == shape[1] and question.side == "right")
        pair = (W0.T, W1.T) if is_turned else (W0, W1)
        yield reference.count(*pair, question.top_k, question.epsilon, question.side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", sorted(problems.SHAPES))
@pytest.mark.parametrize("spectrum", sorted(problems.SPECTRA))
def test_every_draw_is_counted_as_defined(rng, drawn, spectrum, shape, side):
    """Every kind of base, with ties and null space, and updates from the tiny to the overwhelming."""
    shape = problems.SHAPES[shape]
    p = min(shape)
    s = problems.SPECTRA[spectrum](rng, p).astype(float)
    for rank in {1, min(3, p), p}:
        for size in (1e-9, 0.3, 30.0):
            for question in (Question(1, 0.5, side), Question(10, 0.7, side)):
                drawn.clear()
                sigma = size * np.linspace(1, 0.5, rank)
                found = null_counts(s, shape, sigma, question, draws=2, seed=rank)
                assert found.tolist() == list(counts_of(drawn, s, shape, sigma, question)), (rank, size, question)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(200, 200), (200, 290), (290, 200)])
@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_low_rank_solver(rng, drawn, monkeypatch, shape, side, largest):
    """Where p is large the leading eigenvectors alone are computed; the counts are the same."""
    s = np.sort(np.arange(1, 201) ** -0.5 * np.exp(0.1 * rng.normal(size=200)))[::-1].copy()
    s[0] = largest * s[0]
    sigma, question = np.linspace(0.6, 0.3, 6), Question(12, 0.5, side)
    found = null_counts(s, shape, sigma, question, draws=6, seed=2)
    assert found.max() > 0
    assert found.tolist() == list(counts_of(drawn, s, shape, sigma, question))
    monkeypatch.setattr(DiagonalPlusLowRank, "leading", lambda *args: None)  # does not converge
    assert null_counts(s, shape, sigma, question, draws=6, seed=2).tolist() == found.tolist()


def test_low_rank_solver_is_used(monkeypatch):
    def refuse(matrix):
        assert matrix.shape[0] < 200, "a dense eigenproblem"
        return torch.linalg.eigh(matrix)

    monkeypatch.setattr(null, "eigh", refuse)
    s = np.linspace(3, 1, 200)
    null_counts(s, (200, 200), np.ones(4), Question(), draws=2, seed=0)
    with pytest.raises(AssertionError, match="dense"):
        null_counts(s, (200, 200), np.ones(150), Question(), draws=1, seed=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(60, 60), (90, 60), (60, 90), (240, 240)])
@pytest.mark.parametrize("spectrum", ["trained", "flat", "clusters of 4", "near ties", "heavy tail"])
def test_a_tiny_update_makes_none(rng, spectrum, shape, side):
    """Whatever its rank, and although it turns the vectors inside every cluster of W0 at will."""
    s = problems.SPECTRA[spectrum](rng, min(shape)).astype(float)
    for rank in (1, 3, min(shape)):
        if rank > 3 and min(shape) > 100:
            continue
        counts = null_counts(s, shape, np.full(rank, 1e-9), Question(side=side), draws=3, seed=1)
        assert counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_huge_update_makes_its_own(rng, side):
    for shape in ((60, 60), (120, 60), (60, 120), (260, 260)):
        s = problems.SPECTRA["trained"](rng, min(shape))
        for rank in (1, 4):
            counts = null_counts(s, shape, 1e4 * np.arange(rank, 0, -1), Question(rank, 0.6, side), draws=5, seed=1)
            assert counts.tolist() == [rank] * 5


def test_nothing_to_add_or_to_resemble():
    question = Question(top_k=5)
    assert null_counts(np.ones(8), (8, 8), np.zeros(2), question, draws=3, seed=0).tolist() == [0, 0, 0]
    assert null_counts(np.zeros(8), (8, 8), np.zeros(2), question, draws=3, seed=0).tolist() == [0, 0, 0]
    assert null_counts(np.zeros(8), (8, 9), np.array([2.0, 1.0]), question, draws=3, seed=0).tolist() == [2, 2, 2]
    assert null_counts(np.ones(8), (8, 8), np.ones(2), question, draws=0, seed=0).shape == (0,)


@pytest.mark.parametrize("p", [30, 220])
def test_a_tie_across_k_counts_whole(drawn, p):
    question = Question(top_k=5)
    for s in (np.zeros(p), np.where(np.arange(p) < 2, 3.0, 0.0)):
        found = null_counts(s, (p, p), np.ones(12), question, draws=2, seed=0)
        assert found.tolist() == list(counts_of(drawn, s, (p, p), np.ones(12), question))
        drawn.clear()
    assert null_counts(np.zeros(p), (p, p), np.ones(12), question, draws=1, seed=0).tolist() == [12]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale(scale):
    sigma, question = UPDATES["rank 3"], Question(6, 0.6)
    expected = null_counts(SPECTRUM, (20, 33), sigma, question, draws=20, seed=5)
    found = null_counts(SPECTRUM * scale, (20, 33), sigma * scale, question, draws=20, seed=5)
    assert found.tolist() == expected.tolist()


def test_the_seed_decides(rng):
    s = problems.SPECTRA["trained"](rng, 220)
    sigma, question = np.linspace(1, 0.5, 4), Question()

    def counts(draws, seed):
        return null_counts(s, (220, 300), sigma, question, draws=draws, seed=seed).tolist()

    first, threads = counts(12, 1), torch.get_num_threads()
    assert counts(5, 1) == first[:5]
    assert counts(12, 2) != first
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert counts(12, 1) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 3), (8, 2)])
def test_directions_are_uniform(rows, columns):
    rng = np.random.default_rng(0)
    Q = np.stack([null.haar(rng, rows, columns).numpy() for _ in range(4000)])
    assert np.abs(Q.transpose(0, 2, 1) @ Q - np.eye(columns)).max() < 1e-12
    assert np.abs(Q.mean(0)).max() < 4.5 / np.sqrt(4000 * rows)
    assert np.abs((Q**2).mean(0) - 1 / rows).max() < 4.5 * np.sqrt(2 / 4000) / rows


def test_p_value():
    counts = np.array([0, 0, 1, 2, 5])
    assert p_value(0, counts) == 1
    assert p_value(1, counts) == pytest.approx(4 / 6)
    assert p_value(5, counts) == pytest.approx(2 / 6)
    assert p_value(6, counts) == pytest.approx(1 / 6)
    assert p_value(3, np.zeros(0, dtype=int)) == 1
