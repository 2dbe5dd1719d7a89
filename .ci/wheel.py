"""What a user does first, with each extra, where no source of the package is near."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import spectra
from spectra.records.report import json_schema
from spectra.sources.saved import load_report

INTRUDERS = 35  # of fixtures/lora-r4


def command(*words: str) -> str:
    """Standard output of one command."""
    done = subprocess.run(["spectra", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"spectra {' '.join(words)}\n{done.stderr}"
    return done.stdout


def main() -> None:
    """Runs everything once; an assertion says what is wrong."""
    assert Path(spectra.__file__).is_relative_to(sys.prefix), f"not the wheel: {spectra.__file__}"
    audit = ("audit", "lora-r4", "--base", "base")
    assert f"{INTRUDERS} of" in command(*audit)
    command(*audit, "-o", "report.json", "--html", "page.html")
    assert load_report("report.json").total("all") == INTRUDERS
    assert Path("page.html").stat().st_size > 1_000_000
    command(*audit, "-o", "rows.parquet")
    command("plot", "similarity", "lora-r4", "--base", "base", "-o", "similarity.png")
    command("cache", "base")
    assert "complete" in command("completion", "bash")
    assert command("ranks", "lora-r4", "--base", "base")
    command("repair", "lora-r4", "--base", "base", "--scale", "0.5", "--to", "repaired")
    command("verify", "repaired", "--base", "base", "--source", "lora-r4")
    command("inspect", "lora-r4")
    assert json_schema()["$id"]

    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        report = spectra.audit("lora-r4", "base", executor=client.get_executor())
    assert report.total("all") == INTRUDERS
    assert len(report.to_dataframe()) == sum(len(layer.vectors) for layer in report.layers)

    from spectra.training import SpectraCallback

    assert SpectraCallback(every=10)
    print(f"The wheel of spectra {spectra.__version__} works in {Path.cwd()}.")


if __name__ == "__main__":
    main()
