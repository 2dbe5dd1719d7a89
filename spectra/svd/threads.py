"""How many threads compute.

Problems of some dozens of columns gain nothing from a second thread, and lose what waking it takes; in the cached
engine, hundreds of times a weight.  LAPACK's decompositions of some hundreds wake their threads as often, and gain
from them only where these spin while they wait, which costs every neighbour (:mod:`spectra.runs.neighbours`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor

ALONE = 640  # columns, up to which one thread decomposes
SIDE_BY_SIDE = 2048  # columns, up to which two decompositions share the threads instead of taking turns

First = TypeVar("First")
Second = TypeVar("Second")


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """torch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(size: int) -> AbstractContextManager[None]:
    """As many as decompose a matrix of that size well: one, or all there are."""
    return using_threads(1 if size <= ALONE else torch.get_num_threads())


def both(
    first: Callable[[], First], second: Callable[[], Second], W: Tensor, *, alone: bool = False
) -> tuple[First, Second]:
    """The results of two decompositions of the size of W: up to ``SIDE_BY_SIDE`` at once, with half the threads each.

    With ``alone`` the second takes no time, and the first gets all threads.  An error of the first comes before one of
    the second.
    """
    if alone or min(W.shape) > SIDE_BY_SIDE or W.device.type != "cpu" or torch.get_num_threads() < 2:
        return first(), second()
    with using_threads(torch.get_num_threads() // 2), ThreadPoolExecutor(1) as pool:
        later = pool.submit(second)
        return first(), later.result()
