"""The predicted intruder threshold against exact ones, and its formula against a plain brute-force one."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.analysis.threshold import predicted_threshold
from spectra.svd import clusters
from tests.support import problems

TALL, WIDE, SQUARE = (192, 112), (112, 192), (128, 128)


def gaussian(rng, m, n):
    return np.linalg.svd(rng.normal(size=(m, n)) / np.sqrt(max(m, n)), compute_uv=False)


def spiked(rng, m, n):
    s = gaussian(rng, m, n)
    s[:6] += rng.uniform(1, 6, size=6)
    return np.sort(s)[::-1]


def power_law(rng, m, n):
    p = min(m, n)
    return np.sort(np.arange(1, p + 1) ** -0.7 * np.exp(0.3 * rng.normal(size=p)))[::-1]


def predict(s, shape, **question):
    """The prediction where there must be one."""
    found = predicted_threshold(s, shape, **question)
    assert found is not None
    return found


def brute_force(s, shape, epsilon, top_k, side="left", points=3000):
    """The docstring's formula, written out, on a fine grid between the singular values."""
    m, n = shape if side == "left" else shape[::-1]
    p, least = s.size, np.inf
    fractions = 1 / (1 + np.exp(-np.linspace(-12, 12, points)))
    for i in range(min(top_k, p)):
        if i:
            z = s[i] + fractions * (s[i - 1] - s[i])
        else:
            z = s[0] + (s[0] - s[1]) * np.geomspace(1e-5, 1e3 * s[0] / (s[0] - s[1]), points)
        difference = z[:, None] ** 2 - s**2
        S = (z[:, None] / difference).sum(1)
        left, right = (S + (m - p) / z) / m, (S + (n - p) / z) / n
        solved = left * right > 0
        ratio = np.where(solved, right / left, 1.0)
        inside = (ratio[:, None] * z[:, None] ** 2 / m + s**2 / n) / difference**2
        outside = ratio * (m - p) / (m * z**2)
        intruder = solved & (inside.max(1) < epsilon**2 * (inside.sum(1) + outside))
        if intruder.any():
            least = min(least, (1 / np.sqrt(left * right, where=solved, out=np.ones_like(z)))[intruder].min())
    return least


def has_intruder(W1, p, top_k, epsilon, side):
    U, _, Vh = np.linalg.svd(W1, full_matrices=False)
    Y = U[:p, :top_k] if side == "left" else Vh[:top_k, :p].T  # the base's vectors are unit vectors
    return bool((np.abs(Y).max(0) < epsilon).any())


def exact_threshold(s, dW, top_k, epsilon, side, near):
    """The first size of the update with an intruder, on a grid of 8 % steps, bisected."""
    W0 = np.zeros(dW.shape)
    np.fill_diagonal(W0, s)
    before = None
    for size in near * np.geomspace(1 / 4, 4, 37):
        if has_intruder(W0 + size * dW, s.size, top_k, epsilon, side):
            assert before is not None, "an intruder at a quarter of the prediction"
            while size / before > 1.01:
                middle = np.sqrt(size * before)
                if has_intruder(W0 + middle * dW, s.size, top_k, epsilon, side):
                    size = middle
                else:
                    before = middle
            return size
        before = size
    return np.inf


