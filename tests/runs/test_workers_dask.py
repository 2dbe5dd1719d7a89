"""Audits on a Dask cluster: two workers on this machine, one of which is killed on the way."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

import spectra
from spectra.cli import main
from spectra.errors import UsageError
from spectra.runs import workers
from spectra.runs.workers import dask_executor
from tests.support.paths import ROOT

distributed = pytest.importorskip("distributed")

TUNED, BASE = ROOT / "fixtures" / "lora-r4", ROOT / "fixtures" / "base"


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=None
    ) as running:
        yield running


@pytest.fixture(scope="module")
def expected():
    return spectra.audit(TUNED, BASE, threads=1).to_json(canonical=True)


def test_two_workers_give_the_same_report(cluster, expected):
    with dask_executor(cluster.scheduler_address) as executor:
        found = spectra.audit(TUNED, BASE, threads=1, executor=executor)
    assert found.to_json(canonical=True) == expected


def test_a_worker_that_is_killed_midway(cluster, expected, tmp_path):
    """Its layers are done again by the other, or by the one that takes its place."""
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
    assert len(pids) == 2
    killed: list[str] = []

    def show(done, whole, layer):
        if not killed and done > 0.2 * whole:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
            killed.append(layer)

    with dask_executor(cluster.scheduler_address) as executor:
        found = spectra.audit(TUNED, BASE, threads=1, executor=executor, progress=show, resume=tmp_path / "run.jsonl")
    assert killed
    assert not found.failed
    assert found.to_json(canonical=True) == expected
    assert len((tmp_path / "run.jsonl").read_bytes().splitlines()) == 29


def test_the_command(cluster, expected, tmp_path, capsys):
    out = tmp_path / "report.json"
    arguments = ["audit", str(TUNED), "--base", str(BASE), "--threads", "1", "--dask", cluster.scheduler_address]
    assert main([*arguments, "-o", str(out), "--quiet"]) == 0
    from spectra.sources.saved import load_report

    assert load_report(out).to_json(canonical=True) == expected


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1)
    with pytest.raises(UsageError, match="no Dask scheduler could be reached"), dask_executor("tcp://127.0.0.1:9"):
        pass
