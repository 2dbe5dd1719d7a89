"""The pictures of the documentation, drawn when it is built: seeded, from the fixtures or from small matrices.

Each function returns a figure in the style of ``spectra.plots``; the page that shows it gives it its colours.
The picture of the README is a file, in a light and a dark version; ``python docs/figures.py`` writes both again.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import spectra
from spectra import plots
from spectra.analysis.detect import NOISE_EDGE, random_floor
from spectra.plots.style import (
    BLACK,
    BLUE,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    SINGLE,
    SMALL,
    VERMILLION,
    figure_function,
    new_figure,
)
from spectra.records.layer import LayerSpectra
from spectra.records.report import LEVELS, Report

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEMBERS = ("lora-r1", "lora-r4", "lora-r16", "lora-r64", "rslora-r16", "dora-r16", "full")
BASE = FIXTURES / "base"
LAYER = "model.layers.0.self_attn.v_proj"


@cache
def layer_spectra() -> list[LayerSpectra]:
    """One layer of a LoRA and of the full fine-tune."""
    return spectra.layer_spectra([FIXTURES / "lora-r4", FIXTURES / "full"], BASE, include=[LAYER])


@cache
def reports() -> tuple[Report, ...]:
    """The seven members of the family at their defaults."""
    return tuple(spectra.audit_many([FIXTURES / name for name in MEMBERS], BASE, threads=1))


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


@figure_function
def singular_vectors() -> Figure:
    """A circle, and the ellipse that a matrix makes of it."""
    W = np.array([[1.9, 0.7], [0.4, 1.1]])
    U, s, Vh = np.linalg.svd(W)
    figure = new_figure(DOUBLE * 0.8, 1.9)
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    shown = ((circle, Vh, "what goes in", "v"), (W @ circle, U.T * s[:, None], "what comes out: W times it", "u"))
    for axes, (curve, arrows, title, letter) in zip(figure.subplots(1, 2), shown, strict=True):
        axes.plot(*curve, color=GREY)
        for number, (arrow, colour) in enumerate(zip(arrows, (BLUE, VERMILLION), strict=True), 1):
            sign = np.sign(arrow[0])
            label = f"{letter}{'₁₂'[number - 1]}" if letter == "v" else f"σ{'₁₂'[number - 1]}u{'₁₂'[number - 1]}"
            axes.annotate(
                "", sign * arrow, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
            )
            axes.annotate(
                label, sign * arrow, textcoords="offset points", xytext=(6, 4 if number == 1 else -12), color=colour
            )
        axes.set(aspect="equal", xlim=(-2.7, 2.7), ylim=(-1.45, 1.45), xticks=[], yticks=[], title=title)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def _bars(axes: Axes, cosines: np.ndarray, title: str, intruder: bool) -> None:
    axes.bar(range(len(cosines)), cosines, width=0.8, color=BLUE if intruder else GREY)
    axes.axhline(0.5, color=BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
    axes.text(len(cosines) - 0.5, 0.52, "ε = 0.5", ha="right", va="bottom", fontsize=SMALL)
    axes.set(ylim=(0, 1.05), title=title, xlabel="singular vector of W0")


@figure_function
def intruder() -> Figure:
    """|cos| of three tuned vectors with every base vector: one that stayed, one that mixed, an intruder."""
    rng = np.random.default_rng(3)
    size, count = 60, 40
    stayed = np.eye(size)[4] + 0.03 * rng.normal(size=size)
    mixed = 0.78 * np.eye(size)[6] + 0.6 * np.eye(size)[9] + 0.02 * rng.normal(size=size)
    spread = rng.normal(size=size)
    figure = new_figure(DOUBLE, 2.1)
    titles = ("still there", "mixed with a neighbour", "an intruder dimension")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, vector, title in zip(panels, (stayed, mixed, spread), titles, strict=True):
        _bars(axes, np.abs(vector / np.linalg.norm(vector))[:count], title, vector is spread)
    panels[0].set_ylabel("|cos| with the tuned vector")
    return figure


@figure_function
def floor() -> Figure:
    """What a random direction shows, against the size of the weight."""
    sizes = np.unique(np.logspace(np.log2(24), 13, 60, base=2).astype(int))
    figure = new_figure(SINGLE * 1.3, 2.3)
    axes = figure.subplots()
    axes.plot(sizes, [random_floor(int(size), int(size)) for size in sizes], color=BLUE)
    axes.axhline(0.5, color=BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
    axes.text(8192, 0.51, "ε = 0.5", ha="right", va="bottom", fontsize=SMALL)
    axes.axvspan(24, 128, color=ORANGE, alpha=0.25, linewidth=0)
    axes.text(27, 0.03, "narrow layers:\nthe report warns", fontsize=SMALL)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(24, 8192), ylim=(0, 0.6), xlabel="width of a square weight", ylabel="largest |cos|, on average")
    axes.set_xticks([32, 128, 512, 2048, 8192], labels=["32", "128", "512", "2048", "8192"])
    return figure


@figure_function
def bounds() -> Figure:
    """Enclosures of three cosines, and what each of them settles."""
    shown = (
        (0.81, 0.97, GREY, "proved: no intruder"),
        (0.16, 0.41, BLUE, "proved: an intruder"),
        (0.44, 0.56, VERMILLION, "open: decided in float64"),
    )
    figure = new_figure(SINGLE * 1.4, 1.6)
    axes = figure.subplots()
    for place, (low, high, colour, words) in enumerate(shown):
        axes.plot([low, high], [-place] * 2, color=colour, linewidth=6, solid_capstyle="butt")
        at, aligned = (
            (high + 0.02, "left") if low < 0.5 < high else (low - 0.02, "right") if low > 0.5 else (low, "left")
        )
        below = 0.0 if low > 0.5 or high > 0.5 else 0.45
        axes.text(at, below - place, words, ha=aligned, va="center", fontsize=SMALL)
    axes.axvline(0.5, color=BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
    axes.text(0.505, 0.45, "ε", fontsize=SMALL)
    axes.set(xlim=(0, 1), ylim=(-2.4, 0.7), yticks=[], xlabel="max |cos| with the base: between these bounds")
    axes.spines["left"].set_visible(False)
    return figure


@figure_function
def noise() -> Figure:
    """The singular values of a trained weight and of noise of its size."""
    layer = spectra.layer_spectra([FIXTURES / "full"], BASE, include=["model.layers.3.mlp.up_proj"], size=10)[0]
    m, n = layer.shape
    values = layer.base_values
    scale = float(np.sqrt((values**2).sum() / (m * n)))
    plain = np.linalg.svd(np.random.default_rng(1).normal(size=(m, n)) * scale, compute_uv=False)
    edge = NOISE_EDGE * scale * (np.sqrt(m) + np.sqrt(n))
    figure = new_figure(SINGLE * 1.4, 2.4)
    axes = figure.subplots()
    axes.plot(values, color=BLUE, label=f"a trained weight ({m}×{n})")
    axes.plot(plain, color=VERMILLION, linestyle=(0, (4, 1.5)), label="noise of the same size")
    axes.axhline(edge, color=BLACK, linestyle=(0, (1, 1)), linewidth=0.8)
    axes.text(len(values), edge, "a largest value below this counts as noise", ha="right", va="bottom", fontsize=SMALL)
    axes.set(xlabel="index", ylabel="singular value", ylim=(0, None), xlim=(-2, len(values)))
    axes.legend(loc="upper right")
    return figure


@figure_function
def cluster() -> Figure:
    """Two bases of one plane: no vector of one is near one of the other, and yet nothing changed."""
    figure = new_figure(DOUBLE * 0.8, 1.9)
    turn = np.linspace(0, 2 * np.pi, 200)
    left, right = figure.subplots(1, 2)
    angle = np.deg2rad(45)
    bases = (
        ("base", np.eye(2), GREY),
        ("tuned", np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]), BLUE),
    )
    for axes, scales, title in ((left, (1.6, 0.8), "σ₁ > σ₂: the vectors are determined"),
                                (right, (1.2, 1.2), "σ₁ = σ₂: only their plane is")):  # fmt: skip
        axes.plot(scales[0] * np.cos(turn), scales[1] * np.sin(turn), color=GREY, linewidth=0.8)
        for name, vectors, colour in bases if axes is right else bases[:1]:
            for number, (vector, scale) in enumerate(zip(vectors, scales, strict=True)):
                axes.annotate(
                    "",
                    scale * vector,
                    (0, 0),
                    arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0},
                )
                if axes is right and number == 0:
                    axes.annotate(
                        name, scale * vector, textcoords="offset points", xytext=(4, 3), color=colour, fontsize=SMALL
                    )
        axes.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-1.4, 1.4), xticks=[], yticks=[], title=title)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


@figure_function
def energy() -> Figure:
    """σ² of the leading vectors of one layer; the intruders' part of the sum."""
    vectors = layer_spectra()[0].vectors
    figure = new_figure(SINGLE * 1.4, 2.2)
    axes = figure.subplots()
    whole = sum(vector.sigma**2 for vector in vectors)
    share = sum(vector.sigma**2 for vector in vectors if vector.intruder) / whole
    axes.bar(
        [vector.index for vector in vectors], [vector.sigma**2 for vector in vectors],
        color=[BLUE if vector.intruder else GREY for vector in vectors],
    )  # fmt: skip
    count = sum(vector.intruder for vector in vectors)
    axes.set(
        xlabel="index of the tuned vector",
        ylabel="σ²",
        title=f"{count} intruders hold {share:.0%} of the top {len(vectors)}",
    )
    axes.set_xticks(range(len(vectors)))
    return figure


