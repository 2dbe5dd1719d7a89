"""What a base is asked for without a decomposition."""

from __future__ import annotations

import numpy as np
import torch

from spectra.svd import Base
from tests.support import problems


def test_what_lies_below_the_floor_is_proven(rng):
    W = torch.from_numpy(problems.with_spectrum(rng, 60, 90, np.linspace(2, 0.5, 60))[0]).float()
    for W0 in (W, W.T):
        base = Base(W0, "left")
        assert base.has_no_eigenvalue_below(0.2)
        assert not base.has_no_eigenvalue_below(0.3)
