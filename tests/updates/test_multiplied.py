"""Weights that are multiplied: what of a scaled one counts as unchanged."""

from __future__ import annotations

import torch

from spectra.updates.algebra import LowRank, RowScaled, Scaled, merged
from spectra.updates.multiplied import Normed


def test_only_scales_from_norms_are_unchanged_up_to_rounding():
    torch.manual_seed(0)
    W0 = torch.randn(6, 5)
    nearly = torch.ones(6, dtype=torch.float64)
    assert Scaled(rows=nearly).tuned(W0).is_unchanged()
    nearly[2] += 5e-7
    ia3 = Scaled(rows=nearly).tuned(W0)
    assert not ia3.is_unchanged()
    nothing = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    norms = W0.double().norm(dim=1) * nearly
    dora = RowScaled(*nothing, 1.0, norms).tuned(W0)
    assert dora.is_unchanged()
    assert Normed(LowRank(*nothing, 1.0), norms).tuned(W0).is_unchanged()
    assert merged(W0, [(0.5, dora), (0.5, dora)]).is_unchanged()
    assert not merged(W0, [(0.5, dora), (0.5, ia3)]).is_unchanged()