@figure_function
def null() -> Figure:
    """The intruders of random updates with the singular values of an adapter's, and the adapter's own."""
    compared = spectra.compare([FIXTURES / "lora-r4"], BASE, draws=60, include=["model.layers.0.*"], threads=1)
    report = compared.reports[0]
    counts = np.sum([layer.null["counts"] for layer in report.layers if layer.null], axis=0)
    total = report.total()
    figure = new_figure(SINGLE * 1.4, 2.2)
    axes = figure.subplots()
    axes.hist(counts, bins=[count - 0.5 for count in range(min(*counts, total), max(*counts, total) + 2)], color=GREY)
    axes.axvline(total, color=BLUE)
    axes.annotate(
        "the adapter", (total, 0.92), xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(4, 0),
        color=BLUE, fontsize=SMALL,
    )  # fmt: skip
    axes.set(xlabel="intruders in the first block", ylabel="of 60 random updates")
    return figure


@figure_function
def levels() -> Figure:
    """The levels by share of intruders, with the family of fixtures on it."""
    figure = new_figure(DOUBLE, 1.9)
    axes = figure.subplots()
    edges = [0.001, *(limit for limit, _ in LEVELS[1:])]
    for (low, high), (_, word), shade in zip(pairwise(edges), LEVELS[1:], (0.12, 0.3, 0.5), strict=True):
        axes.axvspan(low, high, color=BLUE, alpha=shade, linewidth=0)
        axes.text(np.sqrt(low * high), 1.02, word, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    placed = sorted((report.share, str(report.tuned["path"]).rpartition("/")[2]) for report in reports())
    for number, (share, name) in enumerate(placed):
        height = 0.88 - 0.13 * number
        axes.plot(share, height, "o", color=BLACK, transform=axes.get_xaxis_transform())
        axes.annotate(
            f"{name}  {share:.1%}", (share, height), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(-6, 0), ha="right", va="center", fontsize=SMALL,
        )  # fmt: skip
    axes.set(
        xscale="log", xlim=(0.001, 1), ylim=(0, 1), yticks=[], xlabel="share of the compared vectors that are intruders"
    )
    axes.set_xticks([0.001, 0.01, 0.1, 1], labels=["0.1 %", "1 %", "10 %", "100 %"])
    axes.spines["left"].set_visible(False)
    return figure


def similarity() -> Figure:
    """Similarity matrices of one layer, after LoRA and after full fine-tuning."""
    return plots.similarity_matrix(layer_spectra())


@figure_function
def four_patterns() -> Figure:
    """What similarity matrices look like where the answer is known: drawn from made-up bases."""
    rng = np.random.default_rng(2)
    size = 24
    swapped = np.eye(size)[:, [0, 2, 1, 3, 5, 4, *range(6, size)]]
    planted = np.column_stack([rng.normal(size=size), np.eye(size)[:, :-1]])
    blurred = np.eye(size)
    blurred[8:, 8:] = orthogonal(rng, size - 8)
    shown = {
        "nothing moved": np.eye(size),
        "order changed": swapped,
        "bulk mixed": blurred,
        "an intruder on top": planted,
    }
    figure = new_figure(DOUBLE, 2.2)
    for axes, (title, vectors) in zip(figure.subplots(1, 4, sharey=True), shown.items(), strict=True):
        picture = axes.imshow(np.abs(vectors / np.linalg.norm(vectors, axis=0)), cmap="magma_r", vmin=0, vmax=1)
        axes.set(title=title, xlabel="tuned", xticks=[0, 10, 20], yticks=[0, 10, 20])
    figure.axes[0].set_ylabel("pretrained")
    figure.colorbar(picture, ax=figure.axes, label="|cos|", pad=0.01)
    return figure


def profile() -> Figure:
    """Max |cos| of the leading vectors of one layer."""
    return plots.cosine_profile(layer_spectra())


def thresholds() -> Figure:
    """Intruders against ε."""
    return plots.epsilon_sweep(reports())


def leading() -> Figure:
    """Intruders against k."""
    return plots.top_k_sweep(reports())


def layer_map() -> Figure:
    """Layer by singular index."""
    return plots.layer_index_counts(reports()[1])


# Paper and ink of the README's picture: those of the pages that show it.
THEMES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}


