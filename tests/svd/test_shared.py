"""One space for both weights: the two processes' verdicts, and the definition's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd import Base, Question, krylov, shared
from spectra.svd.lanczos import Turned
from spectra.updates.algebra import Dense, LowRank
from tests.support import problems, reference


@pytest.fixture
def everywhere(monkeypatch, small_scale):
    """Lets one space try itself on matrices of any size and updates of any strength."""
    limits = {"PAYS": 0, "FAINT": np.inf, "FIRST_STEPS": 2, "LARGEST_SHARE": 1.0}
    for name, value in limits.items():
        monkeypatch.setattr(shared, name, value)


def problem(rng, shape, strength, rank=2):
    m, n = shape
    spectrum = np.concatenate([np.linspace(9, 5, 8), np.linspace(2, 0.8, min(shape) - 8)])
    W0 = problems.with_spectrum(rng, m, n, spectrum)[0]
    B, A = strength * problems.orthonormal(rng, m, rank), problems.orthonormal(rng, n, rank).T
    return torch.from_numpy(W0).float(), torch.from_numpy(B), torch.from_numpy(A)


@pytest.mark.parametrize("shape", [(96, 96), (72, 120), (120, 72)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strength", [0.5, 7.0])
def test_its_bounds_hold_the_values_of_the_definition(rng, everywhere, shape, side, strength):
    W0, B, A = problem(rng, shape, strength)
    tuned = LowRank(B, A, 1.0).tuned(W0)
    base, question = Base(W0, side), Question(5, 0.5, side)
    found = shared.certified_together(base, Turned(tuned, base.short == "left"), question)
    assert found is not None
    expected = reference.max_cosines(W0.double().numpy(), (W0.double() + B @ A).numpy(), 5, side)
    for match, value in zip(found.matches(), expected, strict=True):
        assert value is not None
        assert match.bounds[0] - 1e-5 <= value <= match.bounds[1] + 1e-5
        assert not match.bounds[0] < 0.5 <= match.bounds[1], "it is decided"


def test_factors_that_are_zero_or_dependent_do_no_harm(rng, everywhere):
    W0, B, A = problem(rng, (96, 96), 12.0)
    zeros = torch.zeros(96, 1, dtype=torch.float64)
    wide = torch.cat([B, B[:, :1], zeros], 1), torch.cat([A, 0 * A[:1], zeros.T])
    verdicts = []
    for left, right in ((B, A), wide):
        tuned = LowRank(left, right, 1.0).tuned(W0)
        answer = krylov.certified(Base(W0), tuned, Question(5))
        assert answer is not None
        verdicts.append([match.bounds[1] < 0.5 for match in answer.matches])
    assert verdicts[0] == verdicts[1]
    assert any(verdicts[0])


def test_it_is_taken_for_faint_updates_that_fit_in_a_block(rng, monkeypatch):
    monkeypatch.setattr(shared, "PAYS", 64)
    W0, B, A = problem(rng, (96, 96), 0.5)
    base = Base(W0)
    assert shared.pays(base, Turned(LowRank(B, A, 1.0).tuned(W0), True))
    assert not shared.pays(base, Turned(LowRank(100 * B, A, 1.0).tuned(W0), True)), "strong"
    wide = LowRank(torch.cat([B] * 11, 1), torch.cat([A] * 11), 1e-3)
    assert not shared.pays(base, Turned(wide.tuned(W0), True)), "22 factors, 44 columns and random ones"
    assert not shared.pays(base, Turned(Dense(W0).tuned(W0), True)), "no factors"
    monkeypatch.setattr(shared, "PAYS", 97)
    assert not shared.pays(base, Turned(LowRank(B, A, 1.0).tuned(W0), True)), "small"
