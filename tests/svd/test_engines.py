"""Every engine's answer against the literal float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.svd import ENGINES, Base, Question, choose_engine
from tests.support import problems, reference
from tests.support.updates import updates


@pytest.mark.parametrize("kind", ["low rank", "row scaled", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
@pytest.mark.parametrize("spectrum", problems.SPECTRA)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_agrees_with_the_definition(rng, engine, spectrum, shape, side, kind):
    W0 = problems.matrix(rng, spectrum, shape).astype(np.float32)
    update, W1 = updates(rng, W0, kind)
    tuned = update.tuned(torch.from_numpy(W0))
    expected = reference.max_cosines(W0, W1, 10, side)
    for epsilon in (0.3, 0.5, 0.7):
        question = Question(10, epsilon, side)
        comparison = choose_engine(engine).compare(Base(torch.from_numpy(W0), side), tuned, question)
        assert len(comparison.matches) == len(expected)
        for match, value in zip(comparison.matches, expected, strict=True):
            if value is None:
                assert "null_space" in match.flags
                continue
            assert match.max_cosine is not None
            lower, upper = match.bounds
            assert lower - 1e-9 <= value <= upper + 1e-9, "the bounds must enclose the exact value"
            assert (match.max_cosine < epsilon) == (value < epsilon)
            assert abs(match.max_cosine - value) <= max(1e-4, upper - lower)
