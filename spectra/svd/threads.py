"""How many threads compute.

Problems of some dozens of columns gain nothing from a second thread, and lose what waking it takes; in the cached
engine, hundreds of times a weight.  LAPACK's decompositions of some hundreds wake their threads as often, and gain
from them only where these spin while they wait, which costs every neighbour (:mod:`spectra.runs.neighbours`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

ALONE = 640  # columns, up to which one thread decomposes


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
