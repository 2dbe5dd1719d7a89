"""Ten LoRA adapters (rank 4 to 32) of one base, audited together: each base weight is read and decomposed once.

Bases are planted, and have the spectra of SmolLM2's weights, stretched, with adapters from faint to strong
(``benchmarks/stretched.py``).  ``on disk`` has the base's spectra kept by ``spectra.cache`` before (its seconds are
said below).  ``exact`` is measured with one adapter and with two, and extrapolated; ``peft`` with one, times ten.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

import spectra
from benchmarks.methods import peft
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import ENTRY, Problem, factors, scaled_base, seeded, write_adapter
from benchmarks.stretched import FAINT, STRONG, language_model_weights, stretched_base

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from spectra import Report

TITLE = "Ten adapters of one base"
RANKS = (4, 8, 8, 12, 16, 16, 16, 24, 32, 32)
STRENGTHS = (4.0, 7.0, 10.0)  # ‖dW‖ in units of a noise matrix's √n·entry; the outliers go from 12 to 3
RELATIVE = (FAINT, 0.3, STRONG)  # to σ₁, of trained spectra


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=192, default=2048)
    layers = options.layers or options.scale(quick=2, default=4)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(layers)]
    bases = {name: scaled_base(width, width, seeded(i)) for i, name in enumerate(names)}
    units = [strength * ENTRY * width**0.5 for strength in STRENGTHS]
    yield from _rows("planted", bases, units, options)
    known = language_model_weights(options.quick)
    bases = {name: stretched_base(known[f"{name}.weight"], width, width, i) for i, name in enumerate(names)}
    yield from _rows("SmolLM2's spectra", bases, list(RELATIVE), options)


def _rows(what: str, bases: dict[str, Tensor], units: list[float], options: Options) -> Iterator[Row | str]:
    width = next(iter(bases.values())).shape[0]
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        base, root = Path(home) / "base", Path(home) / "cache"
        base.mkdir()
        save_file({f"{name}.weight": W0 for name, W0 in bases.items()}, base / "model.safetensors")
        adapters, modules = [], {}
        for number, rank in enumerate(RANKS):
            unit = units[number % len(units)]
            modules = {
                name: factors(width, width, rank, unit, seeded(100 * number + i + 7)) for i, name in enumerate(bases)
            }
            adapters.append(write_adapter(Path(home) / f"adapter-{number}", modules, rank, rank))

        def audited(count: int, engine: str, cache: Any = False) -> tuple[float, list[Report]]:
            started = time.perf_counter()
            reports = spectra.audit_many(adapters[:count], base, engine=engine, cache=cache)
            return time.perf_counter() - started, reports

        audited(1, "auto")  # libraries and page cache are warm
        one, _ = audited(1, "exact")
        two, exact = audited(2, "exact")
        answers = [peft(Problem("lora", W0, *modules[name]))() for name, W0 in bases.items()]
        incumbent = len(RANKS) * sum(answer.seconds or 0.0 for answer in answers)

        def row(method: str, seconds: float, reports: list[Report], how: str = "measured") -> Row:
            return {
                "base": what,
                "method": method,
                "seconds": seconds,
                "× peft": incumbent / seconds,
                "how": how,
                "answered by": " ".join(sorted({layer.engine or layer.status for r in reports for layer in r.layers})),
                "adapters": len(reports),
                "intruders": sum(map(_count, reports)),
                "agrees": all(_verdicts(a) == _verdicts(b) for a, b in zip(reports, exact, strict=False)),
            }

        yield {
            "base": what,
            "method": "peft",
            "seconds": incumbent,
            "× peft": 1.0,
            "how": f"the last one, times {len(RANKS)}",
            "answered by": "peft",
            "adapters": 1,
            "intruders": sum(answer.count for answer in answers),
            "agrees": sum(answer.count for answer in answers) == _count(spectra.audit(adapters[-1], base, cache=False)),
        }
        yield row("exact", one + (len(RANKS) - 1) * (two - one), exact, "extrapolated from 1 and 2")
        for method in ("krylov", "cached", "auto"):
            yield row(method, *audited(len(RANKS), method))
        started = time.perf_counter()
        spectra.cache(base, cache=root)
        preparing = time.perf_counter() - started
        yield f"{what}: the spectra were put on disk in {preparing:.1f} s, once for all audits of this base."
        audited(1, "auto", root)
        yield row("auto, on disk", *audited(len(RANKS), "auto", root))


def _count(report: Report) -> int:
    return sum(map(len, _verdicts(report).values()))


def _verdicts(report: Report) -> dict[str, tuple[int, ...]]:
    return {layer.name: tuple(layer.intruder_indices) for layer in report.layers}


def notes(rows: list[Row]) -> list[str]:
    return [
        "Whole audits, reading included, all adapters in one call of audit_many; agrees compares the indices of the "
        "first two adapters with exact's, and peft's number with this package's.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    order = sorted(rows, key=lambda row: -float(row["seconds"]))
    bars(axes, [f"{row['method']}, {row['base']}" for row in order], [row["seconds"] for row in order], "{:.3g} s")
    axes.set_xlabel(f"seconds for {len(RANKS)} adapters")
