"""What is known of a layer's intruders by chance before any random update is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from spectra.analysis.chance import FAINT, MIXED, RandomUpdates, chance_of, is_faint, threshold_of, vectors_mixed
from spectra.analysis.layer import find_intruders
from spectra.analysis.null import null_counts
from spectra.analysis.threshold import predicted_threshold
from spectra.svd import Answer, Base, Question, choose_engine
from spectra.updates.algebra import LowRank

QUESTION = Question()


def power_law(p, exponent=0.7):
    return np.arange(1.0, p + 1) ** -exponent


def threshold(s, shape, top_k=10):
    """Where there is one."""
    found = predicted_threshold(s, shape, epsilon=0.5, top_k=top_k)
    assert found is not None
    return found


def answer(**known):
    return Answer((), "exact", 1.0, 0.0, 0.0, False, (), **known)


def mixed_plainly(s, shape, size, side, top_k):
    """The docstring's sum, term by term."""
    m, n = shape
    dimension, largest = (m if side == "left" else n), 0.0
    for i in range(min(top_k, s.size)):
        mixed = max(dimension - s.size, 0) * size**2 / (m * n) / s[i] ** 2
        for j in range(s.size):
            if j != i:
                gap = s[i] ** 2 - s[j] ** 2
                square = size**2 / (m * n) * (s[i] ** 2 + s[j] ** 2) / gap**2 if gap else np.inf
                mixed += min(square, 1.0)
        largest = max(largest, mixed)
    return largest


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_mixed(rng, shape, side):
    s = np.sort(rng.uniform(0.1, 3, size=min(shape)))[::-1].copy()
    s[4] = s[3]  # a tie mixes as equals
    for size in (1e-3, 0.3, 4.0):
        found = vectors_mixed(s, shape, size, Question(10, 0.5, side))
        assert found == pytest.approx(mixed_plainly(s, shape, size, side, 10), rel=1e-10)
        assert vectors_mixed(1e-150 * s, shape, 1e-150 * size, Question(10, 0.5, side)) == pytest.approx(found)


def test_first_order_is_what_small_random_updates_do(rng):
    """The squares that a leading vector takes up from others, on average over random updates."""
    m, n, size, draws = 24, 18, 0.02, 400
    s = np.linspace(3, 1, n)
    W0 = np.zeros((m, n))
    np.fill_diagonal(W0, s)
    taken = np.zeros(3)
    for _ in range(draws):
        R = rng.normal(size=(m, n))
        U = np.linalg.svd(W0 + size * R / np.linalg.norm(R))[0][:, :3]
        taken += 1 - U[np.arange(3), np.arange(3)] ** 2
    expected = [
        mixed_plainly(np.concatenate([s[i : i + 1], np.delete(s, i)]), (m, n), size, "left", 1) for i in range(3)
    ]
    assert taken / draws == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("p", [128, 200])
@pytest.mark.parametrize("rank", [1, 8, 48])
def test_faint_random_updates_have_no_intruder(p, rank):
    """And the rule is no empty one: of rank 1, updates just below a third of the threshold are faint."""
    found = 0
    for trial, exponent in enumerate((0.5, 0.9)):
        s, shape = power_law(p, exponent), (p, p + 30 * trial)
        theta = threshold(s, shape)
        for part in (0.1, 0.2, 0.33):
            sigma = np.full(rank, part * theta)
            if is_faint(s, shape, float(np.linalg.norm(sigma)), float(sigma[0]), theta, QUESTION):
                found += 1
                assert not null_counts(s, shape, sigma, QUESTION, draws=15, seed=trial).any()
    assert found >= (6 if rank == 1 else 1) or rank == 48


def test_in_small_weights_nothing_is_taken_for_granted():
    """There a faint update of rank 1 has an intruder now and then."""
    s = power_law(48, 0.5)
    theta = threshold(s, (48, 48))
    sigma = np.array([0.33 * theta])
    assert vectors_mixed(s, (48, 48), float(sigma[0]), QUESTION) < MIXED
    assert not is_faint(s, (48, 48), float(sigma[0]), float(sigma[0]), theta, QUESTION)
    assert null_counts(s, (48, 48), sigma, QUESTION, draws=40, seed=0).any()


def test_small_updates_of_high_rank_are_not_faint():
    """Many values below a third of the threshold have intruders all the same: they mix neighbours."""
    s = power_law(128, 0.4)
    theta = threshold(s, (128, 128))
    sigma = np.full(128, 0.33 * theta)
    assert vectors_mixed(s, (128, 128), float(np.linalg.norm(sigma)), QUESTION) > MIXED
    assert not is_faint(s, (128, 128), float(np.linalg.norm(sigma)), float(sigma[0]), theta, QUESTION)
    assert null_counts(s, (128, 128), sigma, QUESTION, draws=10, seed=0).any()


