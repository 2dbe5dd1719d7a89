"""The HTML report of models of several sizes: its bytes, and the seconds until it can be read, and used.

The records are made up: top 10 vectors of each layer, 7 module types, one layer in three with intruders, 12
similarity matrices of 64 × 64.  ``open`` is from the navigation to the verdict being drawn, ``map`` until every panel
of the map that is in view is drawn too, ``recount`` one step of the slider with everything drawn, all in headless
Chromium from a file; without Chromium only the bytes are measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import spectra
from benchmarks.browser import browser, chromium, until
from benchmarks.options import Options, Row
from benchmarks.plots import bars
from spectra.records.layer import Similarity, Vector
from spectra.records.report import LayerReport, Report, worst_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from playwright.sync_api import Browser, Page

TITLE = "The HTML report"
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TOP_K, MATRICES, SIZE = 10, 12, 64
LIMIT_BYTES, LIMIT_SECONDS = 10e6, 2.0  # of 224 layers: "a second or two", "about 10 MB"


def run(options: Options) -> Iterator[Row | str]:
    sizes = options.sizes or options.scale(quick=(28,), default=(28, 224, 896, 6144))
    for layers in sizes:
        report = made_up(layers, seed=options.seed)
        started = time.perf_counter()
        html = spectra.to_html(report, matrices=made_up_matrices(report, options.seed))
        row: Row = {"layers": layers, "MB": len(html.encode()) / 1e6, "written": time.perf_counter() - started}
        if chromium() is not None:
            with tempfile.TemporaryDirectory(dir=options.scratch) as home:
                file = Path(home) / "page.html"
                file.write_text(html)
                with browser() as running:
                    runs = [opened(file, running) for _ in range(options.repeat)]
            row |= {key: sorted(one[key] for one in runs)[len(runs) // 2] for key in runs[0]}
        # Seconds are held to the limit where somebody measures, not where other tests share the cores.
        quick_enough = options.quick or row.get("open", 0) < LIMIT_SECONDS
        row["agrees"] = layers > 224 or (row["MB"] * 1e6 < LIMIT_BYTES and quick_enough)
        yield row


def notes(rows: list[Row]) -> list[str]:
    return ["Medians. plotly.js is 2.0 MB of each file; it is unpacked when the first figure comes into view."]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [f"{row['layers']} layers" for row in rows], [row.get("map") or row["MB"] for row in rows])
    axes.set_ylabel("seconds" if "map" in rows[0] else "MB")


def opened(file: Path, running: Browser) -> dict[str, float]:
    """Seconds to open a page, to have its map in view drawn, and to recount."""
    context = running.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    try:
        started = time.perf_counter()
        page.goto(file.as_uri())
        page.locator("#recount b").wait_for()
        seen = time.perf_counter() - started
        page.locator("#map .plot .main-svg").first.wait_for()
        until(page, "[...figures.values()].every((one) => one.drawn || !one.seen)")
        return {"open": seen, "map": time.perf_counter() - started, "recount": recounted(page)}
    finally:
        context.close()


def recounted(page: Page) -> float:
    """Seconds of one step of epsilon, until everything in view is drawn again."""
    seconds: float = page.evaluate(
        """async () => {
            const started = performance.now();
            setEpsilon(6100);
            await redraw();
            return (performance.now() - started) / 1000;
        }"""
    )
    return seconds


def made_up(layers: int, *, seed: int = 0, bounded: float = 0.0) -> Report:
    """A report on so many layers; of a share ``bounded`` of the vectors only bounds are known."""
    rng = np.random.default_rng(seed)
    return Report(
        base={"path": "made-up/base", "format": "safetensors", "fingerprint": "sha256:" + "0" * 64},
        tuned={"path": "made-up/adapter", "format": "peft-lora", "rank": 16, "alpha": 32, "scaling": 2.0},
        settings={"top_k": TOP_K, "epsilon": 0.5, "side": "left", "engine": "auto", "dtype": "float32"},
        layers=tuple(_layer(number, rng, bounded) for number in range(layers)),
        skipped=(),
        spectra_version=spectra.__version__,
    )


def made_up_matrices(report: Report, seed: int = 0) -> list[Similarity]:
    rng, (label,) = np.random.default_rng(seed), ("adapter",)
    cosines = np.clip(np.eye(SIZE) * 0.9 + rng.exponential(0.04, size=(SIZE, SIZE)), 0, 1)
    return [Similarity(layer.name, label, "left", cosines) for layer in worst_layers(report, MATRICES)]


def _layer(number: int, rng: np.random.Generator, bounded: float) -> LayerReport:
    kind = MODULES[number % len(MODULES)]
    low = 0.2 if number % 3 == 0 else 0.55
    vectors = []
    for index in range(TOP_K):
        cosine = float(rng.uniform(low, 1))
        known = rng.random() >= bounded
        bounds = (cosine, cosine) if known else (0.0, cosine) if cosine < 0.5 else (cosine, 1.0)
        sigma, base = float(20 / (index + 1)), int(rng.integers(0, 40))
        vectors.append(
            Vector(
                index, sigma, cosine if known else None, bounds, base if known else None, sigma if known else None,
                0.8, "svd" if known else "certificate", cosine < 0.5, (),
            )
        )  # fmt: skip
    intruders = tuple(vector.index for vector in vectors if vector.intruder)
    return LayerReport(
        name=f"model.layers.{number // len(MODULES)}.{kind}",
        module_type=kind,
        role="linear",
        shape=(4096, 4096),
        stored_shape=(4096, 4096),
        status="analysed",
        update={"kind": "low_rank", "rank": 16, "alpha": 32, "scaling": 2.0, "parameters": 131072,
                "dense_parameters": 4096**2},
        vectors=tuple(vectors),
        intruders=len(intruders),
        intruder_indices=intruders,
        measures={"update_norm_relative": float(rng.uniform(0.05, 0.4)), "effective_rank": float(rng.uniform(4, 16)),
                  "stable_rank": float(rng.uniform(2, 8))},
        random_floor=0.06,
        noise_like_base=False,
        engine="krylov" if bounded else "cached",
        methods=("block lanczos",),
        residual=1e-7,
    )  # fmt: skip
