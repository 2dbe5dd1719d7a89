"""Runs that are ended at any moment and go on, here and on the workers of an executor."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from typing import Any

import pytest

import spectra
from spectra.cli import main
from spectra.errors import CorruptFileError, UsageError
from spectra.runs import journal
from spectra.tasks.audit import audit_many
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


def lines_of(file):
    return file.read_bytes().splitlines(keepends=True)


def test_the_report_is_that_of_a_run_without_a_journal(tmp_path, whole):
    file = tmp_path / "run.jsonl"
    assert canonical(spectra.audit(TUNED, BASE, resume=file)) == whole
    head, *finished = lines_of(file)
    assert json.loads(head)["schema"] == "spectra.run/1"
    assert len(finished) == 28
    written = file.read_bytes()
    assert canonical(spectra.audit(TUNED, BASE, resume=file)) == whole, "and once more, from the journal alone"
    assert file.read_bytes() == written


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_twenty_random_moments(tmp_path, whole):
    """SIGKILL while it opens, reads, computes or writes: what follows is the report of an uninterrupted run."""
    started = time.perf_counter()
    spectra.audit(TUNED, BASE, resume=tmp_path / "timed.jsonl")
    seconds = time.perf_counter() - started
    random.seed(7)
    partly = 0
    for number in range(20):
        file = tmp_path / f"{number}.jsonl"
        child = os.fork()
        if not child:
            try:
                spectra.audit(TUNED, BASE, resume=file)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partly += file.exists() and 1 < len(lines_of(file)) < 29
        assert canonical(spectra.audit(TUNED, BASE, resume=file)) == whole
    assert partly >= 5, "most of them were killed on the way"


@pytest.mark.parametrize("kept", [0, 1, 20, -1, -2])
def test_a_line_that_was_being_written(tmp_path, short, kept):
    """The last line, cut anywhere, is done again; so is a first line that never was whole."""
    file = tmp_path / "run.jsonl"
    spectra.audit(TUNED, BASE, **LAYERS, resume=file)
    lines = lines_of(file)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:kept])
    assert canonical(spectra.audit(TUNED, BASE, **LAYERS, resume=file)) == short
    assert sorted(lines_of(file)[1:5]) == sorted(lines[1:5])
    file.write_bytes(lines[0][:kept])
    if kept != -1:  # all but the end of the line: cut, but plainly a journal
        assert canonical(spectra.audit(TUNED, BASE, **LAYERS, resume=file)) == short


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch, short):
    file = tmp_path / "run.jsonl"
    spectra.audit(TUNED, BASE, **LAYERS, resume=file)
    lines = lines_of(file)
    file.write_bytes(b"".join(lines[:-2]))
    done = []
    of = spectra.runs.reports.Analysis.of

    def noted(self, job):
        done.append(job.first.name)
        return of(self, job)

    monkeypatch.setattr("spectra.runs.reports.Analysis.of", noted)
    assert canonical(spectra.audit(TUNED, BASE, **LAYERS, resume=file)) == short
    assert len(done) == 2


def changed_config(tuned, base):
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))


def touched(tuned, base):
    file = base / "model.safetensors"
    os.utime(file, ns=(1, 1))


DIFFERENCES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "another epsilon": ({"epsilon": 0.4}, None, r"epsilon was 0\.5 there, and is 0\.4 here"),
    "other layers": ({"include": ["layers.2"]}, None, "include"),
    "another alpha": ({}, changed_config, "lora-r4 is not as it was"),
    "another base file": ({}, touched, "base is not as it was"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_inputs_and_options_that_changed_are_noticed(tmp_path, what):
    import shutil

    options, change, message = DIFFERENCES[what]
    tuned, base = shutil.copytree(TUNED, tmp_path / "lora-r4"), shutil.copytree(BASE, tmp_path / "base")
    file = tmp_path / "run.jsonl"
    spectra.audit(tuned, base, resume=file)
    written = file.read_bytes()
    if change is not None:
        change(tuned, base)
    with pytest.raises(UsageError, match=message):
        spectra.audit(tuned, base, resume=file, **options)
    assert file.read_bytes() == written


def test_workers_are_no_difference(tmp_path, short):
    file = tmp_path / "run.jsonl"
    spectra.audit(TUNED, BASE, **LAYERS, resume=file, threads=1)
    lines = lines_of(file)
    file.write_bytes(b"".join(lines[:4]))
    again = spectra.audit(TUNED, BASE, **LAYERS, resume=file, workers=2, threads=1)
    assert [layer.intruder_indices for layer in again.layers] == [
        tuple(layer["intruder_indices"]) for layer in json.loads(short)["layers"]
    ]


def test_other_files_are_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine\n")
    with pytest.raises(UsageError, match="no journal of a run"):
        spectra.audit(TUNED, BASE, **LAYERS, resume=file)
    assert file.read_text() == "mine\n"
    with pytest.raises(UsageError, match="could not be opened"):
        spectra.audit(TUNED, BASE, **LAYERS, resume=tmp_path / "nowhere" / "run.jsonl")


@pytest.mark.parametrize(
    "damage", [b"{}\n", b"\0\0\0\n", b'{"key": "a", "layers": 3, "digests": []}\n', b"[" * 5000 + b"\n"]
)
def test_damage_within_is_named(tmp_path, damage):
    file = tmp_path / "run.jsonl"
    spectra.audit(TUNED, BASE, **LAYERS, resume=file)
    lines = lines_of(file)
    lines[3] = damage
    file.write_bytes(b"".join(lines))
    with pytest.raises(CorruptFileError, match=r"run\.jsonl: line 4 is damaged"):
        spectra.audit(TUNED, BASE, **LAYERS, resume=file)


def test_two_processes_do_not_write_one_journal(tmp_path):
    file = tmp_path / "run.jsonl"
    with journal.open_journal(file, {"a": 1}), pytest.raises(UsageError, match="another process"):
        spectra.audit(TUNED, BASE, **LAYERS, resume=file)


def test_a_full_disk_takes_back_what_was_begun(tmp_path, monkeypatch, short):
    file = tmp_path / "run.jsonl"
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"run\.jsonl: could not be written: No space left"):
        spectra.audit(TUNED, BASE, **LAYERS, resume=file)
    monkeypatch.undo()
    assert len(lines_of(file)) == 4
    assert canonical(spectra.audit(TUNED, BASE, **LAYERS, resume=file)) == short


def test_several_fine_tunes(tmp_path):
    tuned = [TUNED, ROOT / "fixtures" / "full", ROOT / "fixtures" / "dora-r16"]
    file = tmp_path / "run.jsonl"
    before = [canonical(report) for report in audit_many(tuned, BASE, **LAYERS)]
    assert [canonical(report) for report in audit_many(tuned, BASE, **LAYERS, resume=file)] == before
    lines = lines_of(file)
    file.write_bytes(b"".join(lines[:9]))
    assert [canonical(report) for report in audit_many(tuned, BASE, **LAYERS, resume=file)] == before


def test_layers_that_failed_stay_so(tmp_path, make_adapter, make_base, rng):
    """What could not be analysed is a result, too."""
    import numpy as np

    base = make_base({f"layer.{i}.q.weight": rng.normal(size=(12, 12)).astype("f4") for i in range(2)})
    bad = np.full((12, 2), np.nan, "f4")
    factors = rng.normal(size=(2, 2, 12)).astype("f4")
    tuned = make_adapter({"layer.0.q": (factors[0].T.copy(), factors[1]), "layer.1.q": (bad, factors[0])}, r=2)
    file = tmp_path / "run.jsonl"
    first = spectra.audit(tuned, base, resume=file)
    assert [layer.status for layer in first.layers] == ["analysed", "non_finite"]
    again = spectra.audit(tuned, base, resume=file)
    assert again.to_dict()["layers"] == first.to_dict()["layers"]


# The command


def test_the_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.jsonl"

    def stops(self, key, finished):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", stops)
    arguments = ["audit", str(TUNED), "--base", str(BASE), "--resume", str(file), "--include", "layers.0."]
    assert main(arguments) == 130
    assert f"{file}; rerun the command to continue" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*arguments, "--quiet"]) == 0
    assert "ntruder dimensions" in capsys.readouterr().out
