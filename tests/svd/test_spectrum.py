"""What of a spectrum counts as one value, and what as zero."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.svd import clusters, numerical_rank
from spectra.svd.spectrum import EPS32
from tests.support import reference


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
