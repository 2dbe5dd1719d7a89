"""What holds of every command: help, interrupts, and standard output that takes nothing."""

from __future__ import annotations

import os
import resource
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
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-m", "spectra", *arguments], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0
        assert result.stdout
    assert min(seconds) < 0.5


WAITS = "import os, sys; sys.argv = ['spectra', 'inspect', sys.argv[1]]; from spectra.cli import main; main(); "
WAITS += "import torch; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "PASSIVE 1500"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"), ({"GOMP_SPINCOUNT": "9"}, "None 9")],
)
def test_threads_that_wait_let_others_work(given, expected):
    """As ``python -m benchmarks neighbours`` measures; never over what the user has chosen."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | given
    command = [sys.executable, "-c", WAITS, LORA]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == expected


def test_where_torch_is_loaded_already_nothing_is_set(monkeypatch):
    import torch  # noqa: F401

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["inspect", LORA]) == 0
    assert "OMP_WAIT_POLICY" not in os.environ


def test_an_audit_loads_no_library_that_it_does_not_need():
    heavy = ("scipy.stats", "scipy.integrate", "pandas", "matplotlib", "transformers", "peft", "plotly")
    code = f"import sys; from spectra.cli import main; assert main(['audit', {LORA!r}, '--quiet']) == 0; "
    code += f"assert not {set(heavy)} & set(sys.modules), {set(heavy)} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_interrupt_exits_with_130(tmp_path, make_base, rng):
    weights = {f"layer.{i}.q.weight": rng.normal(size=(1200, 1200)).astype("f4") for i in range(20)}
    base = make_base(weights)
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    command = [sys.executable, "-m", "spectra", "audit", str(tuned), "--base", str(base), "-o", str(tmp_path / "r.txt"),
               "--resume", str(tmp_path / "run.jsonl")]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what runs in the background has not
    )  # fmt: skip
    while not (tmp_path / "run.jsonl").exists():  # however busy the machine, it is at work from then on
        assert process.poll() is None, "finished before it could be interrupted"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "spectra: interrupted"
    assert "Traceback" not in err
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
