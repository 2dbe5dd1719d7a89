"""What an audit of a large model costs: seconds, bytes and memory, predicted and measured.

Layers of a 7B-shaped model lie in one sharded checkpoint; the seconds of more than three are predicted from those of
three.  70B-shaped layers are made, audited and deleted one at a time; they, and attention weights of the 405B shape,
are predicted by the law that the weights before them gave: seconds = c·(m·n)^p.  One layer in three is too weak, one
about strong enough and one clearly strong enough for intruders.  Every audit is a process of its own, with nothing
cached; models are synthetic (bfloat16, LoRA of rank 16) and deleted again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import spectra
from benchmarks.memory import ROOT
from benchmarks.options import Options, Row
from benchmarks.plots import look
from benchmarks.seven_b import STRENGTHS, audit, write_base, write_tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "What large models cost"
# width, inner width, width of keys and values, layers
MODELS = {"7B": (4096, 11008, 4096, 32), "70B": (8192, 28672, 1024, 80), "405B": (16384, 53248, 1024, 126)}
TINY = {"7B": (192, 512, 192, 4), "70B": (256, 896, 64, 4), "405B": (384, 1280, 64, 4)}
ADAPTERS = (1, 10, 100, 1000)
CYCLE = len(STRENGTHS)
TOGETHER = 4  # adapters in one run, to see what each more costs

Shapes = dict[str, tuple[int, int]]


def shapes_of(width: int, inner: int, narrow: int) -> Shapes:
    """The linear modules of one layer with their shapes (out, in)."""
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def size_of(shapes: Shapes) -> int:
    return sum(m * n for m, n in shapes.values())


class Measured:
    """Audits of synthetic layers, each in a process, and the weights they looked at."""

    def __init__(self, home: Path, rank: int):
        self._home, self._rank = home, rank
        self.weights: list[tuple[float, float]] = []  # m·n, seconds
        self._libraries = audit(home / "tiny.json", ROOT / "fixtures" / "lora-r1", ROOT / "fixtures" / "base")

    @property
    def startup(self) -> float:
        """Seconds of a command that has next to nothing to do."""
        inside = sum(layer["seconds"] for layer in self._libraries["report"]["layers"])
        return float(self._libraries["seconds"] - inside)

    def __call__(self, layers: range, shapes: Shapes) -> dict[str, Any]:
        """The facts of one audit; the model is there only as long as that takes."""
        with tempfile.TemporaryDirectory(dir=self._home) as folder:
            place = Path(folder)
            stored = write_base(place / "base", layers, shapes)
            write_tuned(place / "adapter", layers, shapes, self._rank)
            result = audit(place / "report.json", place / "adapter", place / "base")
        looked_at = result["report"]["layers"]
        self.weights += [(float(np.prod(layer["shape"])), layer["seconds"]) for layer in looked_at]
        return {
            "seconds": result["seconds"],
            "inside": sum(layer["seconds"] for layer in looked_at),
            "stored": stored,
            "memory": (result["peak"] - self._libraries["peak"]) / 2**30,
            "agrees": all(layer["status"] in ("analysed", "proved_small") for layer in looked_at),
        }

    def law(self) -> Callable[[Shapes], float]:
        """The seconds that weights of other shapes should take, from the means of those measured so far."""
        by_size: dict[float, list[float]] = {}
        for size, seconds in self.weights:
            by_size.setdefault(size, []).append(seconds)
        means = [(size, sum(times) / len(times)) for size, times in by_size.items()]
        sizes, seconds_of = np.log(np.array(means, dtype=float)).T
        line = np.polyfit(sizes, seconds_of, 1)

        def predicted(shapes: Shapes) -> float:
            return sum(float(np.exp(np.polyval(line, np.log(float(m) * n)))) for m, n in shapes.values())

        return predicted


def run(options: Options) -> Iterator[Row | str]:
    models = TINY if options.quick else MODELS
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        measured = Measured(Path(home), options.rank)
        yield f"Starting takes {measured.startup:.1f} s, of which no weight is the reason."
        shapes = shapes_of(*models["7B"][:3])
        few = measured(range(CYCLE), shapes)
        layer = max(few["seconds"] - measured.startup, few["inside"]) / CYCLE
        yield _row("7B", CYCLE, few, None)
        for layers in options.scale(quick=(6,), default=(6, 12), full=(6, 12, 32)):
            yield _row("7B", layers, measured(range(layers), shapes), measured.startup + layers * layer)
        yield from _adapters(Path(home), shapes, models["7B"][3], layer, measured.startup, options.rank)
        shapes = shapes_of(*models["70B"][:3])
        law, deep = measured.law(), 0.0
        count = options.layers or CYCLE
        for i in range(count):
            facts = measured(range(i, i + 1), shapes)
            yield _row(f"70B, layer {i}", 1, facts, measured.startup + law(shapes))
            deep += max(facts["seconds"] - measured.startup, facts["inside"]) / count
        yield _total("70B", models["70B"], deep, measured.startup)
        law = measured.law()
        query = {"self_attn.q_proj": shapes_of(*models["405B"][:3])["self_attn.q_proj"]}
        facts = measured(range(CYCLE), query)
        yield _row("405B, q_proj alone", CYCLE, facts, measured.startup + CYCLE * law(query))
        yield _total("405B", models["405B"], measured.law()(shapes_of(*models["405B"][:3])), measured.startup)


def _row(model: str, layers: int, facts: dict[str, Any], predicted: float | None) -> Row:
    return {
        "model": model,
        "layers": layers,
        "GB stored": facts["stored"] / 1e9,
        "seconds": facts["seconds"],
        "predicted": predicted,
        "seconds/predicted": facts["seconds"] / predicted if predicted else None,
        "GiB above the libraries": facts["memory"],
        "agrees": facts["agrees"],
    }


def _total(name: str, model: tuple[int, int, int, int], layer: float, startup: float) -> str:
    stored = 2 * model[3] * size_of(shapes_of(*model[:3]))
    return (
        f"All {model[3]} layers of the {name} shape ({stored / 1e9:.0f} GB in bfloat16) would take "
        f"{(startup + model[3] * layer) / 60:.0f} minutes, {layer:.1f} s a layer."
    )


def _adapters(home: Path, shapes: Shapes, layers: int, alone: float, startup: float, rank: int) -> Iterator[Row | str]:
    """What many adapters of that base cost, from one layer of it: each by itself, or with the base's spectra kept."""
    alike = {shape: [name for name in shapes if shapes[name] == shape] for shape in shapes.values()}
    one_of_each = {names[0]: shape for shape, names in alike.items()}
    once, stored = 0.0, 0
    with tempfile.TemporaryDirectory(dir=home) as folder:
        place = Path(folder)
        write_base(place / "base", range(1), one_of_each)
        for seed in range(TOGETHER):
            write_tuned(place / "adapters" / str(seed), range(1), one_of_each, rank, seed)
        for name, shape in one_of_each.items():
            started = time.perf_counter()
            kept = spectra.cache(place / "base", cache=place / "kept", include=[f"*{name}"])
            once += len(alike[shape]) * (time.perf_counter() - started)
            stored += len(alike[shape]) * kept.bytes
        tuned = [place / "adapters" / str(seed) for seed in range(TOGETHER)]
        reports = spectra.audit_many(tuned, place / "base", cache=place / "kept")
    first, more = 0.0, 0.0
    for number, report in enumerate(reports):
        for layer in report.layers:
            seconds = len(alike[layer.shape]) * (layer.seconds or 0.0)
            first, more = (first + seconds, more) if number == 0 else (first, more + seconds / (TOGETHER - 1))
    for count in ADAPTERS:
        by_itself = (startup + layers * alone) * count
        together = startup + layers * (once + first + more * (count - 1))
        yield (
            f"{count} adapter{'s' * (count > 1)} of the 7B-shaped base: {by_itself / 3600:.2f} h one by one, "
            f"{together / 3600:.2f} h in one run (its spectra {layers * once / 60:.0f} minutes, once for all runs, "
            f"{layers * stored / 1e9:.0f} GB; then {layers * more:.0f} s an adapter)."
        )


def notes(rows: list[Row]) -> list[str]:
    seven = [row for row in rows if row["model"] == "7B"]
    apart = [row["seconds/predicted"] for row in rows if row["seconds/predicted"]]
    return [
        f"Memory above the libraries with {seven[0]['layers']} to {seven[-1]['layers']} layers of the 7B shape: "
        f"{min(row['GiB above the libraries'] for row in seven):.2f} to "
        f"{max(row['GiB above the libraries'] for row in seven):.2f} GiB.",
        f"Measured over predicted seconds: {min(apart):.2f} to {max(apart):.2f}.",
        "Totals for models that were not measured as a whole are predictions.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    shown = [row for row in rows if row["predicted"]]
    x, y = [row["predicted"] for row in shown], [row["seconds"] for row in shown]
    axes.plot(x, y, **look("krylov"), linestyle="none")
    ends = [min(x) / 1.5, max(x) * 1.5]
    axes.plot(ends, ends, linewidth=0.8, color="gray")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds predicted")
    axes.set_ylabel("seconds measured")