def front(folder: Path) -> list[Path]:
    """Writes the map of ``fixtures/lora-r4`` as ``front-light.svg`` and ``front-dark.svg``."""
    drawn = plots.render(layer_map(), "svg").decode()
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    # The width that Verdana gives a text is that of DejaVu Sans, which few readers have.
    drawn = drawn.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    written = []
    for theme, (paper, ink) in THEMES.items():
        path = folder / f"front-{theme}.svg"
        text = drawn.replace("#000000", ink).replace("#ffffff", paper).replace("<svg ", f'<svg fill="{ink}" ', 1)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def size() -> Figure:
    """Intruders against the size of the update."""
    return plots.size_and_intruders(reports())


def training_run() -> Figure:
    """The checkpoints of one run."""
    folders = sorted((FIXTURES / "run-r4").iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return plots.trajectory(spectra.audit_many(folders, BASE, threads=1))


@figure_function
def repair() -> Figure:
    """The singular values of one layer before its intruders are scaled, and after."""
    planned = spectra.repair(FIXTURES / "lora-r4", BASE, scale=0.5, include=[LAYER], threads=1)
    values = layer_spectra()[0].tuned_values[:40]
    scaled = {vector.index: vector for layer in planned.layers for vector in layer.vectors}
    figure = new_figure(SINGLE * 1.4, 2.3)
    axes = figure.subplots()
    axes.plot(values, color=GREY, label="W0 + dW")
    for number, (index, vector) in enumerate(sorted(scaled.items())):
        axes.annotate(
            "", (index, 0.5 * vector.sigma), (index, vector.sigma), arrowprops={"arrowstyle": "->", "color": BLUE}
        )
        axes.plot(index, 0.5 * vector.sigma, "o", color=GREEN, label="" if number else "its intruders, times 0.5")
    axes.set(xlabel="index", ylabel="singular value", ylim=(0, None))
    axes.legend(loc="upper right")
    return figure


def tradeoff() -> Figure:
    """What fixtures/repair.csv measured of one member."""
    import pandas

    measured = pandas.read_csv(FIXTURES / "repair.csv")
    one = measured[measured["member"] == "lora-r4"].drop(columns="member")
    return plots.repair_tradeoff(one, metrics=["accuracy", "pretraining_loss"])


def training_history() -> Figure:
    """A regression whose target has a strong new direction, watched while it is trained."""
    import torch

    from spectra.training import Monitor

    size, generator = 128, torch.Generator().manual_seed(0)
    model = torch.nn.Linear(size, size, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(size, size, generator=generator) @ torch.diag(1.5 * 0.97 ** torch.arange(size)))
        u, v = torch.randn(2, size, generator=generator) / size**0.5
        target = model.weight + 30 * torch.outer(u, v)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.4)
    monitor = Monitor(torch.nn.ModuleDict({"layer": model}), every=20, max_share=None, threads=1)
    for step in range(1, 301):
        x = torch.randn(64, size, generator=generator)
        loss = (model(x) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        monitor.step(step, last=step == 300)
    return plots.training_history(monitor.history)


if __name__ == "__main__":
    for path in front(Path(__file__).parent / "static"):
        print(path.name)
