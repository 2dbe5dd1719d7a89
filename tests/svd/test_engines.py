"""Every engine's answer against the literal float64 twin, and the decompositions by themselves."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.analysis.layer import LayerAnalysis, find_intruders
from spectra.errors import ConvergenceError, NonFiniteError, UsageError
from spectra.svd import (
    ENGINES,
    Base,
    Question,
    choose_engine,
    clusters,
    decompose,
    decompose_gram,
    exact,
    numerical_rank,
)
from spectra.svd import base as base_module
from spectra.svd.decompose import eigh
from spectra.svd.spectrum import EPS32
from spectra.updates.algebra import DenseWeight, LowRank
from tests.support import problems, reference
from tests.support.updates import updates

METHODS = {
    "svd32": lambda W, side: decompose(torch.from_numpy(W).float(), side),
    "svd64": lambda W, side: decompose(torch.from_numpy(W), side),
    "gram": lambda W, side: decompose_gram(DenseWeight(torch.from_numpy(W).float(), torch.from_numpy(W).float()), side),
}


def check_spectrum(W, spectrum):
    """The one strict checker of a Spectrum: values, order, vectors, orthonormality, residuals."""
    eps = 2e-7 if spectrum.dtype == torch.float32 else 1e-13
    m, n = W.shape
    p = min(m, n)
    s = np.linalg.svd(W, compute_uv=False)
    scale = s[0]
    assert spectrum.shape == (m, n)
    assert spectrum.s.dtype == np.float64
    assert spectrum.s.shape == (p,)
    assert (np.diff(spectrum.s) <= 0).all()
    # The Gram matrix squares the values, so the smallest ones are known to √eps only.
    np.testing.assert_allclose(spectrum.s**2, s**2, atol=20 * np.sqrt(max(m, n)) * eps * scale**2)
    usable = spectrum.s > max(m, n) * EPS32 * scale
    X = spectrum.vectors.double().numpy()[:, usable]
    assert X.shape[0] == (m if spectrum.side == "left" else n)
    squared = spectrum.method == "gram" and usable.any()  # squaring the matrix squares its condition
    lost = 1e-14 * (scale / s[usable].min()) ** 2 if squared else 0.0
    np.testing.assert_allclose(X.T @ X, np.eye(X.shape[1]), atol=100 * eps + lost)
    other = W.T @ X if spectrum.side == "left" else W @ X
    np.testing.assert_allclose(np.linalg.norm(other, axis=0), s[usable], atol=20 * np.sqrt(max(m, n)) * eps * scale)
    image = (W @ other if spectrum.side == "left" else W.T @ other) - X * spectrum.s[usable] ** 2
    # ‖WWᵀu − σ²u‖ ≤ (σ₁ + σ)·residual: the residuals are what they claim to be.
    claimed = spectrum.residuals[usable]
    assert (np.linalg.norm(image, axis=0) <= 2 * scale * claimed + 50 * p * eps * scale**2).all()
    squaring = 1e-15 * scale**2 / s[usable] if squared else 0.0
    assert (claimed <= 100 * np.sqrt(max(m, n)) * eps * scale + squaring).all()
    assert spectrum.residual == pytest.approx(spectrum.residuals.max() / spectrum.s[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
@pytest.mark.parametrize("spectrum", problems.SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_decomposition(rng, method, spectrum, shape, side):
    W = problems.matrix(rng, spectrum, shape).astype(np.float32).astype(np.float64)
    check_spectrum(W, METHODS[method](W, side))


@pytest.mark.parametrize("method", METHODS)
def test_the_checker_rejects_wrong_vectors(rng, method):
    W = problems.trained_like(rng, 20, 20).astype(np.float32).astype(np.float64)
    spectrum = METHODS[method](W, "left")
    spectrum.vectors[:, 3] = spectrum.vectors[:, 4]
    with pytest.raises(AssertionError):
        check_spectrum(W, spectrum)


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


@pytest.mark.parametrize("kind", ["low rank", "row scaled", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
@pytest.mark.parametrize("spectrum", problems.SPECTRA)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_agrees_with_the_definition(rng, engine, spectrum, shape, side, kind):
    W0 = problems.matrix(rng, spectrum, shape).astype(np.float32)
    update, W1 = updates(rng, W0, kind)
    tuned = update.tuned(torch.from_numpy(W0))
    expected = reference.max_cosines(W0, W1, 10, side)
    for epsilon in (0.3, 0.5, 0.7):
        question = Question(10, epsilon, side)
        comparison = choose_engine(engine).compare(Base(torch.from_numpy(W0), side), tuned, question)
        assert len(comparison.matches) == len(expected)
        for match, value in zip(comparison.matches, expected, strict=True):
            if value is None:
                assert "null_space" in match.flags
                continue
            assert match.max_cosine is not None
            lower, upper = match.bounds
            assert lower - 1e-9 <= value <= upper + 1e-9, "the bounds must enclose the exact value"
            assert (match.max_cosine < epsilon) == (value < epsilon)
            assert abs(match.max_cosine - value) <= max(1e-4, upper - lower)


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
    started = time.perf_counter()
    rotation = scipy.linalg.hadamard(512) / np.sqrt(512)
    found = find_intruders(np.eye(512), rotation, top_k=5)
    assert len(found.vectors) == 512
    assert found.intruders == ()
    assert time.perf_counter() - started < 10


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


def test_a_driver_that_fails_is_replaced(rng, monkeypatch):
    W = problems.trained_like(rng, 30, 20)

    def fail(*args, **kwargs):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    spectrum = decompose(torch.from_numpy(W))
    assert spectrum.method == "gesvd"
    check_spectrum(W, spectrum)
    monkeypatch.setattr(scipy.linalg, "svd", fail)
    with pytest.raises(ConvergenceError, match=r"gesdd: no convergence; gesvd: no convergence"):
        decompose(torch.from_numpy(W))


def test_only_open_verdicts_are_settled_in_float64(rng, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return decompose_gram(*args, **options)

    monkeypatch.setattr(exact, "decompose_gram", counted)
    for cosine, expected in ((0.3, False), (0.5003, True), (0.7, False)):
        W0, W1, _ = problems.planted(rng, (96, 96), cosine, sigma=5.0)
        calls.clear()
        found = find_intruders(W0, W1, top_k=1)
        assert bool(calls) is expected
        assert ("settled_in_float64" in found.flags) is expected


def test_the_base_is_decomposed_once_for_all_fine_tunes(rng, monkeypatch):
    calls = []

    def counted(W, *args, **options):
        calls.append(W)
        return decompose(W, *args, **options)

    monkeypatch.setattr(exact, "decompose", counted)
    monkeypatch.setattr(base_module, "decompose", counted)
    W0 = torch.from_numpy(problems.trained_like(rng, 40, 40)).float()
    engine = choose_engine("exact")
    base = Base(W0, "left")
    for _ in range(3):
        update, _ = updates(rng, W0.numpy(), "low rank")
        engine.compare(base, update.tuned(W0), Question())
    assert sum(W is W0 for W in calls) == 1
    assert len(calls) == 4


def test_clusters_join_and_end():
    e = EPS32
    assert clusters(np.array([])).tolist() == [0]
    assert clusters(np.array([1.0])).tolist() == [0, 1]
    assert clusters(np.array([1.0, 1 - 8 * e, 1 - 17 * e])).tolist() == [0, 2, 3]
    ladder = 1 - 7 * e * np.arange(12)  # every gap joins, but ten steps are wider than 64 eps
    assert clusters(ladder).tolist() == [0, 10, 12]
    assert clusters(np.zeros(3)).tolist() == [0, 3]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_clusters_agree_with_the_twin(steps):
    s = 1 - EPS32 * np.cumsum(steps)
    starts = clusters(s)
    assert [list(range(a, b)) for a, b in itertools.pairwise(starts)] == reference.groups(s)


def test_numerical_rank():
    assert numerical_rank(np.array([]), (0, 0)) == 0
    assert numerical_rank(np.zeros(4), (4, 4)) == 0
    assert numerical_rank(np.array([1.0, 1e-3, 1e-9]), (100, 100)) == 2


def test_eigenvalues_that_divide_and_conquer_does_not_find(rng, monkeypatch):
    A = torch.from_numpy(rng.normal(size=(30, 30)))
    A = A + A.T
    expected = torch.linalg.eigvalsh(A)

    def fail(*args, **kwargs):
        raise np.linalg.LinAlgError("too many repeated eigenvalues")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = eigh(A)
    np.testing.assert_allclose(values, expected, atol=1e-12)
    np.testing.assert_allclose(vectors @ torch.diag(values) @ vectors.T, A, atol=1e-12)
    monkeypatch.setattr(scipy.linalg, "eigh", fail)
    with pytest.raises(ConvergenceError, match="evd: too many"):
        decompose_gram(DenseWeight(A, A))
