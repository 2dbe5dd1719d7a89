"""The audit of a 7B-shaped model from its files, nothing cached: seconds and peak memory of the command.

Writes 32 layers of q, k, v, o, gate, up and down (224 weights, bfloat16, sharded safetensors, 13 GB) with heavy-tailed
noise and planted outliers, and a LoRA adapter of rank 16 of which every third layer is strong enough to plant intruders
among the top 10.  Then 8 such layers (with ``--full`` 32) with the spectra of SmolLM2's weights, module by module,
stretched to that size (``benchmarks/stretched.py``), and an adapter as faint as ordinary ones.  The exact engine audits
the first layer alone; its time for all is extrapolated.  Everything goes to ``--scratch`` and is deleted afterwards.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.memory import ROOT, peak
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from benchmarks.problems import ENTRY, factors, scaled_base, seeded, write_adapter
from benchmarks.stretched import FAINT, language_model_weights, stretched_base

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "A 7B-shaped model with a LoRA of rank 16"
SHARD = 1.4e9  # bytes
ALPHA = 2  # of the rank, as trainers do
STRENGTHS = (0.3, 2.0, 8.0)  # ‖dW‖ by layer, in units of a noise matrix's √n·entry: below, among, above the outliers


def weights(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """The linear modules of one layer with their shapes (out, in)."""
    square = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (width, width))
    return square | {
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


Make = Callable[[str, int, int, int, int], Tensor]


def planted(module: str, layer: int, m: int, n: int, seed: int) -> Tensor:
    """Heavy-tailed noise with outliers."""
    return scaled_base(m, n, seeded(seed))


def as_trained(quick: bool) -> Make:
    """Weights with the spectra of the language model's, module by module."""
    known = language_model_weights(quick)
    blocks = len({name.split(".")[2] for name in known})

    def make(module: str, layer: int, m: int, n: int, seed: int) -> Tensor:
        return stretched_base(known[f"model.layers.{layer % blocks}.{module}.weight"], m, n, seed)

    return make


def write_base(
    folder: Path, layers: range, shapes: dict[str, tuple[int, int]], shard: float = SHARD, make: Make = planted
) -> int:
    """A sharded bfloat16 checkpoint of these layers of a model; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": len(layers)}))
    each = 2 * sum(m * n for m, n in shapes.values())
    shards = max(1, round(len(layers) * each / shard))
    ends = [round((i + 1) * len(layers) / shards) for i in range(shards)]
    place: dict[str, str] = {}
    for number, end in enumerate(ends):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for layer in layers[ends[number - 1] if number else 0 : end]:
            for position, (module, (m, n)) in enumerate(shapes.items()):
                name = f"model.layers.{layer}.{module}.weight"
                tensors[name] = make(module, layer, m, n, 1000 * layer + position).bfloat16()
                place[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": len(layers) * each}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return len(layers) * each


def write_tuned(
    folder: Path,
    layers: range,
    shapes: dict[str, tuple[int, int]],
    rank: int,
    seed: int = 0,
    strength: float | None = None,
) -> Path:
    """An adapter of these layers: ‖dW‖₂ is ``strength``, or what makes intruders in every third planted layer."""
    modules = {}
    for layer in layers:
        for position, (module, (m, n)) in enumerate(shapes.items()):
            size = strength or STRENGTHS[(layer + seed) % len(STRENGTHS)] * ENTRY * max(m, n) ** 0.5
            generator = seeded(1_000_000 * (seed + 1) + 1000 * layer + position)
            modules[f"model.layers.{layer}.{module}"] = factors(m, n, rank, size / ALPHA, generator)
    return write_adapter(folder, modules, rank, ALPHA * rank)


def audit(report: Path, adapter: Path, base: Path, *more: str, cache: Path | None = None) -> dict[str, Any]:
    """Runs ``spectra audit`` as a process of its own: its report, seconds and peak resident bytes."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "spectra", "audit", str(adapter), "--base", str(base), "-o", str(report)]
    started = time.perf_counter()
    kept = ["--no-cache"] if cache is None else ["--cache", str(cache)]
    process = subprocess.Popen([*command, *kept, "--quiet", *more], cwd=ROOT)
    largest = 0
    while process.poll() is None:
        try:
            largest = max(largest, peak(process.pid))
        except (OSError, IndexError):  # it has just ended
            break
        time.sleep(0.02)
    if process.wait() != 0:
        raise RuntimeError(f"spectra audit ended with {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": largest, "report": json.loads(report.read_text())}


