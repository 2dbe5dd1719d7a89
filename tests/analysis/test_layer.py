"""Intruder dimensions of plain arrays: the definition at its edges, and what is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.analysis.layer import LayerAnalysis, find_intruders
from spectra.errors import NonFiniteError, UsageError
from spectra.svd import Question, choose_engine
from spectra.svd.spectrum import EPS32
from spectra.updates.algebra import LowRank
from tests.support import problems, reference
from tests.support.updates import updates


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e18])
def test_scale_does_not_matter(rng, scale):
    W0 = problems.trained_like(rng, 40, 40).astype(np.float32)
    W1 = W0 + (3 * np.outer(rng.normal(size=40), rng.normal(size=40)) / 6).astype(np.float32)
    plain = find_intruders(W0, W1)
    scaled = find_intruders(W0 * np.float32(scale), W1 * np.float32(scale))
    assert scaled.intruders == plain.intruders
    for a, b in zip(plain.vectors, scaled.vectors, strict=True):
        assert b.max_cosine == pytest.approx(a.max_cosine, abs=1e-4)
        assert b.sigma == pytest.approx(a.sigma * scale, rel=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    spectrum=st.sampled_from(sorted(problems.SPECTRA)),
    top_k=st.integers(1, 12),
)
def test_any_shape_and_spectrum(seed, m, n, spectrum, top_k):
    rng = np.random.default_rng(seed)
    W0 = problems.matrix(rng, spectrum, (m, n)).astype(np.float32)
    update, W1 = updates(rng, W0, "low rank")
    found = find_intruders(W0, B=update.B * update.scaling, A=update.A, top_k=top_k)
    expected = reference.max_cosines(W0, W1, top_k)
    assert [v.intruder for v in found.vectors] == [value is not None and value < 0.5 for value in expected]


@pytest.mark.parametrize("cosine", [0.2, 0.45, 0.499, 0.4995, 0.5005, 0.502, 0.55, 0.9])
@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
def test_planted_cosines_are_recovered(rng, cosine, shape):
    W0, W1, index = problems.planted(rng, shape, cosine, sigma=5.0)
    found = find_intruders(W0, W1)
    assert found.vectors[index].max_cosine == pytest.approx(cosine, abs=2e-5)
    assert found.vectors[index].intruder == (cosine < 0.5)
    assert ("borderline" in found.vectors[index].flags) == (abs(cosine - 0.5) < 1e-3)


def test_a_cosine_of_exactly_epsilon_is_no_intruder():
    # cos = 0.5 in exact arithmetic: y = (x0 + x1 + x2 + x3) / 2
    W0 = np.diag([8.0, 7.0, 6.0, 5.0])
    y = np.full(4, 0.5)
    found = find_intruders(W0, W0 * 1e-6 + 100 * np.outer(y, [1, 0, 0, 0]), top_k=1, dtype="float64", epsilon=0.5)
    value = found.vectors[0].max_cosine
    assert value is not None
    assert value == pytest.approx(0.5, abs=1e-6)
    assert found.vectors[0].intruder == (value < 0.5)
    exactly = find_intruders(W0, W0 * 1e-6 + 100 * np.outer(y, [1, 0, 0, 0]), top_k=1, dtype="float64", epsilon=value)
    assert not exactly.vectors[0].intruder, "the inequality is strict"


def test_large_clusters_take_no_time():
    started = time.process_time()
    rotation = scipy.linalg.hadamard(512) / np.sqrt(512)
    found = find_intruders(np.eye(512), rotation, top_k=5)
    assert len(found.vectors) == 512
    assert found.intruders == ()
    assert time.process_time() - started < 10


def test_a_cluster_that_reaches_into_the_null_space_counts_whole():
    tolerance = 8 * EPS32
    s = np.array([1.0, 0.5, tolerance * 1.2, tolerance * 0.9, 0, 0, 0, 0])
    W0 = np.diag(s)
    turn = np.eye(8)
    turn[2:4, 2:4] = [[0.6, -0.8], [0.8, 0.6]]
    W1 = turn @ np.diag(s)
    assert reference.max_cosines(W0, W1, 4) == pytest.approx(
        [v.max_cosine for v in find_intruders(W0, W1, top_k=4, dtype="float64").vectors]
    )


def test_infinite_factors_hide_behind_no_zero(rng):
    W0 = problems.trained_like(rng, 12, 12)
    A = np.full((1, 12), np.nan)
    with pytest.raises(NonFiniteError, match=r"^A: "):
        find_intruders(W0, B=np.zeros((12, 1)), A=A)
    with pytest.raises(NonFiniteError):
        LayerAnalysis(torch.from_numpy(W0), Question(), choose_engine("exact")).of(
            LowRank(torch.zeros(12, 1), torch.from_numpy(A), 1.0).tuned(torch.from_numpy(W0))
        )


def test_a_difference_that_overflows(rng):
    W0 = np.diag(np.linspace(1, 2, 12)).astype(np.float32)
    W1 = W0.copy()
    W0[0, 0], W1[0, 0] = -3e38, 3e38
    with pytest.raises(NonFiniteError):
        find_intruders(W0, W1)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((np.eye(4), np.eye(4)), {"engine": "nonsense"}, "engine"),
        ((np.eye(4), np.eye(4)), {"top_k": 2.5}, "whole number"),
        ((np.eye(4), np.eye(4)), {"side": "top"}, "left or right"),
        ((np.eye(4), np.eye(4)), {"dtype": "float16"}, "float32 or float64"),
        ((np.eye(4), np.eye(4) * 1j), {}, "real numbers"),
        ((np.eye(4), [["a"]]), {}, "real numbers"),
        ((np.eye(4), np.ones(4)), {}, "expected a matrix"),
        ((np.eye(4), np.eye(5)), {}, "expected the same"),
        ((np.eye(4),), {}, "either W1, or both"),
        ((np.eye(4),), {"B": np.ones((4, 1))}, "either W1, or both"),
        ((np.eye(4),), {"B": np.ones((4, 1)), "A": np.ones((2, 4))}, "do not make an update"),
    ],
)
def test_find_intruders_says_what_is_wrong(arguments, options, words):
    with pytest.raises(UsageError, match=words):
        find_intruders(*arguments, **options)


def test_big_endian_arrays_are_read():
    W0 = np.diag(np.arange(8, 0, -1.0))
    assert find_intruders(W0.astype(">f8"), (W0 + 1).astype(">f4")).vectors[0].sigma > 8


def test_the_sign_of_a_cosine_does_not_matter(rng):
    W0 = problems.trained_like(rng, 30, 30)
    assert find_intruders(W0, -W0).intruders == ()


def test_sides_differ_where_they_should(rng):
    W0 = np.diag(np.arange(64, 0, -1.0))
    spread = np.full(64, 1 / 8)
    W1 = W0 + 500 * np.outer(spread, np.eye(64)[3])  # new on the left, old on the right
    assert 0 in find_intruders(W0, W1, side="left").intruders
    assert 0 not in find_intruders(W0, W1, side="right").intruders


def test_a_tie_across_k_is_counted_whole():
    W0 = np.diag(np.arange(40, 0, -1.0))
    basis = scipy.linalg.hadamard(64)[:40, :40] / 8.0
    Q = np.linalg.qr(basis)[0]
    s = np.concatenate([[90.0, 80.0, 80.0, 80.0], np.linspace(5, 1, 36)])
    found = find_intruders(W0, Q * s, top_k=2)
    assert [v.index for v in found.vectors] == [0, 1, 2, 3]
    assert ["tie_across_k" in v.flags for v in found.vectors] == [False, True, True, True]


def test_null_space_of_the_base_is_no_base_vector(rng):
    W0, U, V = problems.with_spectrum(rng, 30, 30, np.array([3.0, 2.0, 1.0]))
    outside, across = np.linalg.svd(U.T)[2][-1], np.linalg.svd(V.T)[2][-1]
    found = find_intruders(W0, W0 + 10 * np.outer(outside, across), top_k=3)
    assert found.intruders == (0,)
    assert found.vectors[0].max_cosine == pytest.approx(0, abs=1e-3)


def test_null_space_of_the_tuned_weight_is_never_an_intruder():
    W0 = np.diag(np.arange(20, 0, -1.0))
    W1 = np.zeros((20, 20))
    W1[0, 0] = 4.0
    found = find_intruders(W0, W1)
    assert found.intruders == ()
    assert [v.index for v in found.vectors] == list(range(10)), "null space ties are no reason for more than k"
    assert all("null_space" in v.flags and v.max_cosine is None for v in found.vectors[1:])


def test_a_zero_base_has_nothing_to_resemble(rng):
    found = find_intruders(np.zeros((20, 30)), B=rng.normal(size=(20, 2)), A=rng.normal(size=(2, 30)))
    assert found.intruders == (0, 1)
    assert "zero_base" in found.flags


def test_a_zero_tuned_weight(rng):
    found = find_intruders(problems.trained_like(rng, 12, 12), np.zeros((12, 12)))
    assert found.intruders == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_values_are_refused(rng, value, which):
    pair = [problems.trained_like(rng, 12, 12) for _ in range(2)]
    pair[which][3, 4] = value
    with pytest.raises(NonFiniteError, match="1 of 144 values"):
        find_intruders(*pair)
