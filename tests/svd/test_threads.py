"""How many threads compute."""

from __future__ import annotations

import pytest
import torch

from spectra.svd.decompose import decompose, eigh, singular_values
from spectra.svd.threads import ALONE, using_threads

DECOMPOSITIONS = {
    "eigh": lambda W: eigh(W @ W.T),
    "svd": lambda W: decompose(W),
    "svdvals": lambda W: singular_values(W),
}


@pytest.fixture
def seen(monkeypatch):
    """The numbers of threads with which torch's routines were called."""
    numbers = []
    for name in ("eigh", "svd", "svdvals"):
        original = getattr(torch.linalg, name)

        def counted(*args, original=original, **options):
            numbers.append(torch.get_num_threads())
            return original(*args, **options)

        monkeypatch.setattr(torch.linalg, name, counted)
    return numbers


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_one_thread_decomposes_a_small_matrix_and_all_of_them_a_large_one(name, seen):
    with using_threads(3):
        DECOMPOSITIONS[name](torch.eye(ALONE, dtype=torch.float64))
        DECOMPOSITIONS[name](torch.eye(ALONE + 1, dtype=torch.float64))
        assert torch.get_num_threads() == 3
    assert seen == [1, 3]


def test_the_number_of_threads_comes_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
