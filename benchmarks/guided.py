"""The fuzzer's inputs by atheris, which has libFuzzer mutate them by the branches that they reach in our code.

atheris is no dependency of the package; ``pip install atheris`` (Linux).  ``python -m benchmarks.guided KIND FOLDER
[libFuzzer's options]`` is the process that runs one kind of input; findings go on, each a line of FOLDER/findings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST = 20  # findings that are kept of a kind


def run_guided(kinds: Sequence[str], seconds: int, seed: int, folder: Path) -> list[str]:
    """Runs the kinds one after the other, each for its share of the time; returns the findings."""
    if importlib.util.find_spec("atheris") is None:
        return ["atheris is not installed: pip install atheris, or leave --guided out"]
    findings = []
    for kind in kinds:
        home = folder / kind
        home.mkdir(parents=True)
        share = max(seconds // len(kinds), 1)
        command = [
            sys.executable, "-m", "benchmarks.guided", kind, str(home), f"-max_total_time={share}",
            f"-seed={seed + 1}", "-max_len=6000", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={home}/",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        last = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+)", done.stderr)
        number, branches, features = last[-1] if last else ("0", "0", "0")
        said = home / "findings"
        lines = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
        if done.returncode and not lines:  # what atheris ends with: a time-out, too much memory, a crash of Python
            lines = [f"{kind}: {done.stderr[-1500:]}"]
        print(
            f"{kind:>7}  {int(number):,} inputs, {branches} branches ({features} features), {len(lines)} findings",
            flush=True,
        )
        findings += lines
    return findings


def _fuzz(kind: str, home: Path, options: Sequence[str]) -> None:
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["spectra"]):
        from benchmarks.fuzz import Target, seeds

    corpus = home / "corpus"
    corpus.mkdir()
    for number, text in enumerate(seeds(kind)):
        (corpus / str(number)).write_bytes(text)
    target, rng, known = Target(kind, home / "scratch"), random.Random(0), set[str]()

    def one(text: bytes) -> None:
        target.write(text, rng)
        _, wrong = target.problem()
        if wrong is not None and wrong not in known and len(known) < MOST:
            known.add(wrong)
            with (home / "findings").open("a", encoding="utf-8") as out:
                out.write(f"{kind} {text!r}: {wrong}\n")

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
