"""Peak memory of an audit above that of the libraries, in units of the largest matrix pair.

A pair is W0 and W1 in float32.  Each case runs in a process of its own: first a tiny audit, so that
every library is loaded and warm, then the large one; what counts is how far the second raises the
process's peak.  "settled" sets epsilon to a cosine that occurs, so that float64 must decide.  ``cached``
starts cold: it decomposes the base for this one audit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import Options, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Peak memory above the libraries"
ROOT = Path(__file__).parent.parent
CASES = ("lora", "dora", "full", "lora settled")
ENGINES = ("exact", "krylov", "cached")


def write_case(folder: Path, case: str, size: int) -> None:
    """A base of one square matrix with a trained-like spectrum, and a fine-tune of it."""
    from safetensors.torch import save_file

    from benchmarks.problems import normal, scaled_base, seeded

    generator = seeded(0)
    W0 = scaled_base(size, size, generator)
    folder.mkdir(parents=True)
    save_file({"layer.0.q.weight": W0}, folder / "base.safetensors")
    if case == "full":
        W1 = W0 + 0.2 * W0.std() * normal(generator, size, size)
        save_file({"layer.0.q.weight": W1}, folder / "tuned.safetensors")
        return
    B = 4 * W0.std() * normal(generator, size, 8) / size**0.5
    tensors = {"lora_A.weight": normal(generator, 8, size), "lora_B.weight": B}
    if case == "dora":
        tensors["lora_magnitude_vector"] = W0.norm(dim=1)
    (folder / "tuned").mkdir()
    save_file(
        {f"base_model.model.layer.0.q.{name}": value for name, value in tensors.items()},
        folder / "tuned" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": case == "dora"}
    (folder / "tuned" / "adapter_config.json").write_text(json.dumps(config))


def measure(folder: Path, epsilon: float, engine: str) -> dict[str, Any]:
    """Bytes by which auditing ``folder`` raises this process's peak; run in a fresh process."""
    import io
    from contextlib import redirect_stdout

    from spectra.cli import main as spectra_command

    def audit(tuned: Path, base: Path) -> dict[str, Any]:
        text = io.StringIO()
        with redirect_stdout(text):
            options = ["--epsilon", str(epsilon), "--engine", engine, "--no-cache", "--format", "json"]
            spectra_command(["audit", str(tuned), "--base", str(base), *options])
        report: dict[str, Any] = json.loads(text.getvalue())
        return report

    tuned = folder / "tuned" if (folder / "tuned").is_dir() else folder / "tuned.safetensors"
    audit(ROOT / "fixtures" / "dora-r16", ROOT / "fixtures" / "base")
    before = peak("self")
    layer = audit(tuned, folder / "base.safetensors")["layers"][0]
    return {
        "bytes": peak("self") - before,
        "settled": "settled_in_float64" in layer["flags"],
        "cosine": min(vector["max_cosine_bounds"][1] for vector in layer["vectors"]),
        "engine": layer["engine"],
    }


def peak(process: int | str) -> int:
    """The largest resident size a process has had so far, in bytes.

    Not getrusage: its maximum survives exec and would include the parent's.
    """
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def run_case(case: str, size: int, engine: str = "exact") -> dict[str, Any]:
    """The measurement of one case in a process of its own, with its ratio to the pair."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "case"
        write_case(folder, case, size)

        def child(epsilon: float) -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.memory", str(folder), str(epsilon), engine]
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            answer: dict[str, Any] = json.loads(result.stdout)
            return answer

        answer = child(0.5)
        if case.endswith("settled"):
            answer = child(answer["cosine"])
        return answer | {"pairs": answer["bytes"] / (2 * 4 * size * size)}


def run(options: Options) -> Iterator[Row]:
    for size in options.sizes or options.scale(quick=(256,), default=(1024, 2048)):
        for case in options.scale(quick=("lora settled",), default=CASES):
            for engine in ENGINES:
                answer = run_case(case, size, engine)
                yield {
                    "size": size,
                    "case": case,
                    "method": engine,
                    "MiB": answer["bytes"] / 2**20,
                    "pairs": answer["pairs"],
                    "answered by": answer["engine"],
                    "in float64": answer["settled"],
                }


def notes(rows: list[Row]) -> list[str]:
    largest = max(row["size"] for row in rows)
    said = [f"One pair is W0 and W1 in float32: {8 * largest**2 / 2**20:,.0f} MiB at {largest}."]
    for method in ENGINES:
        worst = max((row for row in rows if row["method"] == method and row["size"] == largest), key=_pairs)
        said.append(f"{method}: at most {worst['pairs']:.1f} pairs at {largest} ({worst['case']}).")
    return said


def _pairs(row: Row) -> float:
    return float(row["pairs"])


def draw(rows: list[Row], axes: Axes) -> None:
    from benchmarks.plots import dots

    dots(axes, rows, lambda row: f"{row['size']} {row['case']}", "pairs")
    axes.set_xscale("linear")
    axes.set_xlim(left=0)
    axes.set_xlabel("pairs (W0, W1) of float32 matrices")


if __name__ == "__main__":  # the process that is measured
    print(json.dumps(measure(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])))
