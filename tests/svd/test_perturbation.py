"""Bounds on the angles of Ritz vectors: never below the angle, and sharper than residual over gap."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.svd.perturbation import direction_bounds


def ritz_problem(rng):
    """(eigenvalues, eigenvectors, θ, Y, residuals): the leading ones as a disturbed subspace sees them."""
    p = int(rng.integers(8, 60))
    eigenvalues = np.abs(rng.normal(size=p)) ** rng.uniform(0.5, 3)
    if rng.random() < 0.3:  # two that are close
        eigenvalues[1] = eigenvalues[0] * (1 - 10 ** rng.uniform(-6, -1))
    eigenvalues = np.sort(eigenvalues)[::-1]
    X = np.linalg.qr(rng.normal(size=(p, p)))[0]
    M = X * eigenvalues @ X.T
    size = int(rng.integers(3, min(p - 1, 18)))
    noise = 10 ** rng.uniform(-5, -0.3) * 10 ** rng.uniform(-2, 0, size=size)
    Z = np.linalg.qr(X[:, :size] + noise * rng.normal(size=(p, size)))[0]
    theta, mixed = np.linalg.eigh(Z.T @ M @ Z)
    theta, Y = theta[::-1], Z @ mixed[:, ::-1]
    return eigenvalues, X, theta, Y, np.linalg.norm(M @ Y - Y * theta, axis=0)


def angle(x, y):
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.linalg.norm(y - x * (x @ y)))


@pytest.mark.parametrize("long", [False, True])
def test_no_angle_exceeds_its_bound(rng, long):
    informative = 0
    for trial in range(600):
        eigenvalues, X, theta, Y, residuals = ritz_problem(rng)
        k = int(rng.integers(1, theta.size - 1))
        if (eigenvalues[k : theta.size] > (theta + residuals)[k:]).any():
            continue  # one was missed, which the bound takes for granted
        turn = np.sqrt(eigenvalues)[:, None] * X.T if long else np.eye(X.shape[0])
        bounds = direction_bounds(theta, residuals, k, long=long)
        for j in range(k):
            assert angle(turn @ X[:, j], turn @ Y[:, j]) <= bounds[j] + 1e-7, f"trial {trial}, vector {j}"
        informative += int((bounds < 1).sum())
    assert informative > 1000


def test_small_gaps_among_the_leading_values_count_by_the_second_order(rng):
    """Ten values 0.3 % apart with a bulk far below: the usual bound divides by the small gaps."""
    eigenvalues = np.concatenate([1 - 0.003 * np.arange(12), np.linspace(0.5, 0, 60)])
    X = np.linalg.qr(rng.normal(size=(72, 72)))[0]
    M = X * eigenvalues @ X.T
    Z = np.linalg.qr(X[:, :16] + 1e-4 * rng.normal(size=(72, 16)))[0]
    theta, mixed = np.linalg.eigh(Z.T @ M @ Z)
    theta, Y = theta[::-1], Z @ mixed[:, ::-1]
    residuals = np.linalg.norm(M @ Y - Y * theta, axis=0)
    bounds = direction_bounds(theta, residuals, 10)
    assert bounds.max() < 0.05 * (residuals / 0.003).max()
    assert all(angle(X[:, j], Y[:, j]) <= bounds[j] for j in range(10))


def test_what_cannot_be_told_is_one():
    assert direction_bounds(np.array([1.0, 1.0, 0.5]), np.array([1e-3, 1e-3, 1e-3]), 1).tolist() == [1.0], "a tie"
    assert direction_bounds(np.zeros(4), np.zeros(4), 2).tolist() == [1.0, 1.0], "no gap anywhere"
    assert direction_bounds(np.array([2.0, 1.0]), np.array([0.9, 0.9]), 1).tolist() == [1.0], "large residuals"
    assert direction_bounds(np.array([2.0, 1.0]), np.array([0.0, 0.0]), 1).tolist() == [0.0], "exact"
