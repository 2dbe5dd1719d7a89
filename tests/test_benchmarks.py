"""That the benchmarks run, agree with the definition, and leave a table and a plot each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.__main__ import NAMES
from tests.support.paths import ROOT


@pytest.mark.parametrize("name", [name for name in NAMES if name != "proof"])  # tests/svd/test_proof.py is that one
def test_a_benchmark_runs(tmp_path, name):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        name,
        "--quick",
        "--output",
        str(tmp_path),
        "--scratch",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((tmp_path / f"{name}.json").read_text())
    assert table["rows"]
    assert all(row.get("agrees", True) for row in table["rows"])
    assert (tmp_path / f"{name}.md").read_text().count("|") > 10
    for picture in ("png", "svg"):
        assert (tmp_path / f"{name}.{picture}").stat().st_size > 2000
