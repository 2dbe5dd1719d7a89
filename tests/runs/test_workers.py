"""Runs on the workers of an executor."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import spectra
from spectra.cli import main
from spectra.errors import AdapterError, UsageError, WrongBaseError
from spectra.runs import workers
from tests.support.paths import ROOT

TUNED, BASE = ROOT / "fixtures" / "lora-r4", ROOT / "fixtures" / "base"
LAYERS: dict[str, Any] = {"include": ["layers.0.", "layers.1."]}


@pytest.fixture(scope="module")
def whole():
    return canonical(spectra.audit(TUNED, BASE))


@pytest.fixture(scope="module")
def short():
    return canonical(spectra.audit(TUNED, BASE, **LAYERS))


def canonical(report):
    return report.to_json(canonical=True)


def test_an_executor_gives_the_same_report(short):
    with ThreadPoolExecutor(2) as pool:
        assert canonical(spectra.audit(TUNED, BASE, **LAYERS, executor=pool, threads=1)) == canonical(
            spectra.audit(TUNED, BASE, **LAYERS, threads=1)
        )


def test_processes_and_a_journal_together(tmp_path):
    file = tmp_path / "run.jsonl"
    expected = canonical(spectra.audit(TUNED, BASE, **LAYERS, threads=1))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = spectra.audit(TUNED, BASE, **LAYERS, threads=1, executor=pool, resume=file)
    assert canonical(found) == expected
    assert len(file.read_bytes().splitlines()) == 15
    assert canonical(spectra.audit(TUNED, BASE, **LAYERS, threads=1, resume=file)) == expected


def test_an_executor_that_breaks_is_an_error(tmp_path):
    class Broken(ThreadPoolExecutor):
        def submit(self, *arguments, **options):
            from concurrent.futures import BrokenExecutor, Future

            future: Future[None] = Future()
            future.set_exception(BrokenExecutor("a process was killed"))
            return future

    with Broken() as pool, pytest.raises(UsageError, match="workers were lost: a process was killed"):
        spectra.audit(TUNED, BASE, **LAYERS, executor=pool)


def test_a_weight_that_no_worker_survives_is_a_failed_layer(monkeypatch):
    from spectra.tasks import audit as audits

    finish = audits.finish

    def dies(work, key):
        if "q_proj" in key:
            raise ConnectionError("the worker is gone")
        return finish(work, key)

    monkeypatch.setattr(audits, "finish", dies)
    with ThreadPoolExecutor(1) as pool:
        report = spectra.audit(TUNED, BASE, **LAYERS, executor=pool)
    failed = {layer.name: layer.error for layer in report.failed}
    assert len(failed) == 2
    assert all("its worker failed: ConnectionError: the worker is gone" in (error or "") for error in failed.values())


def test_a_worker_that_sees_other_files_says_so(tmp_path, monkeypatch):
    from spectra.tasks import audit as audits

    seen = iter("abcdef")
    monkeypatch.setattr(audits, "_digest", lambda identity: next(seen))
    with ThreadPoolExecutor(1) as pool, pytest.raises(WrongBaseError, match="is the storage shared"):
        spectra.audit(TUNED, BASE, **LAYERS, executor=pool, epsilon=0.45)


def test_errors_travel_between_processes():
    import pickle

    for error in (AdapterError("a/b", "broken", "x.weight"), WrongBaseError(Path("c"), "of another"), UsageError("no")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert getattr(again, "tensor", None) == getattr(error, "tensor", None)


def test_dask_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1)
    assert main(["audit", str(TUNED), "--base", str(BASE), "--dask", "tcp://127.0.0.1:9"]) == 2
    told = capsys.readouterr().err
    assert "no Dask scheduler could be reached" in told or "needs Dask" in told
