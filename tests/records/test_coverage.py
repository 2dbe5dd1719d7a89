"""Updates of a fine-tune counted by what became of them."""

from __future__ import annotations

import pytest

from spectra.records.coverage import KINDS, coverage_of, unseen_in


def item(kind, parameters=5, name="a"):
    return {"name": name, "reason": "why", "kind": kind, "parameters": parameters}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_counted(kind):
    coverage = coverage_of([10, 20], [], [item(kind)])
    assert (coverage.found, coverage.analysed, getattr(coverage, kind)) == (3, 2, 1)
    assert coverage.is_partial == (kind in ("not_placed", "not_read"))
    assert coverage.share_of_parameters == pytest.approx(30 / 35)


def test_what_is_no_update_does_not_count():
    coverage = coverage_of([10], [], [item("no_update"), {"name": "of an earlier version", "reason": "why"}])
    assert coverage.found == 1
    assert coverage.share_of_parameters == 1
    assert not coverage.is_partial


def test_layers_that_failed_are_not_analysed():
    coverage = coverage_of([10], [30], [])
    assert (coverage.found, coverage.analysed, coverage.failed) == (2, 1, 1)
    assert coverage.share_of_parameters == 0.25


@pytest.mark.parametrize("sizes", [[None], [None, 3]])
def test_no_share_where_a_size_is_not_known(sizes):
    assert coverage_of([10], [], [item("not_read", size) for size in sizes]).share_of_parameters is None


def test_nothing_at_all():
    coverage = coverage_of([], [], [])
    assert (coverage.found, coverage.share_of_parameters, coverage.is_partial) == (0, None, False)


def test_what_was_not_seen():
    entries = [item(kind, name=kind) for kind in (*KINDS, "no_update")]
    assert [entry["name"] for entry in unseen_in(entries)] == ["not_placed", "not_read"]
    assert coverage_of([], [], entries).unseen == 2
