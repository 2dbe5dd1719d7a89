"""That the benchmarks run, agree with the definition, and leave a table and a plot each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.__main__ import NAMES
from tests.support.paths import ROOT

QUICK = [name for name in NAMES if name != "proof"]  # tests/svd/test_proof.py is that one


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What all of them wrote, one after the other in one process, as ``python -m benchmarks`` runs them."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", *QUICK, "--quick", "--output", str(folder), "--scratch", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(output, name):
    table = json.loads((output / f"{name}.json").read_text())
    assert table["rows"]
    assert all(row.get("agrees", True) for row in table["rows"])
    assert (output / f"{name}.md").read_text().count("|") > 10
    for picture in ("png", "svg"):
        assert (output / f"{name}.{picture}").stat().st_size > 2000
