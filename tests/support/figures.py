"""Records made by hand to draw figures of, and what is found in a figure that was drawn."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.text import Text

from spectra.plots.style import INTRUDER, styled
from spectra.records.comparison import Comparison
from spectra.records.layer import LayerSpectra, Vector
from spectra.records.report import LayerReport, Report, module_type

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}
LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
LONG = "meta-llama/Llama-3.1-8B-Instruct-lora-r16-alpha32-learning-rate-2e-4-epoch"


def vector(index, cosine, epsilon=0.5):
    return Vector(index, 10.0 - index, cosine, (cosine, cosine), index, 1.0, 0.5, "svd", cosine < epsilon, ())


def layer(name, cosines, *, size=0.1, rank=8, **changes):
    vectors = tuple(vector(index, float(cosine)) for index, cosine in enumerate(cosines))
    indices = tuple(one.index for one in vectors if one.intruder)
    made = LayerReport(
        name=name,
        module_type=module_type(name),
        role="linear",
        shape=(512, 512),
        stored_shape=(512, 512),
        status="analysed",
        update={"kind": "low_rank", "rank": rank, "parameters": 10, "dense_parameters": 100},
        vectors=vectors,
        intruders=len(indices),
        intruder_indices=indices,
        measures={"update_norm_relative": size, "effective_rank": 2.0 + size},
        random_floor=0.15,
        noise_like_base=False,
    )
    return replace(made, **changes)


def report(layers, path="runs/one", *, method="peft-lora", rank=8, top_k=10, epsilon=0.5):
    return Report(
        base={"path": "base", "format": "safetensors", "fingerprint": "x"},
        tuned={"path": path, "format": method, "fingerprint": path, "rank": rank},
        settings={"top_k": top_k, "epsilon": epsilon, "side": "left"},
        layers=tuple(layers),
        skipped=(),
        spectra_version="0",
    )


def model(depth, types, path="runs/one", *, seed=0, size=0.1, k=10, extra=(), **changes):
    """A report on a model of so many layers, with cosines drawn at random and spread a little less in each type."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{at}.{kind}" for at in range(depth) for kind in types] + list(extra)
    made = report([layer(name, rng.uniform(0.2, 1, k), size=size * rng.uniform(0.5, 1.5)) for name in names], path)
    return replace(made, tuned={**made.tuned, **changes})


def with_weights(made, weights=(0.25, 0.5, 1.0, 2.0)):
    """As a comparison fills in: counts at other weights and of random updates."""
    layers = []
    for place, one in enumerate(made.layers):
        counts = [[weight, min(10, round(one.intruders * weight))] for weight in weights]
        study = {"threshold": 0.3 + place / 100, "predicted": 0.3, "counts": counts}
        null = {"draws": 2, "counts": [1, 3], "mean": 2.0, "p_value": 0.5}
        layers.append(replace(one, weights=study, null=null))
    return replace(made, layers=tuple(layers))


def compared(reports):
    pairs = itertools.combinations(range(len(reports)), 2)
    overlaps = [{"a": a, "b": b, "overlap": (a + b) / 30, "random": 0.02, "layers": []} for a, b in pairs]
    return Comparison(tuple(with_weights(one) for one in reports), tuple(overlaps), "0")


def arrays(m=40, n=30, *, tuned="one", name="model.layers.0.q", k=10, intruders=(1, 4), dense=False, seed=0):
    rng = np.random.default_rng(seed)
    vectors = tuple(vector(index, 0.2 if index in intruders else 0.9) for index in range(k))
    values = np.sort(rng.uniform(0.1, 5, max(m, n)))[::-1]
    return LayerSpectra(
        name, "q", tuned, "dense" if dense else "low_rank", (m, n), "left", 0.5, values, values * 1.1,
        values / 10 if dense else values[:4] / 3, rng.uniform(0, 1, (m, n)), vectors, 0.2 if dense else None,
    )  # fmt: skip