def run(options: Options) -> Iterator[Row | str]:
    layers = options.layers or options.scale(quick=3, default=32)
    yield from _rows("planted", layers, layers, options, planted, None)
    few = min(layers, options.scale(quick=1, default=8, full=layers))
    yield from _rows("SmolLM2's spectra", few, layers, options, as_trained(options.quick), FAINT)


def _rows(
    what: str, layers: int, all_layers: int, options: Options, make: Make, strength: float | None
) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=192, default=4096)
    shapes = weights(width, width * 43 // 16)  # 11008 at 4096
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        needed = layers * sum(2 * m * n + 4 * options.rank * (m + n) for m, n in shapes.values())
        free = shutil.disk_usage(home).free
        if needed * 1.05 > free:
            raise RuntimeError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; see --scratch")
        started = time.perf_counter()
        base, adapter, report = (Path(home) / name for name in ("base", "adapter", "report.json"))
        size = write_base(base, range(layers), shapes, SHARD if layers * width > 4096 else 1e6, make)
        write_tuned(adapter, range(layers), shapes, options.rank, strength=strength)
        shards = len(list(base.glob("*.safetensors")))
        yield f"{what}: {size / 1e9:.2f} GB in {shards} shards, written in {time.perf_counter() - started:.0f} s."
        libraries = audit(report, ROOT / "fixtures" / "lora-r1", ROOT / "fixtures" / "base")
        result = audit(report, adapter, base)
        first = audit(report, adapter, base, "--engine", "exact", "--include", "model.layers.0.*")
    count = all_layers * len(shapes)
    yield {"base": what} | _row("auto", result, count, libraries["peak"], options.rank, width)
    row = {"base": what} | _row("exact", first, count, libraries["peak"], options.rank, width)
    quick = [layer for layer in result["report"]["layers"] if layer["name"].startswith("model.layers.0.")]
    yield row | {"agrees": _verdicts(quick) == _verdicts(first["report"]["layers"])}


def _row(engine: str, result: dict[str, Any], weights: int, libraries: int, rank: int, width: int) -> Row:
    layers = result["report"]["layers"]
    inside = sum(layer["seconds"] for layer in layers)
    whole = result["seconds"] if len(layers) == weights else inside / len(layers) * weights
    return {
        "engine": engine,
        "width": width,
        "weights": weights,
        "measured": len(layers),
        "rank": rank,
        "seconds": result["seconds"],
        "seconds for all": whole,
        "GiB above the libraries": (result["peak"] - libraries) / 2**30,
        "answered by": _counted(layer["engine"] or layer["status"] for layer in layers),
        "status": _counted(layer["status"] for layer in layers),
        "intruders": sum(layer["intruders"] or 0 for layer in layers),
        "with intruders": sum(bool(layer["intruders"]) for layer in layers),
        "agrees": True,
    }


def _counted(values: Iterator[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(values).items()))


def _verdicts(layers: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {layer["name"]: list(layer["intruder_indices"]) for layer in layers}


def notes(rows: list[Row]) -> list[str]:
    return [
        *(
            f"{auto['base']}: auto, measured on {auto['measured']} of {auto['weights']} weights from bfloat16 files, "
            f"takes {auto['seconds for all'] / 60:.1f} minutes for all; exact, measured on {exact['measured']}, one of "
            f"each kind, {exact['seconds for all'] / 60:.0f} minutes, "
            f"{exact['seconds for all'] / auto['seconds for all']:.0f} times as long."
            for auto, exact in zip(rows[::2], rows[1::2], strict=True)
        ),
        "Peak memory is the process's resident size, above that of an audit of a tiny model.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    names = [
        f"{row['engine']}, {row['base']}" + ("" if row["measured"] == row["weights"] else ",\nextrapolated")
        for row in rows
    ]
    bars(axes, names, [row["seconds for all"] / 60 for row in rows])
    axes.set_xlabel(f"minutes for {rows[0]['weights']} weights")
