"""What follows from singular values alone, at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.records.energy import norm_fro


def test_a_norm_does_not_underflow():
    assert norm_fro(np.array([3e-200, 4e-200])) == pytest.approx(5e-200)
    assert norm_fro(np.zeros(2)) == 0
