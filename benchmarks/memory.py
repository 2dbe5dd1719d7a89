"""Peak memory of an audit above that of the libraries, in units of the largest matrix pair.

    python benchmarks/memory.py [SIZE ...]          # default: 1024 2048

A pair is W0 and W1 in float32.  Each case runs in a process of its own: first a tiny audit, so that
every library is loaded and warm, then the large one; what counts is how far the second raises the
process's peak.  "settled" sets epsilon to a cosine that occurs, so that float64 must decide; all but "krylov" use the
exact engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = ("lora", "dora", "full", "lora settled", "lora krylov")


def write_case(folder: Path, case: str, size: int) -> None:
    """A base of one square matrix with a trained-like spectrum, and a fine-tune of it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W0 = normal(size, size) / size**0.5
    W0 += 3 * normal(size, 8) @ normal(8, size) / size
    folder.mkdir(parents=True)
    save_file({"layer.0.q.weight": W0}, folder / "base.safetensors")
    if case == "full":
        save_file({"layer.0.q.weight": W0 + 0.3 * normal(size, size) / size**0.5}, folder / "tuned.safetensors")
        return
    tensors = {"lora_A.weight": normal(8, size), "lora_B.weight": 2 * normal(size, 8) / size}
    if case == "dora":
        tensors["lora_magnitude_vector"] = W0.norm(dim=1)
    (folder / "tuned").mkdir()
    save_file(
        {f"base_model.model.layer.0.q.{name}": value for name, value in tensors.items()},
        folder / "tuned" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": case == "dora"}
    (folder / "tuned" / "adapter_config.json").write_text(json.dumps(config))


def measure(folder: Path, epsilon: float, engine: str) -> dict[str, float]:
    """Bytes by which auditing ``folder`` raises this process's peak; run in a fresh process."""
    import io
    from contextlib import redirect_stdout

    from spectra.cli import main as spectra_command

    def audit(tuned: Path, base: Path) -> dict[str, Any]:
        text = io.StringIO()
        with redirect_stdout(text):
            spectra_command(
                [
                    "audit",
                    str(tuned),
                    "--base",
                    str(base),
                    "--epsilon",
                    str(epsilon),
                    "--engine",
                    engine,
                    "--format",
                    "json",
                ]
            )
        report: dict[str, Any] = json.loads(text.getvalue())
        return report

    def peak() -> int:
        # Not getrusage: its maximum survives exec and would include the parent's.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    tuned = folder / "tuned" if (folder / "tuned").is_dir() else folder / "tuned.safetensors"
    audit(FIXTURES / "dora-r16", FIXTURES / "base")
    before = peak()
    layer = audit(tuned, folder / "base.safetensors")["layers"][0]
    raised = peak() - before
    return {
        "bytes": raised,
        "settled": "settled_in_float64" in layer["flags"],
        "cosine": min(vector["max_cosine_bounds"][1] for vector in layer["vectors"]),
    }


def run_case(case: str, size: int) -> dict[str, float]:
    """The measurement of one case in a process of its own, with its ratio to the pair."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "case"
        write_case(folder, case, size)

        def child(epsilon: float) -> dict[str, float]:
            engine = "krylov" if case.endswith("krylov") else "exact"
            command = [sys.executable, __file__, "--child", str(folder), str(epsilon), engine]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            answer: dict[str, float] = json.loads(result.stdout)
            return answer

        answer = child(0.5)
        if case.endswith("settled"):
            answer = child(answer["cosine"])
        return answer | {"pairs": answer["bytes"] / (2 * 4 * size * size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "EPSILON", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Path(options.child[0]), float(options.child[1]), options.child[2])))
        return
    print(f"{'case':<14}{'size':>6}{'MiB':>9}{'pairs':>8}")
    for size in options.sizes:
        for case in CASES:
            answer = run_case(case, size)
            print(f"{case:<14}{size:>6}{answer['bytes'] / 2**20:>9.1f}{answer['pairs']:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
