"""Negative and positive controls: no false intruders where nothing is new, none missed where it is."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from spectra.analysis.layer import find_intruders
from tests.support import problems

SHAPES = [(48, 48), (64, 32), (32, 64), (24, 24), (33, 31)]


def rotated_inside_clusters(rng, m, n):
    """The same matrix twice, its clusters' vectors turned among themselves the second time.

    Singular values in a cluster differ by less than rounding, so both are "the same" weight, but
    one by one no vector of the second need resemble any of the first.
    """
    p = min(m, n)
    sizes: list[int] = []
    while sum(sizes) < p:
        sizes.append(int(min(rng.integers(1, 9), p - sum(sizes))))
    s = np.repeat(np.arange(len(sizes), 0, -1.0), sizes)
    U, V = problems.orthonormal(rng, m, p), problems.orthonormal(rng, n, p)
    turn = scipy.linalg.block_diag(*(problems.orthonormal(rng, size, size) for size in sizes))
    jitter = 1 + 2e-8 * rng.uniform(-1, 1, size=p)
    return (U * s) @ V.T, (U @ turn * (s * jitter)) @ (V @ turn).T


KINDS = ("tiny update", "rounding to float32", "rounding in float32", "rotation inside clusters")


def null_pair(trial):
    """(W0, W1, side): the same weight twice, up to rounding or a rotation inside clusters."""
    rng = np.random.default_rng([99, trial])
    m, n = SHAPES[rng.integers(len(SHAPES))]
    side = ("left", "right")[rng.integers(2)]
    kind = KINDS[trial % len(KINDS)]
    if kind == "rotation inside clusters":
        return *rotated_inside_clusters(rng, m, n), side
    W0 = problems.matrix(rng, sorted(problems.SPECTRA)[rng.integers(len(problems.SPECTRA))], (m, n))
    if kind == "tiny update":
        direction = np.outer(rng.normal(size=m), rng.normal(size=n))
        return W0, W0 + 1e-8 * np.linalg.norm(W0, 2) * direction / np.linalg.norm(direction), side
    if kind == "rounding to float32":
        return W0, W0.astype(np.float32).astype(np.float64), side
    W0 = W0.astype(np.float32)
    return W0, (W0 * np.float32(1.1)) / np.float32(1.1), side


def test_no_false_intruder_in_a_thousand_null_trials():
    for trial in range(1000):
        W0, W1, side = null_pair(trial)
        found = find_intruders(W0, W1, side=side)
        assert found.intruders == (), f"trial {trial}"


def test_the_plain_definition_fails_these_trials():
    """What the controls are for: without care for clusters the paper's script flags rotations."""
    from tests.support.reference import paper_count

    rotations = [null_pair(trial) for trial in range(3, 200, 4)]
    assert sum(paper_count(W0, W1, 10, 0.5) for W0, W1, _ in rotations) > 0


def test_every_planted_intruder_is_found():
    for trial in range(200):
        rng = np.random.default_rng([7, trial])
        shape = [(96, 96), (128, 64), (64, 128)][trial % 3]
        W0, W1, index = problems.planted(rng, shape, cosine=rng.uniform(0.2, 0.499), sigma=5.0)
        assert index in find_intruders(W0, W1).intruders, f"trial {trial}"


def test_no_planted_non_intruder_is_flagged():
    for trial in range(200):
        rng = np.random.default_rng([8, trial])
        shape = [(96, 96), (128, 64), (64, 128)][trial % 3]
        W0, W1, index = problems.planted(rng, shape, cosine=rng.uniform(0.501, 0.99), sigma=5.0)
        assert index not in find_intruders(W0, W1).intruders, f"trial {trial}"
