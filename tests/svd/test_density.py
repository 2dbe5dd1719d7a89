"""Singular values estimated from a Lanczos process."""

from __future__ import annotations

import numpy as np
import torch

from spectra.svd.density import LEADING, LEAST, estimated_values


def test_all_ritz_values_with_equal_weights_are_the_spectrum():
    s = np.linspace(5, 0.1, 90)
    found = estimated_values(torch.from_numpy(s**2), torch.ones(90), 90, float(np.linalg.norm(s)))
    assert found is not None
    np.testing.assert_allclose(found, s, rtol=1e-12)


def test_weights_say_how_many_values_a_ritz_value_stands_for():
    """Forty leading and sparse bulk values, of which one stands for three quarters."""
    lead = np.linspace(9, 7, LEADING)
    bulk = np.linspace(3, 1, LEAST)
    weights = np.full(LEADING + LEAST, 1.0)
    weights[LEADING:] = 0.25 / (LEAST - 1)
    weights[LEADING + 3] = 0.75
    values = torch.from_numpy(np.concatenate([lead, bulk]) ** 2)
    p = LEADING + 1000
    free = estimated_values(values, torch.from_numpy(weights), p, 0.0)  # no norm to fit
    assert free is not None
    assert free.shape == (p,)
    assert (np.diff(free) <= 0).all()
    np.testing.assert_allclose(free[:LEADING], lead)
    middle = np.count_nonzero(np.abs(free[LEADING:] - bulk[3]) < 0.2)
    assert 500 < middle < 900
    size = 1.02 * float(np.linalg.norm(free))
    fitted = estimated_values(values, torch.from_numpy(weights), p, size)
    assert fitted is not None
    np.testing.assert_allclose(np.linalg.norm(fitted), size, rtol=1e-12)
    np.testing.assert_allclose(fitted[:LEADING], lead)


def test_a_short_process_says_nothing():
    for d in (1, LEADING, LEADING + LEAST - 1):
        values = torch.linspace(3, 1, d, dtype=torch.float64)
        assert estimated_values(values, torch.ones(d), 400, 1.0) is None
    values = torch.linspace(3, 1, 60, dtype=torch.float64)
    assert estimated_values(values, torch.zeros(60), 400, 1.0) is None
    assert estimated_values(values, torch.ones(60), 2 * LEADING - 1, 1.0) is None


def test_values_never_rise_above_those_before():
    """However large the norm to fit."""
    values = torch.from_numpy(np.linspace(3, 1, 60) ** 2)
    found = estimated_values(values, torch.ones(60), 400, 1e4)
    assert found is not None
    assert (np.diff(found) <= 1e-12).all()
