"""The hostile cases through every command, the worst of them in processes of their own, and hostile records."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz
from tests.support import hostile, hostile_commands
from tests.support.hostile import CASES, MIB, SECONDS
from tests.support.hostile_commands import COMMANDS
from tests.support.paths import FIXTURES, ROOT

STEP = 7
JOBS = dict(hostile_commands.chosen(STEP))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    groups = {job: (str(STEP), job.partition(":")[0].partition(",")[0]) for job in JOBS}
    return hostile.Outcomes("hostile_commands", tmp_path_factory.mktemp("commands"), groups)


@pytest.mark.parametrize("job", JOBS)
def test_a_hostile_case(outcomes, job):
    hostile_commands.check(job, outcomes[job])


def test_there_are_enough_of_them():
    for command in COMMANDS:
        as_tuned, as_base = (sum(job.startswith(command + after) for job in JOBS) for after in (":", ", base:"))
        assert as_base >= 40
        assert as_tuned >= 40 or command == "cache"
    left = {name for name in CASES if not name.startswith(hostile_commands.WITH_OPTIONS)}
    assert {job.partition(": ")[2] for job in JOBS} >= left - {*hostile_commands.SOUND_AS_BASE}, "together all of them"


# In a process of its own, as a user runs it: what the case adds once a broken file has had the libraries loaded.

RUN = """
import json, pathlib, sys, time
from spectra.cli import main

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

for arguments in json.loads(sys.argv[1]):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, started = peak(), time.process_time()
    code = main(arguments)
    print(code, time.process_time() - started, (peak() - before) / 1024, "torch" in sys.modules)
"""
WORST = {
    "inspect": ("34 MB of metadata", "two million tiny entries", "a rank pattern that hangs"),
    "compare": ("a million tensors of no values", "34 MB of one number"),
    "ranks": ("a model's configuration of 64 MB", "34 MB of brackets"),
    "repair": ("patterns, 40,000 of them", "34 MB of metadata"),
    "plot": ("deep objects", "a million tensors of no values"),
    "cache": ("34 MB in one name", "two million tiny entries"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_worst_in_a_process_of_its_own(tmp_path, command):
    build = hostile_commands.as_base if command == "cache" else hostile_commands.as_tuned
    names = ("no tensors", *WORST[command])
    asked = [build(tmp_path / str(number), command, name) for number, name in enumerate(names)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-c", RUN, json.dumps(asked)]
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    said, results = done.stderr.splitlines(), [line.split() for line in done.stdout.splitlines()]
    assert len(said) == len(results) == len(names), done.stderr
    for number, (code, seconds, mib, torch) in enumerate(results):
        assert code == "2"
        assert said[number].startswith(f"spectra: error: {tmp_path / str(number)}/")
        assert not (torch == "True" and command == "inspect")
        if number:
            assert float(seconds) <= SECONDS
            assert float(mib) <= MIB


def test_the_worst_are_cases():
    assert {name for names in WORST.values() for name in names} <= set(CASES)
    assert set(WORST) == set(COMMANDS)


@pytest.mark.parametrize("count", [3, 100])
def test_several_that_cannot_be_read_are_a_line_each(tmp_path, capsys, count):
    arguments = hostile.prepare(tmp_path, CASES["no tensors"])
    assert hostile.silently(arguments) == 2
    from spectra.cli import main

    assert main(["inspect", *[arguments[1]] * count]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"spectra: error: {Path(arguments[1]) / 'model.safetensors'}: holds no tensors"] * count


# Records that Spectra writes, and that somebody else may have written.

RECORDS = {
    "nothing": b"",
    "a list": b"[]",
    "no schema": b"{}",
    "not UTF-8": b'{"schema": "\xff"}',
    "deep": b'{"reports":' * hostile.DEEP,
    "a pickle": b"\x80\x04K\x01.",
    "a schema alone": b'{"schema": "spectra.comparison/1"}',
    "reports that are numbers": b'{"schema": "spectra.comparison/1", "reports": [1, 2], "overlaps": []}',
    "a schema with a line of its own": b'{"schema": "x\\nspectra: error: fine"}',
}


def run_in_process(capsys, arguments):
    from spectra.cli import main

    code = main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("content", RECORDS)
@pytest.mark.parametrize("command", ["plot", "verify"])
def test_a_hostile_record(tmp_path, capsys, command, content):
    file = tmp_path / ("spectra-repair.json" if command == "verify" else "made.json")
    file.write_bytes(RECORDS[content])
    if command == "plot":
        arguments = ["plot", "depth", str(file), "-o", str(tmp_path / "out.png")]
    else:
        arguments = ["verify", str(tmp_path)]
    code, err = run_in_process(capsys, arguments)
    assert code == 2
    assert err.startswith(f"spectra: error: {file}: ")
    assert err[:-1].isprintable()
    assert list(tmp_path.iterdir()) == [file]


def test_a_record_that_is_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "made.json")
    code, err = run_in_process(capsys, ["plot", "depth", str(tmp_path / "made.json")])
    assert code == 2
    assert "no regular file" in err


def test_a_comparison_with_values_of_other_kinds(tmp_path, capsys):
    """A sound comparison in which single values are replaced, taken out or renamed is drawn, or refused by name."""
    made, picture = tmp_path / "made.json", str(tmp_path / "out.svg")
    layers = ["--include", "*layers.0*q_proj", "-k", "2", "--quick", "--quiet"]
    tuned, base = [str(FIXTURES / name) for name in ("lora-r4", "full")], str(FIXTURES / "base")
    assert run_in_process(capsys, ["compare", *tuned, "--base", base, *layers, "-o", str(made)])[0] == 0
    sound, rng, refused = made.read_bytes(), random.Random(3), 0
    for number in range(60):
        text = sound
        for _ in range(3):
            text = fuzz.restructure(rng, text) or text
        made.write_bytes(text)
        kind = ("depth", "epsilon", "top-k", "ranks")[number % 4]
        code, err = run_in_process(capsys, ["plot", kind, str(made), "-o", picture, "--quiet"])
        assert code in (0, 2), text
        if code:
            refused += 1
            assert err.startswith("spectra: error: ")
    assert refused > 5
