"""Runs benchmarks and writes, for each, a table (Markdown, JSON, CSV) and a plot (PNG, SVG).

    python -m benchmarks                      # all of them, at full size: hours
    python -m benchmarks engines growth       # some
    python -m benchmarks --quick              # all at toy sizes: that they work, in under two minutes

Exit code 1 if any method's answer differed from the definition's, or a benchmark failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.options import Benchmark, Options, Row
from benchmarks.plots import write_plot
from benchmarks.tables import machine, text, write_table
from spectra.runs.neighbours import let_others_work

# What each one measures is its module's docstring.
NAMES = (
    "engines", "growth", "seven_b", "memory", "ten_adapters", "hundred_adapters", "workers", "neighbours", "scale",
    "cuda", "comparison", "nulls", "chance", "repair", "fixtures", "trained", "training", "language_model", "smollm2",
    "reading", "page", "proof", "proof_trained", "fuzz",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    let_others_work()  # before torch is loaded, as the command does, so that figures are what its users get
    parser = _parser()
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    chosen = Options(
        quick=options.quick,
        full=options.full,
        repeat=options.repeat or (1 if options.quick else 5),
        sizes=tuple(options.sizes) if options.sizes else None,
        rank=options.rank,
        width=options.width,
        layers=options.layers,
        workers=options.workers,
        scratch=options.scratch,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(*(f"{key}: {value}" for key, value in facts.items()), sep=", ", flush=True)
    bad = []
    for name in options.names or NAMES:
        started = time.perf_counter()
        module: Any = importlib.import_module(f"benchmarks.{name}")
        print(f"\n{name}: {module.TITLE}", flush=True)
        try:
            agrees = run(name, module, chosen, options.output, facts)
        except Exception:
            traceback.print_exc()
            agrees = False
        if not agrees:
            bad.append(name)
        print(
            f"{name}: {time.perf_counter() - started:.0f} s" + ("" if agrees else ", NOT as it should be"), flush=True
        )
    if bad:
        print(f"failed or differing: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


def run(name: str, module: Benchmark, options: Options, output: Path, facts: dict[str, Any]) -> bool:
    """One benchmark, its rows printed as they come; whether all its answers agree."""
    rows: list[Row] = []
    said: list[str] = []
    for row in module.run(options):
        if isinstance(row, str):
            print(f"  {row}", flush=True)
            said.append(row)
            continue
        print("  " + "  ".join(f"{key} {text(value)}" for key, value in row.items() if value is not None), flush=True)
        rows.append(row)
    more = module.notes(rows)
    print(*(f"  {line}" for line in more), sep="\n", flush=True)
    said += more
    write_table(output / name, module.TITLE, rows, said, facts)
    write_plot(module.draw, rows, module.TITLE, output / name)
    return all(row.get("agrees", True) for row in rows)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--full", action="store_true", help="also what takes many minutes more: 8192, long weights")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for models, deleted again; seven_b needs 14 GB")
    parser.add_argument("--repeat", type=int, metavar="N", help="runs after the warm-up, as time allows (default: 5)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="N", help="of engines, growth, memory, comparison, repair"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRAs (default: 16)")
    width = "of seven_b (4096), ten_adapters, workers, trained (2048), hundred_adapters and training (1024)"
    layers = "of seven_b (32), workers (6), ten_adapters, hundred_adapters (4), scale (3 of 70B) and comparison (2)"
    parser.add_argument("--width", type=int, help=width)
    parser.add_argument("--layers", type=int, help=layers)
    parser.add_argument("--workers", type=int, default=2, help="of proof and workers (default: 2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