METHODS = (("peft-lora", 4), ("peft-lora", 16), ("peft-rslora", 16), ("peft-dora", 16), ("full", None), ("full", None))
SEVERAL = [
    model(4, LLAMA, f"runs/checkpoint-{100 * (i + 1)}", seed=i, size=0.03 * (i + 1), format=method, rank=rank)
    for i, (method, rank) in enumerate(METHODS)
]
SEVERAL = [
    replace(one, layers=tuple(replace(x, update={**x.update, "rank": one.tuned["rank"]}) for x in one.layers))
    for one in SEVERAL
]
TWELVE = [model(12, LLAMA, f"hub/{LONG}-{i}", seed=i, size=0.01 * 1.6**i, rank=2 ** (i // 2)) for i in range(12)]
SOURCES = {
    "comparison": {
        "one": compared([model(4, LLAMA)]),
        "several": compared(SEVERAL),
        "twelve with long names": compared(TWELVE),
        "224 layers": compared([model(32, LLAMA, f"{LONG}-{i}") for i in range(2)]),
        "odd names": compared([model(2, ["a$b$", "_c"], path) for path in ("runs/_first", "runs/$x$ and $y")]),
        "no depth": compared([model(2, ["q"], path, extra=("pooler.dense",)) for path in ("a", "b")]),
    },
    "layers": {
        "one": [arrays()],
        "several": [arrays(tuned=name, dense=name == "full") for name in ("lora", "dora", "full")],
        "twelve with long names": [arrays(160, 160, tuned=f"{LONG}-{i}", name=LONG) for i in range(12)],
        "both": [arrays(tuned=tuned, name=name) for tuned in ("a", "b") for name in ("layer.0.q", "layer.1.q")],
        "ten by ten": [arrays(10, 10)],
        "odd names": [arrays(tuned=tuned) for tuned in ("_first", "$x$ and $y")],
    },
}
# A trajectory needs a run's checkpoints.
STEPS = [replace(one, tuned={**one.tuned, "path": f"run/checkpoint-{i}"}) for i, one in enumerate(SEVERAL)]


def drawn(kind, source):
    """The figure; of the checkpoints of one run for what needs these."""
    if kind.function == "trajectory":
        source = replace(source, reports=tuple(
            replace(one, tuned={**one.tuned, "path": f"{LONG}/checkpoint-{place}"})
            for place, one in enumerate(source.reports * 2)
        ))  # fmt: skip
    return kind.draw(source)


def of(axes, label):
    """The line with a label."""
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def points(line):
    return [tuple(map(float, point)) for point in line.get_xydata()]


def heights(axes):
    """Where there is a line straight across."""
    ys = [np.asarray(line.get_ydata()) for line in axes.lines if len(line.get_xydata()) == 2]
    return [float(y[0]) for y in ys if y[0] == y[1]]


def marks(axes, color=INTRUDER):
    """The points that are marked as intruders."""
    return [
        point
        for line in axes.lines
        if line.get_marker() in ("v", 7, 2) and to_hex(line.get_color()) == to_hex(color)
        for point in points(line)
    ]


def faults(figure):
    figure.draw_without_rendering()
    with styled():  # ticks are found anew when they are asked for
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 3
    found: list[tuple[str, ...]] = []
    edge = figure.bbox
    for text, box in boxes:
        if box.x0 < edge.x0 - 1 or box.x1 > edge.x1 + 1 or box.y0 < edge.y0 - 1 or box.y1 > edge.y1 + 1:
            found.append(("cut off", text))
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        if min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)) > 1:
            found.append(("written over", one, other))
    return found


def texts(figure):
    """What is written in the figure: ticks that lie outside the limits are not."""
    ticks = {id(text) for axis in figure.findobj(Axis) for text in axis.findobj(Text)}
    found = [text for text in figure.findobj(Text) if id(text) not in ticks]
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        if not axis.get_visible() or not axis.axes.axison:
            continue
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                found += [label for label in (tick.label1, tick.label2) if label.get_visible()]
        found.append(axis.label)
    return [text for text in found if text.get_visible() and text.get_text().strip()]
