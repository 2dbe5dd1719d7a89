"""How many threads compute."""

from __future__ import annotations

import threading

import pytest
import torch

from spectra.svd.decompose import decompose, eigh, singular_values
from spectra.svd.threads import ALONE, SIDE_BY_SIDE, both, using_threads

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


def names_of_threads(size, alone=False):
    """(threads of torch's, the thread itself) as both decompositions see them."""

    def seen():
        return torch.get_num_threads(), threading.current_thread()

    return both(seen, seen, torch.empty(size, size), alone=alone)


def test_two_decompositions_share_the_threads_up_to_a_size():
    with using_threads(4):
        (first, here), (second, elsewhere) = names_of_threads(SIDE_BY_SIDE)
        assert (first, second) == (2, 2)
        assert here is threading.current_thread()
        assert elsewhere is not here
        assert torch.get_num_threads() == 4
        for size, alone in ((SIDE_BY_SIDE + 1, False), (8, True)):
            assert names_of_threads(size, alone) == ((4, here), (4, here))
    with using_threads(1):
        assert names_of_threads(8) == ((1, here), (1, here))


def test_the_first_error_is_the_first_ones():
    def fails(kind):
        def failing():
            raise kind

        return failing

    with using_threads(2):
        for first, second, kind in (
            (fails(KeyError), fails(ValueError), KeyError), (lambda: 1, fails(ValueError), ValueError),
        ):  # fmt: skip
            with pytest.raises(kind):
                both(first, second, torch.empty(8, 8))