@pytest.mark.parametrize("spectrum", [gaussian, spiked, power_law])
def test_prediction_is_within_a_factor_of_two_of_the_exact_threshold(spectrum):
    ratios = []
    trials = [(shape, rank, side) for shape in (SQUARE, TALL, WIDE) for rank in (1, 4) for side in ("left", "right")]
    for trial, (shape, rank, side) in enumerate(trials):
        rng = np.random.default_rng([trial, 5])
        s = spectrum(rng, *shape)
        dW = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
        dW /= np.linalg.norm(dW, 2)
        predicted = predict(s, shape, epsilon=0.5, top_k=10, side=side)
        ratios.append(predicted / exact_threshold(s, dW, 10, 0.5, side, predicted))
    print(f"predicted/exact: median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    assert 0.8 < np.median(ratios) < 1.25
    assert min(ratios) > 0.5
    assert max(ratios) < 2.0


@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("top_k", [1, 3, 10, 40])
@pytest.mark.parametrize("shape", [(9, 9), (40, 40), (60, 25), (25, 60)])
def test_formula(rng, shape, top_k, epsilon):
    for side in ("left", "right"):
        s = power_law(rng, *shape)
        assert clusters(s).size == s.size + 1
        expected = brute_force(s, shape, epsilon, top_k, side)
        found = predicted_threshold(s, shape, epsilon=epsilon, top_k=top_k, side=side)
        assert found == pytest.approx(expected, rel=0.01) if np.isfinite(expected) else found is None


def test_a_condition_that_holds_only_between_grid_points(rng):
    """However narrow the window in the middle of a gap, it is found."""
    s = np.concatenate([[0.595, 0.493], np.linspace(0.4, 0.1, 15)])
    epsilons = np.linspace(0.4, 0.7, 61)
    found = [predicted_threshold(s, (17, 17), epsilon=e, top_k=2) or np.inf for e in epsilons]
    expected = [brute_force(s, (17, 17), e, 2, points=20001) for e in epsilons]
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(found) > 1.5 * min(found)  # some windows are open and some are not


@pytest.mark.parametrize("spectrum", sorted(problems.SPECTRA))
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_scale(rng, spectrum, scale):
    for shape in ((40, 40), (72, 24)):
        s = problems.SPECTRA[spectrum](rng, min(shape)).astype(float)
        one = predicted_threshold(s, shape, epsilon=0.5, top_k=10)
        other = predicted_threshold(s * scale, shape, epsilon=0.5, top_k=10)
        assert (one is None) == (other is None)
        if one is not None:
            assert 0 < one < np.inf
            assert other == pytest.approx(one * scale, rel=1e-6)


@pytest.mark.parametrize("spectrum", sorted(problems.SPECTRA))
@pytest.mark.parametrize("shape", sorted(problems.SHAPES.values()))
def test_right_is_left_of_the_transpose(rng, spectrum, shape):
    s = problems.SPECTRA[spectrum](rng, min(shape)).astype(float)
    right = predicted_threshold(s, shape, epsilon=0.5, top_k=3, side="right")
    assert right == predicted_threshold(s, shape[::-1], epsilon=0.5, top_k=3)


def test_equal_values_are_one_subspace():
    """An update of a flat square base cannot leave its span, that of a tall one can."""
    assert predicted_threshold(np.ones(40), (40, 40), epsilon=0.5, top_k=10) is None
    tall = predicted_threshold(np.ones(40), (400, 40), epsilon=0.5, top_k=10)
    # z → ∞ would give a share of 40/400; the condition 1/4 is met at a finite size.
    assert tall is not None
    assert predicted_threshold(np.ones(40), (400, 40), epsilon=0.3, top_k=10) is None
    # Told apart by more than rounding, the same values are forty vectors, which mix at once.
    apart = 1 + 1e-4 * np.linspace(1, 0, 40)
    assert predict(apart, (40, 40), epsilon=0.5, top_k=10) < 1e-2


def test_nothing_to_predict():
    for shape in ((4, 4), (9, 4)):
        assert predicted_threshold(np.zeros(4), shape, epsilon=0.5, top_k=10) is None
    assert predicted_threshold(np.ones(1), (1, 1), epsilon=0.5, top_k=10) is None
    assert predicted_threshold(np.ones(0), (0, 5), epsilon=0.5, top_k=10) is None


def test_one_value():
    """p = 1: the formula for a single value."""
    m, epsilon = 30, 0.5
    found = predicted_threshold(np.array([2.0]), (m, 1), epsilon=epsilon, top_k=10)
    z = np.linspace(2.001, 200, 400_001)
    S = z / (z**2 - 4)
    left, right = (S + (m - 1) / z) / m, S
    inside = (right / left * z**2 / m + 4) / (z**2 - 4) ** 2
    outside = right / left * (m - 1) / (m * z**2)
    intruder = inside < epsilon**2 * (inside + outside)
    assert found == pytest.approx((1 / np.sqrt(left * right))[intruder].min(), rel=1e-3)


def test_a_base_with_null_space_has_room_at_once():
    """Beyond W0's rank W1 has vectors that no base vector resembles, however small the update."""
    s = np.concatenate([np.linspace(3, 1, 6), np.zeros(6)])
    assert predict(s, (12, 12), epsilon=0.5, top_k=6) > 0.1
    assert predict(s, (12, 12), epsilon=0.5, top_k=7) < 1e-4


def test_it_falls_with_k_and_with_epsilon(rng):
    s = spiked(rng, *SQUARE)
    by_k = [predict(s, SQUARE, epsilon=0.5, top_k=k) for k in (1, 5, 20, 60)]
    by_epsilon = [predict(s, SQUARE, epsilon=e, top_k=10) for e in (0.3, 0.5, 0.7, 0.9, 1 - 1e-10)]
    assert by_k == sorted(by_k, reverse=True)
    assert by_epsilon == sorted(by_epsilon, reverse=True)
    assert by_epsilon[-1] < 1e-4 * by_epsilon[0]
