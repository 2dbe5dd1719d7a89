"""The figure of a repair: what the sweep says is what is drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from spectra import plots
from spectra.errors import UsageError
from spectra.plots.tradeoff import FACTS, VARIANTS
from spectra.repairs.sweep import BASE, COLUMNS, CONTROLS, REPAIR
from tests.support.figures import faults, heights

METRICS = ("accuracy", "loss")


def sweep_of(scales=(1, 0.75, 0.5, 0.25, 0), variants=(REPAIR, *CONTROLS), seeds=3, metrics=METRICS, base=True):
    """Numbers at random; the fine-tune has 0.9 everywhere and the base 0.1."""
    rng = np.random.default_rng(0)
    keys = [(variant, scale, 0) for variant in variants for scale in scales]
    keys += [("random", scale, seed) for scale in scales for seed in range(1, seeds) if "random" in variants]
    rows: list[dict[str, object]] = []
    for variant, scale, seed in [*keys, *([(BASE, np.nan, 0)] if base else [])]:
        known = 0.9 if scale == 1 else 0.1 if variant == BASE else None
        values = rng.uniform(0.3, 0.95, len(metrics)) if known is None else np.full(len(metrics), known)
        facts = {**dict.fromkeys(COLUMNS, 1.0), "variant": variant, "scale": scale, "seed": seed}
        rows.append({**facts, **dict(zip(metrics, values, strict=True))})
    return pd.DataFrame(rows, columns=[*COLUMNS, *metrics])


LONG = "a metric of which the name is far too long to be written beside a panel of this height"
FIGURES = {
    "one metric": (sweep_of(metrics=("value",)), {}),
    "two": (sweep_of(), {"title": "lora-r4"}),
    "three": (sweep_of(metrics=("task_accuracy", "loss", "f1")), {}),
    "seven with long names": (sweep_of(metrics=[f"{LONG} {i}" for i in range(7)]), {"title": LONG * 2}),
    "one scale": (sweep_of(scales=[0.5], base=False), {}),
    "odd names": (sweep_of(metrics=["$a_b$", "_c"], variants=[REPAIR, "$mine$", "_other"]), {}),
    "relative": (sweep_of(), {"relative_to": "base"}),
    "large numbers": (sweep_of(metrics=["perplexity"]).assign(perplexity=lambda frame: frame.perplexity * 1e7), {}),
}


@pytest.mark.parametrize(("sweep", "options"), FIGURES.values(), ids=FIGURES)
def test_nothing_is_cut_off_or_written_over(sweep, options):
    figure = plots.repair_tradeoff(sweep, **options)
    width, height = figure.get_size_inches()
    assert width in (3.4, 7.0)
    assert 1 < height < 13
    assert faults(figure) == []


@pytest.mark.parametrize(("relative_to", "origin"), [(None, 0.0), ("fine-tune", 0.9), ("base", 0.1)])
def test_the_figure_shows_the_sweep(relative_to, origin):
    sweep = sweep_of()
    figure = plots.repair_tradeoff(sweep, relative_to=relative_to)
    for axes, metric in zip(figure.axes, ("accuracy", "loss"), strict=True):
        left, right = axes.get_xlim()
        assert left > right, "from 1 down to 0"
        labels = {str(line.get_label()): line for line in axes.lines}
        assert len([label for label in labels if not label.startswith("_")]) == 5
        for variant, name in ((REPAIR, "intruder dimensions"), ("random", "random directions")):
            mine = sweep[sweep.variant == variant].groupby("scale")[metric]
            wanted = [(scale, value - origin) for scale, value in mine.mean()[::-1].items()]
            assert np.allclose(labels[name].get_xydata(), wanted)
        (band,) = axes.collections
        mine = sweep[sweep.variant == "random"].groupby("scale")[metric]
        assert band.get_datalim(axes.transData).y0 == pytest.approx(mine.min().min() - origin)
        assert band.get_datalim(axes.transData).y1 == pytest.approx(mine.max().max() - origin)
        assert heights(axes) == pytest.approx([0.9 - origin, 0.1 - origin])
        assert metric in axes.get_ylabel()


def test_the_same_figure_is_the_same_file():
    one, again = (plots.repair_tradeoff(sweep_of()) for _ in range(2))
    for format in plots.FORMATS:
        assert plots.render(one, format) == plots.render(again, format)


def test_lines_of_variants_differ_without_colour():
    looks = [own for _, own in VARIANTS.values()]
    assert set(VARIANTS) == {REPAIR, *CONTROLS}
    assert len({own.marker for own in looks}) == len({str(own.linestyle) for own in looks}) == len(looks)
    assert FACTS == COLUMNS


@pytest.mark.parametrize(
    ("sweep", "options", "message"),
    [
        (sweep_of(), {"metrics": ["f1"]}, "no metric 'f1'; expected some of accuracy, loss"),
        (sweep_of(metrics=()), {}, "no metric in the sweep"),
        (sweep_of().drop(columns="scale"), {}, "no column 'scale'; expected what sweep returns"),
        (sweep_of()[:0], {}, "nothing to draw"),
        ([], {}, "no column 'variant'"),
        (pd.concat([sweep_of(), sweep_of()]), {}, "intruders at scale 1 occurs twice; draw one fine-tune at a time"),
        (sweep_of(base=False), {"relative_to": "base"}, "relative_to = 'base', but the sweep has no row of it"),
        (sweep_of(scales=[0.5]), {"relative_to": "fine-tune"}, "has no row of it"),
        (sweep_of(), {"relative_to": "zero"}, "relative_to = 'zero'; expected fine-tune, base or None"),
    ],
)
def test_what_cannot_be_drawn(sweep, options, message):
    with pytest.raises(UsageError, match=message):
        plots.repair_tradeoff(sweep, **options)
