"""W1 as another library makes it of W0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectra.updates.algebra import DenseWeight, computed


@dataclass(frozen=True, eq=False)
class Merging:
    """W1 = merge(W0): both (m, n), W0 in the working dtype and W1 in float64."""

    merge: Callable[[Tensor], Tensor]

    def tuned(self, W0: Tensor) -> DenseWeight:
        W1 = self.merge(W0)
        return computed(W0, lambda rows: W1[rows])
