"""That the benchmarks run, agree with the definition, and leave a table and a plot each."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.__main__ import NAMES, run
from benchmarks.options import Options
from benchmarks.tables import machine
from tests.support.paths import ROOT

QUICK = [name for name in NAMES if name != "proof"]  # tests/svd/test_proof.py is that one


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    quick = Options(quick=True, repeat=1, workers=2, scratch=tmp_path)
    module: Any = importlib.import_module(f"benchmarks.{name}")
    assert run(name, module, quick, tmp_path, machine())
    table = json.loads((tmp_path / f"{name}.json").read_text())
    assert table["rows"]
    assert all(row.get("agrees", True) for row in table["rows"])
    assert (tmp_path / f"{name}.md").read_text().count("|") > 10
    for picture in ("png", "svg"):
        assert (tmp_path / f"{name}.{picture}").stat().st_size > 2000


def test_the_command_runs_the_chosen_ones(tmp_path):
    command = [sys.executable, "-m", "benchmarks"]
    asked = [*command, "growth", "--quick", "--sizes", "64", "96", "--output", str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {f"growth.{end}" for end in ("csv", "json", "md", "png", "svg")}
    wrong = subprocess.run([*command, "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert wrong.returncode == 2
    assert "no benchmark named nonsense" in wrong.stderr
