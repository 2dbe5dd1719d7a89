"""Random updates of a report's layers, within a share of the audit's own work."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import spectra
from spectra.analysis.chance import Chance, RandomUpdates
from spectra.errors import ConvergenceError
from spectra.runs import chance
from spectra.runs.chance import facts_of, seconds_of, with_chance
from spectra.runs.options import AuditOptions, defaults_of
from spectra.runs.settings import checked_settings
from tests.support.figures import layer
from tests.support.paths import FIXTURES
from tests.support.problems import literal_null_counts

SETTINGS = checked_settings(**defaults_of(AuditOptions))
UPDATES = RandomUpdates(np.arange(1.0, 61) ** -0.5, np.array([1.5, 1.0]), (60, 80), 1, estimated=False)


def layers_of(count, **changes):
    named = {f"layers.{i}.q": layer(f"layers.{i}.q", np.linspace(0.4, 1, 10), **changes) for i in range(count)}
    return {name: replace(one, expected_by_chance=facts_of(Chance(open=UPDATES), None)) for name, one in named.items()}


def open_ones(layers):
    return {name: replace(UPDATES, seed=i * 7919 % 1000) for i, name in enumerate(layers)}


def fact(one):
    assert one.expected_by_chance is not None
    return one.expected_by_chance


def facts(chance, null=None):
    found = facts_of(chance, null)
    assert found is not None
    return found


def drawn(layers):
    return {name: fact(one)["counts"] for name, one in layers.items() if fact(one)["counts"]}


def test_few_layers_get_many_draws(monkeypatch):
    monkeypatch.setattr(chance, "AT_LEAST", 1e3)
    layers = layers_of(3)
    found = drawn(with_chance(layers, open_ones(layers), SETTINGS))
    assert [len(counts) for counts in found.values()] == [chance.MOST] * 3
    for name, counts in found.items():
        assert counts == open_ones(layers)[name].counts(SETTINGS.question, chance.MOST).tolist()


def test_many_layers_share_what_there_is(monkeypatch):
    """Two draws each, of a choice of layers that does not depend on their order."""
    layers = layers_of(40, engine="exact", shape=(60, 80))
    monkeypatch.setattr(chance, "AT_LEAST", 0.0)
    monkeypatch.setattr(chance, "SHARE", 40.01 * UPDATES.seconds / sum(map(seconds_of, layers.values())))
    updates = open_ones(layers)
    after = with_chance(layers, updates, SETTINGS)
    assert list(after) == list(layers)
    found = drawn(after)
    assert {len(counts) for counts in found.values()} == {2}
    assert len(found) == 20
    assert {fact(one)["how"] for one in after.values()} == {"drawn", "left_out"}
    turned = dict(reversed(layers.items()))
    assert drawn(with_chance(turned, updates, SETTINGS)) == found
    for threads, workers in ((1, 1), (4, 2)):
        assert drawn(with_chance(layers, updates, replace(SETTINGS, threads=threads, workers=workers))) == found


def test_one_draw_may_be_too_much(monkeypatch):
    layers = layers_of(2)
    monkeypatch.setattr(chance, "AT_LEAST", 0.0)
    monkeypatch.setattr(chance, "SHARE", 1e-9)
    after = with_chance(layers, open_ones(layers), SETTINGS)
    assert {fact(one)["how"] for one in after.values()} == {"left_out"}


def test_noise_like_layers_are_not_drawn():
    layers = layers_of(2, noise_like_base=True)
    after = with_chance(layers, open_ones(layers), SETTINGS)
    assert {fact(one)["how"] for one in after.values()} == {"unknown"}


def test_a_draw_that_does_not_converge_is_said(monkeypatch):
    def fails(*_, **__):
        raise ConvergenceError("no luck")

    monkeypatch.setattr("spectra.analysis.chance.null_counts", fails)
    layers = layers_of(1)
    (found,) = with_chance(layers, open_ones(layers), SETTINGS).values()
    assert fact(found)["how"] == "unknown"
    assert "no luck" in fact(found)["reason"]


def test_facts_before_anything_is_drawn():
    assert facts_of(None, None) is None
    assert facts(Chance(below=True))["how"] == "below"
    assert facts(Chance(open=UPDATES))["reason"] == "no random updates were drawn"
    assert facts_of(Chance(reason="none"), None) == {
        "how": "unknown", "counts": [], "spectrum": None, "reason": "none"
    }  # fmt: skip
    of_comparison = facts(Chance(open=UPDATES), {"drawn": True, "counts": [1, 2]})
    assert (of_comparison["how"], of_comparison["counts"]) == ("drawn", [1, 2])


@pytest.mark.parametrize("name", ["lora-r4", "full"])
def test_fixtures_against_literal_random_updates(name):
    """The mean over all layers is that of updates made and decomposed one by one, within three standard errors."""
    report = spectra.audit(FIXTURES / name, FIXTURES / "base", cache=False)
    expected = report.expected_by_chance
    assert expected.intruders is not None
    assert expected.error is not None
    totals = np.zeros(4)
    for one in spectra.layer_spectra(FIXTURES / name, FIXTURES / "base", size=1):
        rng = np.random.default_rng([3, len(one.name)])
        totals += literal_null_counts(
            rng, one.base_values, one.shape, one.update_values, SETTINGS.question, totals.size
        )
    error = np.hypot(expected.error, totals.std(ddof=1) / np.sqrt(totals.size))
    assert abs(expected.intruders - totals.mean()) <= 3 * error + 0.3


def test_a_resumed_run_draws_the_same(tmp_path):
    """What random updates are drawn from is in the journal."""
    whole = spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base", cache=False)
    journal = tmp_path / "run.jsonl"
    spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base", cache=False, resume=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert any(item[2] for line in lines[1:] for item in json.loads(line)["layers"])
    journal.write_bytes(b"".join(lines[:9]))
    resumed = spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base", cache=False, resume=journal, workers=2)
    assert resumed.to_json(canonical=True) == whole.to_json(canonical=True)
    assert whole.expected_by_chance.draws >= 2
