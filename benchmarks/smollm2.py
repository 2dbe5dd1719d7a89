"""A really trained adapter of a real language model, from end to end, against the incumbent in the same run.

SmolLM2-135M-Instruct is fine-tuned as in ``benchmarks/language_model.py`` (LoRA of rank 8 at an ordinary and at a far
too high learning rate, all 210 linear weights), and saved.  ``peft`` is one call of
``reduce_intruder_dimension`` on the model in memory, which finds the intruders and scales them down; ``repair`` is
``spectra.repair`` from the saved files to new ones, and ``audit`` the question alone, by each engine; ``compare`` is
``spectra.compare`` with random updates and the count by weight.  ``--quick`` takes the fixtures' base.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spectra
from benchmarks.language_model import Member, examples, prepared, taught
from benchmarks.options import Options, Row
from benchmarks.plots import bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "A trained adapter of SmolLM2-135M, end to end"
FAMILY = (Member("lora", 8, 1e-3), Member("lora", 8, 1e-2))


def run(options: Options) -> Iterator[Row | str]:
    steps = options.scale(quick=2, default=40)
    with prepared(options) as (home, model, encode):
        base, data = home / "base", examples(encode)
        for number, member in enumerate(FAMILY[: options.scale(quick=1, default=2)]):
            tuned = taught(type(model).from_pretrained(base), member, data, steps)
            adapter = home / f"adapter-{number}"
            tuned.save_pretrained(adapter)
            yield from _rows(member, tuned, adapter, base)


def _rows(member: Member, tuned: Any, adapter: Path, base: Path) -> Iterator[Row]:
    kept = adapter.parent / "kept"
    spectra.audit(adapter, base, cache=False)  # libraries and page cache are warm
    expected, plain = _timed(lambda: spectra.audit(adapter, base, engine="exact", cache=False))
    found, incumbent = _timed(lambda: _peft(tuned))
    counts = _counts(expected)

    def row(method: str, seconds: float, intruders: int, agrees: bool) -> Row:
        return {
            "rate": member.rate,
            "weights": len(expected.layers),
            "method": method,
            "seconds": seconds,
            "× peft": incumbent / seconds,
            "× exact": plain / seconds,
            "intruders": intruders,
            "agrees": agrees,
        }

    yield row("peft", incumbent, sum(found), sum(found) == sum(counts.values()))
    yield row("audit, exact", plain, sum(counts.values()), not expected.failed)
    report, seconds = _timed(lambda: spectra.audit(adapter, base, cache=False))
    yield row("audit, auto", seconds, report.total(), _counts(report) == counts)
    spectra.cache(base, cache=kept)
    report, seconds = _timed(lambda: spectra.audit(adapter, base, cache=kept))
    yield row("audit, kept spectra", seconds, report.total(), _counts(report) == counts)
    if any(counts.values()):
        place = adapter.parent / f"repaired-{adapter.name}"
        _, seconds = _timed(lambda: spectra.repair(adapter, base, scale=0.5, to=place, cache=False))
        yield row("repair", seconds, sum(counts.values()), place.exists())
    comparison, seconds = _timed(lambda: spectra.compare([adapter], base, cache=False))
    yield row("compare", seconds, comparison.reports[0].total(), _counts(comparison.reports[0]) == counts)


def _counts(report: spectra.Report) -> dict[str, int]:
    return {layer.name: layer.intruders or 0 for layer in report.layers}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - started


def _peft(tuned: Any) -> list[int]:
    """The intruders that PEFT names, weight by weight."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    said: list[str] = []
    reduce_intruder_dimension(  # type: ignore[no-untyped-call]
        tuned, top_k=10, threshold_epsilon=0.5, logging_sink=said.append
    )
    tuned.set_adapter("default")
    return [int(match[1]) for line in said if (match := re.search(r"Intruders: (\d+)", line))]


def notes(rows: list[Row]) -> list[str]:
    return [
        "peft: the model is in memory, and the call repairs as well; the others read files. "
        "Counts are compared with the exact engine's, peft's in sum."
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [f"{row['method']}, rate {row['rate']:g}" for row in rows], [row["seconds"] for row in rows], "{:.3g} s")
    axes.set_xlabel(f"seconds for {rows[0]['weights']} weights")