def test_what_is_faint():
    s = power_law(200)
    theta = threshold(s, (200, 200))
    assert is_faint(s, (200, 200), 0.0, 0.0, None, QUESTION), "no update at all"
    assert not is_faint(s, (200, 200), 0.1, 0.1, None, QUESTION), "without a theta nothing is known"
    assert not is_faint(s, (200, 200), FAINT * theta, FAINT * theta, theta, QUESTION)
    assert is_faint(s, (200, 200), 1e-3 * theta, 1e-3 * theta, theta, QUESTION)


def test_each_state_of_a_layer():
    s = power_law(150)
    shape, large, small = (150, 150), np.full(4, 5.0), np.full(4, 1e-3)

    def state(known, sigma, values=True):
        size, top = float(np.linalg.norm(sigma)), float(sigma[0])
        return chance_of(answer(**known), shape, size, top, sigma if values else None, QUESTION, 7)

    theta = threshold(s, shape)
    below = state({"base_values": s}, small)
    assert (below.below, below.open, below.reason, below.threshold) == (True, None, None, theta)
    drawn = state({"base_values": s}, large)
    assert drawn.open is not None
    assert (drawn.below, drawn.open.seed, drawn.open.estimated) == (False, 7, False)
    estimated = state({"estimated_values": s * 1.01}, large)
    assert estimated.open is not None
    assert estimated.open.estimated
    assert estimated.threshold == pytest.approx(1.01 * theta, rel=1e-3)
    assert state({"base_values": s}, large, values=False).reason == "the engine computed no spectrum of the update"
    nothing = state({}, large)
    assert nothing.threshold is nothing.open is None
    assert "no spectrum of the base" in str(nothing.reason)


def test_a_threshold_is_computed_once_for_each_spectrum(monkeypatch):
    calls = []

    def counted(s, *_, **__):
        calls.append(s)
        return 1.0

    monkeypatch.setattr("spectra.analysis.chance.predicted_threshold", counted)
    s = power_law(40) * 1.2345
    for values in (s, s, s.copy(), 2 * s):
        assert threshold_of(values, (40, 40), QUESTION) == 1.0
    threshold_of(s, (40, 41), QUESTION)
    threshold_of(s, (40, 40), Question(5))
    assert len(calls) == 4


def test_random_updates_survive_a_journal():
    updates = RandomUpdates(power_law(60), np.array([2.0, 1.0]), (60, 90), 5, estimated=True)
    again = RandomUpdates.from_dict(json.loads(json.dumps(updates.to_dict())))
    assert (again.shape, again.seed, again.estimated) == ((60, 90), 5, True)
    assert again.counts(QUESTION, 4).tolist() == updates.counts(QUESTION, 4).tolist()
    assert again.seconds == updates.seconds > 0


def test_an_audited_layer_has_its_threshold_and_its_ratio(rng):
    W0 = rng.normal(size=(80, 80)) @ np.diag(power_law(80))
    B, A = rng.normal(size=(80, 2)), rng.normal(size=(2, 80))
    found = find_intruders(W0, B=B, A=A)
    theta = threshold(np.linalg.svd(W0, compute_uv=False), (80, 80))
    sigma = np.linalg.svd(B @ A, compute_uv=False)
    assert found.measures["predicted_threshold"] == pytest.approx(theta, rel=1e-3)
    assert found.measures["update_over_threshold"] == pytest.approx(sigma[0] / theta, rel=1e-3)
    assert found.measures["values_over_threshold"] == np.count_nonzero(sigma > theta)
    flat = find_intruders(np.eye(40), B=B[:40], A=A[:, :40])
    assert flat.measures["predicted_threshold"] is None, "no size brings one"
    assert flat.measures["update_over_threshold"] is flat.measures["values_over_threshold"] is None


def test_krylov_estimates_what_the_others_compute(rng):
    """The theta from its Lanczos process, for an update that it decides by certificates."""
    p, asked = 600, Question(4)
    s = np.concatenate([[9.0, 7.5, 6.0, 4.5], np.linspace(2, 0.2, p - 4)])
    Q, R = (np.linalg.qr(rng.normal(size=(p, p)))[0] for _ in range(2))
    W0 = torch.from_numpy(Q * s @ R.T).float()
    B, A = torch.from_numpy(rng.normal(size=(p, 4))), torch.from_numpy(rng.normal(size=(4, p)))
    for scale in (1e-5, 1e-2):
        tuned = LowRank(B, A, scale).tuned(W0)
        found = choose_engine("krylov").compare(Base(W0), tuned, asked)
        assert found.engine == "krylov"
        assert found.base_values is None
        estimate = found.estimated_values
        assert estimate is not None
        assert estimate.shape == (p,)
        assert estimate[:4] == pytest.approx(s[:4], rel=1e-3)
        assert np.linalg.norm(estimate) == pytest.approx(np.linalg.norm(s), rel=1e-3)
        estimated, known = (threshold(v, (p, p), top_k=4) for v in (estimate, s))
        assert estimated == pytest.approx(known, rel=0.03)
