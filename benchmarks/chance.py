"""A fine-tune's count by chance: against random updates made and decomposed one by one, and what it costs.

``by chance`` is what an audit reports as ``expected_by_chance``.  ``literal`` makes, of each judged layer, a weight
with the singular values of W0 and random updates with those of dW, and counts by full SVDs of both.  ``z`` is their
difference in standard errors of both.  ``seconds`` are those of ``spectra.audit`` without thresholds and random
updates, ``added`` what they add, and ``cost`` the share; a command takes more than another second to start.

SmolLM2-135M-Instruct is fine-tuned as in ``benchmarks/language_model.py``; all-MiniLM-L6-v2 as in
``benchmarks/training.py``; the third are the fixtures.  ``krylov`` audits the same by that engine, which knows the
base's singular values by an estimate only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

import spectra
from benchmarks.language_model import Member, examples, prepared, taught
from benchmarks.options import Options, Row
from benchmarks.stretched import minilm_folder
from benchmarks.training import minilm
from spectra.analysis.chance import Chance
from spectra.analysis.null import haar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Intruders by chance"
ROOT = Path(__file__).parent.parent
FAMILY = (Member("lora", 8, 1e-3), Member("lora", 32, 3e-3), Member("lora", 8, 1e-2))
AGREES = 3.0  # standard errors
ROUNDS = 2  # audits with and without, in turn


def run(options: Options) -> Iterator[Row]:
    for name in options.scale(quick=("lora-r4",), default=("lora-r4", "lora-r64", "full")):
        yield from _rows("fixtures", name, ROOT / "fixtures" / name, ROOT / "fixtures" / "base", options)
    with prepared(options) as (home, model, encode):
        if not options.quick:
            place = home / "minilm"
            minilm(60, None, home).model.save_pretrained(place)
            yield from _rows("all-MiniLM", "lora r 8, 0.002", place, minilm_folder(), options)
        base, data, steps = home / "base", examples(encode), options.scale(quick=2, default=40)
        for number, member in enumerate(FAMILY[: options.scale(quick=1, default=len(FAMILY))]):
            tuned = taught(type(model).from_pretrained(base), member, data, steps)
            place = home / f"tuned-{number}"
            tuned.save_pretrained(place)
            what = f"{member.method}{f' r {member.rank}' if member.rank else ''}, {member.rate:g}"
            yield from _rows("SmolLM2", what, place, base, options)


def _rows(model: str, name: str, place: Path, base: Path, options: Options) -> Iterator[Row]:
    literal = _literal(place, base, options.scale(quick=2, default=8 if model == "fixtures" else 2))
    for engine in ("auto", "krylov") if model == "SmolLM2" else ("auto",):
        report = spectra.audit(place, base, engine=engine, cache=False)
        expected = report.expected_by_chance
        seconds, added = _cost(partial(spectra.audit, place, base, engine=engine, cache=False), options)
        z = None
        if expected.intruders is not None and expected.error is not None:
            error = float(np.hypot(expected.error, literal.std(ddof=1) / literal.size**0.5))
            difference = expected.intruders - float(literal.mean())
            z = difference / error if error else 0.0 if abs(difference) < 0.5 else np.inf
        yield {
            "model": model,
            "fine-tune": name,
            "engine": engine,
            "layers": len(report.judged),
            "nearest": report.update_over_threshold,
            "intruders": report.total(),
            "by chance": expected.intruders,
            "±": expected.deviation,
            "error": expected.error,
            "literal": float(literal.mean()),
            "z": z,
            "drawn": expected.drawn,
            "draws": expected.draws,
            "below": expected.below,
            "left out": expected.left_out,
            "unknown": expected.unknown,
            "spectra": expected.spectra or "-",
            "seconds": seconds,
            "added": added,
            "cost": added / seconds,
            "agrees": z is None or abs(z) <= AGREES,
        }


def _literal(place: Path, base: Path, draws: int) -> np.ndarray:
    """(draws,) the totals of random updates, each made and decomposed."""
    report = spectra.audit(place, base, engine="exact", cache=False)
    judged, rng, totals = {layer.name for layer in report.judged}, np.random.default_rng(11), np.zeros(draws)
    for one in spectra.layer_spectra(place, base, size=1):
        if one.name not in judged:
            continue
        (m, n), p = one.shape, min(one.shape)
        W0 = haar(rng, m, p) * torch.from_numpy(one.base_values) @ haar(rng, n, p).T
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        sigma = torch.from_numpy(one.update_values)
        for draw in range(draws):
            R = haar(rng, m, sigma.numel()) * sigma @ haar(rng, n, sigma.numel()).T
            Y = torch.linalg.svd(W0 + R, full_matrices=False).U[:, : report.settings["top_k"]]
            totals[draw] += int(((U0.T @ Y).abs().amax(0) < report.settings["epsilon"]).sum())
    return totals


def _cost(audit: Callable[[], Any], options: Options) -> tuple[float, float]:
    """The seconds of an audit without thresholds and random updates, and what they add."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * options.scale(quick=1, default=ROUNDS)):
        plain = bool(number % 2)
        without = patch("spectra.analysis.layer.chance_of", lambda *_: Chance(reason="not asked for"))
        with without if plain else nullcontext():
            started = time.perf_counter()
            audit()
            seconds[plain].append(time.perf_counter() - started)
    return min(seconds[True]), min(seconds[False]) - min(seconds[True])


def notes(rows: list[Row]) -> list[str]:
    known = [row for row in rows if row["z"] is not None]
    beyond = sum(abs(row["z"]) > AGREES for row in known)
    costs = [row["cost"] for row in rows if row["engine"] == "auto" and row["model"] == "SmolLM2"]
    small = [row["added"] for row in rows if row["model"] != "SmolLM2"]
    return [
        f"{beyond} of {len(known)} counts by chance are more than {AGREES:g} standard errors from the literal ones.",
        f"They add {min(costs, default=0):.0%} to {max(costs, default=0):.0%} to an audit of a language model, and "
        f"{min(small):.2f} to {max(small):.2f} s to one of a small model.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    some = [row for row in rows if row["by chance"] is not None]
    names = [f"{row['model']} {row['fine-tune']}, {row['engine']}" for row in some]
    at = np.arange(len(some))
    axes.errorbar(
        [row["by chance"] for row in some], at, xerr=[row["±"] for row in some], fmt="o", color="#0072B2",
        label="by chance",
    )  # fmt: skip
    axes.plot([row["literal"] for row in some], at, "x", color="#D55E00", label="literal")
    axes.plot([row["intruders"] for row in some], at, "|", color="black", markersize=12, label="found")
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("intruders")
    axes.legend()
