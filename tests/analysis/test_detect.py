"""What is called noise: the floor of random vectors against simulation, and bases that were not trained."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.analysis.detect import is_noise_like, random_floor
from tests.support import problems


@pytest.mark.parametrize(("dimension", "count"), [(16, 16), (64, 64), (768, 768), (3072, 768)])
def test_random_floor_against_simulation(dimension, count):
    rng = np.random.default_rng(1)
    y = rng.normal(size=(2000, dimension))
    cosines = np.abs(y[:, :count]).max(1) / np.linalg.norm(y, axis=1)
    assert random_floor(dimension, count) == pytest.approx(cosines.mean(), rel=0.02)


def test_random_floor_at_the_ends():
    assert random_floor(1, 1) == pytest.approx(1.0)
    assert random_floor(8, 0) == 0.0
    assert random_floor(4096, 4096) == pytest.approx(0.06, abs=0.003)


def norms(W):
    return float(np.linalg.norm(W)), float(np.linalg.norm(W, 2))


def test_noise_like_bases_are_told_from_trained_ones(rng):
    for shape in ((64, 64), (300, 100), (33, 200)):
        for _ in range(20):
            W = rng.normal(size=shape)
            assert is_noise_like(shape, *norms(W))
        W = problems.trained_like(rng, *shape)
        assert not is_noise_like(shape, *norms(W))
    small = rng.normal(size=(16, 16))
    assert not is_noise_like((16, 16), *norms(small)), "too small to tell"
    assert not is_noise_like((64, 64), 0.0, 0.0)
