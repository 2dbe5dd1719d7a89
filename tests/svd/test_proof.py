"""Every engine against the definition on 1,000 random and adversarial matrices.

``python -m benchmarks proof`` does it on 10,000.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import proof
from spectra.svd import certificate
from spectra.svd.matching import BORDERLINE


def test_a_thousand_matrices():
    by_itself: Counter[str] = Counter()
    problems: list[str] = []
    vectors = intruders = 0
    for outcome in proof.outcomes(seed=0, trials=1_000, large=0, workers=1):
        by_itself.update(outcome.by_itself)
        problems += outcome.problems
        vectors += outcome.vectors
        intruders += outcome.intruders
    assert not problems, "\n".join(problems[:5])
    assert vectors > 8_000
    assert intruders > 1_500
    # Too few that an engine decided by itself would prove nothing about it.
    assert by_itself["krylov"] > 50
    assert by_itself["krylov, one space"] > 50
    assert by_itself["cached"] > 300
    assert by_itself["cached, float32 first"] > 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_isolation", lambda self, chosen: chosen + torch.inf),  # every Ritz value stands for one singular vector
        ("_leading_sines", lambda self: 0 * self.theta),  # every one of W0 is exact
        ("_are_certified", lambda self, open_ones, floor: True),  # what is open is an intruder
    ],
)
def test_a_broken_certificate_does_not_pass(monkeypatch, name, value):
    monkeypatch.setattr(certificate.Certificate, name, value)
    outcomes = (proof.prove(1, trial) for trial in range(600))
    assert any(outcome.problems for outcome in outcomes)


def test_the_margin_around_epsilon_is_wider_than_what_is_not_asked():
    assert proof.UNDECIDABLE < proof.SLACK < BORDERLINE
    assert np.isclose(certificate.DIRECTION_ERROR, 0.02)
