"""How threads wait in a process that loaded torch before Spectra."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

AUDITS = """
import threading, torch, spectra
torch.set_num_threads({threads})
for _ in range(2):
    spectra.audit("fixtures/lora-r1", "fixtures/base", cache=False, include="*.0.*q_proj")
print(sum(thread.name == "spectra-idle" for thread in threading.enumerate()))
"""


@pytest.mark.parametrize(
    ("threads", "given", "idle"),
    [
        (2, {}, 1),
        (1, {}, 0),  # nobody waits
        (2, {"OMP_WAIT_POLICY": "ACTIVE"}, 0),
        (2, {"GOMP_SPINCOUNT": "7"}, 0),
        (2, {"KMP_BLOCKTIME": "0"}, 0),
    ],
)
def test_one_idle_thread_unless_the_user_says_how_they_wait(threads, given, idle):
    """What it is good for is measured by ``python -m benchmarks neighbours``."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | given
    command = [sys.executable, "-c", AUDITS.format(threads=threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.splitlines()[-1] == str(idle), done.stderr
