"""Every engine against the literal float64 definition, on the weights of SmolLM2, at ε from 0.1 to 0.9.

Each weight gets random LoRAs from far too faint to far too strong, a DoRA, a dense update, and the update that a
training made (LoRA of rank 8 as in ``benchmarks/language_model.py``, at an ordinary and at a far too high learning
rate); then each engine is asked nine times.  The verdict on every vector must be the definition's, and every bound must
enclose its value (see ``benchmarks/proof.py``).  By default every fifth block; ``--full`` takes all 210 weights,
``--quick`` the fixtures' base.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import stretched
from benchmarks.language_model import Member, examples, language_model, taught
from benchmarks.options import Options, Row
from benchmarks.plots import look
from benchmarks.problems import Problem
from benchmarks.proof import UNDECIDABLE, VARIANTS, changed, difference
from spectra.svd import ENGINES, Base, Question
from spectra.updates.algebra import ALL
from tests.support import reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Verdicts on trained weights equal to the float64 definition"
EPSILONS = tuple(round(0.1 * step, 1) for step in range(1, 10))
RANDOM = (("lora", 0.02), ("lora", 0.1), ("lora", 0.4), ("lora", 0.8), ("lora", 1.5), ("dora", 0.1), ("dense", 0.1))
TRAINED = (Member("lora", 8, 1e-3), Member("lora", 8, 1e-2))
TOP_K = 10


def run(options: Options) -> Iterator[Row | str]:
    every = options.scale(quick=1, default=5, full=1)
    model, encode = language_model(options)
    names = [
        name.removesuffix(".weight")
        for name, value in model.state_dict().items()
        if value.ndim == 2 and ".layers." in name and int(name.split(".")[2]) % every == 0
    ]
    weights = {name: model.state_dict()[f"{name}.weight"].clone() for name in names}
    trained = {f"trained at {member.rate:g}": _factors(model, member, encode, options) for member in TRAINED}
    counts: dict[str, Counter[str]] = {}
    for number, name in enumerate(names[: 1 if options.quick else None]):
        W0 = weights[name]
        size = float(torch.linalg.matrix_norm(W0, 2))
        problems = {
            f"{kind}, random, {strength:g}·σ₁": stretched.tuned(W0, kind, 8, strength * size, seed=number)
            for kind, strength in RANDOM
        }
        problems |= {f"lora, {what}": Problem("lora", W0, *factors[name]) for what, factors in trained.items()}
        for what, problem in problems.items():
            count = counts.setdefault(what, Counter())
            for line in _prove(problem, count):
                yield f"{name}, {what}: {line}"
    for what, count in counts.items():
        yield {
            "update": what,
            **{key: count[key] for key in ("weights", "verdicts", "intruders", "undecidable", "wrong")},
            **{f"{variant} by itself": round(count[variant] / max(count["asked"], 1), 3) for variant in VARIANTS},
            "agrees": not count["wrong"],
        }


def _factors(model: Any, member: Member, encode: Any, options: Options) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) of every weight that a LoRA changed in a training, the scaling of 2 in B."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = type(model)(model.config)
        fresh.load_state_dict(model.state_dict())
        state = taught(fresh, member, examples(encode), options.scale(quick=2, default=40)).state_dict()
    ending = ".lora_A.default.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ending): (
            2 * state[key.replace("lora_A", "lora_B")].detach(),
            A.detach(),
        )
        for key, A in state.items()
        if key.endswith(ending)
    }


def _prove(problem: Problem, count: Counter[str]) -> list[str]:
    """All engines at all ε on one update; what was wrong."""
    W0, wrong = problem.W0, []
    exact = problem.update.tuned(W0)
    values = reference.max_cosines(W0.numpy(), exact.block(ALL, ALL).numpy(), TOP_K)
    count["weights"] += 1
    bases = {engine: Base(W0, "left") for engine in ENGINES}
    for epsilon in EPSILONS:
        if any(value is not None and math.isclose(value, epsilon, abs_tol=UNDECIDABLE) for value in values):
            count["undecidable"] += 1
            continue
        question = Question(TOP_K, epsilon, "left")
        count["intruders"] += sum(value is not None and value < epsilon for value in values)
        for variant, (engine, limits) in VARIANTS.items():
            with changed(limits):
                answer = ENGINES[engine]().compare(bases[engine], problem.update.tuned(W0), question)
            count[variant] += answer.engine == engine
            count["verdicts"] += len(answer.matches)
            problem_found = difference(answer, question, values)
            if problem_found:
                count["wrong"] += 1
                wrong.append(f"ε {epsilon}, {variant} (answered by {answer.engine}): {problem_found}")
        count["asked"] += 1
    return wrong


def notes(rows: list[Row]) -> list[str]:
    verdicts, wrong = (sum(row[name] for row in rows) for name in ("verdicts", "wrong"))
    return [
        f"{verdicts:,} verdicts, ε from {EPSILONS[0]} to {EPSILONS[-1]}: {wrong} answers wrong. "
        "Intruders are counted over all ε.",
        "undecidable: not asked, since a value lies within 1e-6 of ε.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    for at, variant in enumerate(("krylov", "krylov, one space", "cached")):
        places = np.arange(len(rows)) + 0.27 * (1 - at)
        shares = [100 * row[f"{variant} by itself"] for row in rows]
        axes.barh(places, shares, 0.26, label=variant, color=look(variant)["color"])
    axes.set_yticks(range(len(rows)), [row["update"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("answers without another engine (%)")
