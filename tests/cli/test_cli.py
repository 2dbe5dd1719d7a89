"""What holds of every command: help, interrupts, and standard output that takes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from spectra.cli import main
from tests.support.commands import run
from tests.support.paths import FIXTURES, ROOT

LORA = str(FIXTURES / "lora-r4")


def test_unknown_options_exit_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["audit", LORA, "--nonsense"])
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"]])
def test_help_answers_at_once(arguments):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "spectra", *arguments], capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
        assert result.stdout
    assert min(seconds) < 0.5


def test_interrupt_exits_with_130(tmp_path, make_base, rng):
    weights = {f"layer.{i}.q.weight": rng.normal(size=(1200, 1200)).astype("f4") for i in range(20)}
    base = make_base(weights)
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    command = [sys.executable, "-m", "spectra", "audit", str(tuned), "--base", str(base), "-o", str(tmp_path / "r.txt")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what runs in the background has not
    )  # fmt: skip
    time.sleep(4)
    assert process.poll() is None, "finished before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "spectra: interrupted"
    assert not (tmp_path / "r.txt").exists()


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m spectra audit {LORA} --format csv | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""
    assert result.stdout.startswith("tuned,layer")


def test_a_reader_that_leaves_early_gets_the_verdict_all_the_same():
    command = f"set -o pipefail; {sys.executable} -m spectra audit {LORA} --format csv --fail-above 0 | true"
    assert subprocess.run(["bash", "-c", command], stderr=subprocess.DEVNULL, cwd=ROOT).returncode == 1


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
def test_standard_output_that_takes_nothing(redirect):
    command = f"{sys.executable} -m spectra audit {LORA} {redirect}"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "standard output" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["audit", ""], ["audit", LORA, "--base", ""], ["audit", "x" * 5000]])
def test_names_that_are_none(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("spectra: error:")
