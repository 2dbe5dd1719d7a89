"""Threads that wait for each other without keeping others from the processor."""

from __future__ import annotations

import os
import sys
import threading

CHOSEN = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})  # by any of which a user says how they wait
SPINS = "1500"  # with fewer what is small takes longer alone, with more it takes longer beside others
PARALLEL = 1 << 18  # elements; torch shares sums of fewer among no threads

_lock = threading.Lock()
_done_in: int | None = None  # this process; a fork has none of its parent's threads


def let_others_work() -> None:
    """Has the threads of this process stop spinning early, unless the user says how they wait.

    OpenMP's threads spin while they wait for each other, at each of thousands of small parallel regions: of two audits
    at once on two cores each takes many times as long as one alone (``python -m benchmarks neighbours``).  How they
    wait is read when torch is loaded; before, as in the command, they are told to sleep, in GCC's libgomp after some
    microseconds: most waits within LAPACK are shorter, and to wake a thread takes longer.  In a process that loaded
    torch itself, this keeps one idle thread with a team of its own: libgomp spins 300,000 times, but 100 times where
    the process has more threads than the machine has cores (its manual says so of GOMP_SPINCOUNT).  With another OpenMP
    nothing is gained or lost.
    """
    global _done_in
    if CHOSEN & os.environ.keys():
        return
    if "torch" not in sys.modules:
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPINS}
        return
    import torch

    with _lock:
        if _done_in == os.getpid() or torch.get_num_threads() < 2:
            return
        _done_in = os.getpid()
    ready = threading.Event()
    threading.Thread(target=_rest, args=(ready,), name="spectra-idle", daemon=True).start()
    ready.wait()


def _rest(ready: threading.Event) -> None:
    import torch

    torch.ones(PARALLEL).add_(1)  # makes the team
    ready.set()
    threading.Event().wait()
