"""Every engine against the literal float64 definition, on thousands of random and adversarial matrices.

    python -m benchmarks.proof [--trials 10000] [--large 300] [--seed 0] [--workers 2]
    python -m benchmarks.proof --only TRIAL [--large]       # one matrix again

Each trial is a base, a fine-tune and a question, all drawn from ``np.random.default_rng([seed, trial])``:
prescribed spectra (``tests/support/problems.py`` and more), all shapes and both sides, tiny, huge and zero
matrices, LoRA, DoRA and dense updates, intruders planted with a mass just above or below ε² on a single
base vector, and questions whose ε lies just above or below a cosine that occurs.

The verdict on every vector must be that of ``tests/support/reference.py``, and every bound must enclose its
value.  Where a value is within 1e-6 of ε nothing is asked.  The size limits of the engines are lowered,
so that they try themselves on matrices that ``auto`` would never give them.  Exits with 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from benchmarks.options import Options, Row
from benchmarks.plots import look
from spectra.analysis.detect import detect
from spectra.svd import ENGINES, Answer, Base, Question, Side, cached, krylov, lanczos, shared
from spectra.updates.algebra import Dense, LowRank, RowScaled, Update
from tests.support import problems, reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Verdicts equal to the float64 definition"
UNDECIDABLE = 1e-6  # a value this close to ε may fall on either side
SLACK = 2e-6  # of bounds that are true up to rounding
DEFINITION_EDGE = 1e-3  # relative; a gap this close to the limit of a cluster may count or not
LARGEST, SEVERAL_HUNDRED = 96, (128, 768)
SCALES = (1e-20, 1e-12, 1e-4, 1e4, 1e12, 1e18)  # their squares leave the range of float32
CHUNK = 25

# Smaller limits: the engines try themselves far below the sizes from which they pay.
SMALL_SCALE: dict[Any, dict[str, float]] = {
    krylov: {"FIRST_STEPS": 2, "LARGEST_SHARE": 1.2},
    lanczos: {"FIRST_STEPS": 2, "LARGEST_SHARE": 1.2},
}
ONE_SPACE = {"PAYS": 0, "FAINT": 1e9, "FIRST_STEPS": 1, "LARGEST_SHARE": 1.2}
# What is proven: the engine, and what of it is changed for that.
VARIANTS: dict[str, tuple[str, dict[Any, dict[str, float]]]] = {
    "exact": ("exact", {}),
    "cached": ("cached", SMALL_SCALE),
    "cached, float32 first": ("cached", SMALL_SCALE | {cached: {"SMALL": 0}}),
    "krylov": ("krylov", SMALL_SCALE),
    "krylov, one space": ("krylov", SMALL_SCALE | {shared: ONE_SPACE}),
}

SPECTRA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    **problems.SPECTRA,
    "noise": lambda rng, p: np.linalg.svd(rng.normal(size=(p, p)), compute_uv=False),
    "steep": lambda rng, p: np.geomspace(1, 1e-7, p),
    "pairs": lambda rng, p: np.repeat(rng.uniform(0.5, 2, (p + 1) // 2), 2)[:p],
    "bunches": lambda rng, p: (
        np.linspace(3, 1, p // 6 + 1).repeat(6)[:p] * (1 - 10 ** rng.uniform(-5, -2) * rng.random(p))
    ),
    "rank one": lambda rng, p: np.where(np.arange(p) < 1, 1.0, 0.0),
    "zero": lambda rng, p: np.zeros(p),
}
# Without ties or null space, so that every engine can decide them; drawn more often.
ORDINARY = ("trained", "power law", "heavy tail", "noise", "steep", "bunches")


@dataclass(frozen=True, eq=False)
class Case:
    """W0 (m, n), an update of it, W1 in float64, and what is asked.

    ``near`` = (index, offset) moves epsilon to ``offset`` above the value of that vector.
    """

    spectrum: str
    kind: str
    W0: np.ndarray
    update: Update
    W1: np.ndarray
    question: Question
    near: tuple[int, float] | None

    def __str__(self) -> str:
        m, n = self.W0.shape
        near = f", ε {self.near[1]:+.1e} from vector {self.near[0]}" if self.near else ""
        return f"{self.spectrum} {m}×{n} {self.W0.dtype}, {self.kind}, {self.question}{near}"


def case(seed: int, trial: int, sizes: tuple[int, int] = (1, LARGEST)) -> Case:
    """The trial's base, fine-tune and question."""
    rng = np.random.default_rng([seed, trial])
    name = str(rng.choice(ORDINARY if rng.random() < 0.4 else sorted(SPECTRA)))
    m, n = _shape(rng, *sizes)
    side: Side = "left" if rng.random() < 0.5 else "right"
    scale = float(rng.choice(SCALES)) if rng.random() < 0.2 else 1.0
    W0, U, V = problems.with_spectrum(rng, m, n, np.sort(SPECTRA[name](rng, min(m, n)))[::-1] * scale)
    W0 = W0.astype(np.float32 if rng.random() < 0.9 else np.float64)
    size = float(np.linalg.norm(W0.astype(np.float64), 2)) or scale
    if rng.random() < 0.1:
        kind, update, W1 = _odd(rng, W0, size)
    else:
        kind, B, A = _low_rank(rng, W0.astype(np.float64), U if side == "left" else V, size, side)
        kind, update, W1 = _as_update(rng, W0, B, A, kind, size)
    k = int(rng.choice([1, 2, 3, 4, 5, 5, 8, 10, 10, 40]))
    near, epsilon, draw = None, 0.5, rng.random()
    if draw < 0.3:
        near = int(rng.integers(k)), float(rng.choice([-1, 1]) * 10 ** rng.uniform(-4, -1.3))
    elif draw < 0.4:
        epsilon = float(rng.uniform(0.02, 1))
    return Case(name, kind, W0, update, W1, Question(k, epsilon, side), near)


def _shape(rng: np.random.Generator, least: int, most: int) -> tuple[int, int]:
    form, p = rng.integers(4), int(rng.integers(max(least, most // 3), most + 1))
    q = int(rng.integers(max(least, p // 3), most + 1))
    if form == 0 and least == 1 and rng.random() < 0.4:
        return int(rng.integers(1, 9)), int(rng.integers(1, 9))
    shapes = (p, p), (p, p), (p, q), (q, p)
    return shapes[form]


def _low_rank(
    rng: np.random.Generator, W0: np.ndarray, X: np.ndarray, size: float, side: str
) -> tuple[str, np.ndarray, np.ndarray]:
    """(name, B, A) of an update that is small, large, or plants one direction among the vectors ``X`` of W0."""
    W = W0 if side == "left" else W0.T
    m, n = W.shape
    draw = rng.random()
    if draw < 0.4:
        r = int(rng.integers(1, 5))
        B, A = rng.normal(size=(m, r)), rng.normal(size=(r, n))
        B = B * size * rng.choice([1e-4, 0.01, 0.2, 0.7, 3, 30]) / np.linalg.norm(B @ A, 2)
        name = "random"
    else:
        name, y = _direction(rng, X)
        v: np.ndarray = rng.normal(size=(n,))
        v = v / np.linalg.norm(v)
        sigma = size * rng.choice([0.5, 1.2, 2, 10, 50])
        if draw < 0.7:  # as training does it
            B, A = sigma * y[:, None], v[None]
        else:  # y takes the place of what was there, so that it is an exact singular vector of W1
            name = f"exact {name}"
            rest = W @ v - y * (y @ W @ v)
            B, A = np.stack([y, rest], 1), np.stack([sigma * v - y @ W, -v])
    return (name, B, A) if side == "left" else (name, A.T, B.T)


def _direction(rng: np.random.Generator, X: np.ndarray) -> tuple[str, np.ndarray]:
    """A unit vector with mass near ε² on one base vector; the rest of it hides in one of four ways."""
    p = X.shape[1]
    cosine = float(np.clip(0.5 + rng.choice([-1, 1]) * 10 ** rng.uniform(-4, -1), 0, 1))
    weights: np.ndarray = rng.normal(size=(p,))
    chosen = int(rng.integers(p))
    name = ("spread", "on its neighbours", "at both ends", "outside the span")[rng.integers(4)]
    if name == "on its neighbours":  # together they look like a single vector
        weights[np.abs(np.arange(p) - chosen) > 3] = 0
        weights = np.sign(weights)
    if name == "at both ends":  # nothing leads a Krylov space to the atom in between
        weights[p // 4 : -max(p // 4, 1)] = 0
    outside: np.ndarray = rng.normal(size=(X.shape[0],))
    outside = outside - X @ (X.T @ outside)
    if np.linalg.norm(outside) < 1e-6 or name != "outside the span":
        outside[:] = 0
    weights[chosen] = 0
    y = X @ weights if not outside.any() else outside
    length = float(np.linalg.norm(y))
    if length == 0:
        return name, X[:, chosen]
    return name, cosine * X[:, chosen] + np.sqrt(1 - cosine**2) / length * y


def _as_update(
    rng: np.random.Generator, W0: np.ndarray, B: np.ndarray, A: np.ndarray, name: str, size: float
) -> tuple[str, Update, np.ndarray]:
    """The same change as LoRA, as DoRA, or as a full fine-tune with noise all over."""
    draw = rng.random()
    exact = W0.astype(np.float64)
    if draw < 0.6:
        return f"lora {name}", LowRank(_tensor(B / 2), _tensor(A), 2.0), exact + B @ A
    if draw < 0.8:
        plain = exact + B @ A
        norms = np.linalg.norm(plain, axis=1)
        magnitude = np.linalg.norm(exact, axis=1) * rng.uniform(0.8, 1.2, len(exact))
        left = np.divide(magnitude, norms, out=np.ones_like(norms), where=norms > 0)
        return f"dora {name}", RowScaled(_tensor(B), _tensor(A), 1.0, _tensor(magnitude)), left[:, None] * plain
    noise = size * rng.choice([0, 1e-3, 0.05]) / np.sqrt(max(W0.shape)) * rng.normal(size=W0.shape)
    return f"dense {name}", *_dense(W0, exact + B @ A + noise)


def _odd(rng: np.random.Generator, W0: np.ndarray, size: float) -> tuple[str, Update, np.ndarray]:
    """What nobody would train: no change, nothing left, turned round, shuffled, replaced."""
    name = ("unchanged", "erased", "negated", "shuffled", "replaced")[rng.integers(5)]
    W1 = {
        "unchanged": W0,
        "erased": 0 * W0,
        "negated": -W0,
        "shuffled": W0[rng.permutation(len(W0))],
        "replaced": size * rng.normal(size=W0.shape) / np.sqrt(max(W0.shape)),
    }[name]
    return f"dense {name}", *_dense(W0, W1)


def _dense(W0: np.ndarray, W1: np.ndarray) -> tuple[Update, np.ndarray]:
    stored = W1.astype(W0.dtype)
    return Dense(_tensor(stored)), stored.astype(np.float64)


def _tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))


@dataclass(frozen=True)
class Outcome:
    """What one trial showed: which variants answered by themselves, and what was wrong."""

    spectrum: str
    vectors: int = 0
    intruders: int = 0
    borderline: bool = False  # not asked
    by_itself: tuple[str, ...] = ()
    edges: int = 0
    problems: tuple[str, ...] = ()


def prove(seed: int, trial: int, sizes: tuple[int, int] = (1, LARGEST), small_scale: bool = True) -> Outcome:
    """All engines on one case."""
    instance = case(seed, trial, sizes)
    question = instance.question
    values = reference.max_cosines(instance.W0, instance.W1, question.top_k, question.side)
    question = _moved(question, instance.near, values)
    if any(value is not None and abs(value - question.epsilon) <= UNDECIDABLE for value in values):
        return Outcome(instance.spectrum, borderline=True)
    by_itself, wrong, edges = [], [], 0
    base_of = {engine: Base(_tensor(instance.W0), question.side) for engine in ENGINES}
    for variant, (engine, limits) in VARIANTS.items():
        with changed(limits if small_scale else {}), warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                comparison = ENGINES[engine]().compare(
                    base_of[engine], instance.update.tuned(base_of[engine].W0), question
                )
            except Exception as error:  # whatever it is, it is no verdict
                wrong.append(f"{variant}: {type(error).__name__}: {error}")
                continue
        if comparison.engine == engine:
            by_itself.append(variant)
        problem = difference(comparison, question, values)
        if problem and any(not difference(comparison, question, other) for other in _edges(instance)):
            edges += 1
        elif problem:
            wrong.append(f"{variant} (answered by {comparison.engine}): {problem}")
    return Outcome(
        spectrum=instance.spectrum,
        vectors=len(values),
        intruders=sum(value is not None and value < question.epsilon for value in values),
        by_itself=tuple(by_itself),
        edges=edges,
        problems=tuple(f"trial {trial}: {instance}\n    {line}" for line in wrong),
    )


def _moved(question: Question, near: tuple[int, float] | None, values: list[float | None]) -> Question:
    """The question with epsilon next to the value that ``near`` names."""
    value = values[near[0] % len(values)] if near is not None and values else None
    if near is None or value is None:
        return question
    return Question(question.top_k, float(np.clip(value + near[1], 0.01, 1)), question.side)


def difference(comparison: Answer, question: Question, values: list[float | None]) -> str | None:
    """How the answer differs from the definition's ``values``, or None."""
    vectors = detect(comparison, question)
    if len(vectors) != len(values):
        return f"{len(vectors)} vectors, expected {len(values)}"
    for vector, value in zip(vectors, values, strict=True):
        lower, upper = vector.max_cosine_bounds
        said = f"vector {vector.index}: {vector.max_cosine} in [{lower:.7f}, {upper:.7f}] by {vector.decided_by}"
        said += f" {vector.flags}; the definition says {value}, ε {question.epsilon:.7f}"
        if vector.intruder != (value is not None and value < question.epsilon):
            return f"wrong verdict: {said}"
        if value is not None and not lower - SLACK <= value <= upper + SLACK:
            return f"not enclosed: {said}"
    return None


def _edges(instance: Case) -> Iterator[list[float | None]]:
    """The definition with its tolerances a little lower and higher: values that sit on one may go either way."""
    for factor in (1 - DEFINITION_EDGE, 1 + DEFINITION_EDGE):
        with mock.patch.object(reference, "EPS32", reference.EPS32 * factor):
            yield reference.max_cosines(instance.W0, instance.W1, instance.question.top_k, instance.question.side)


@contextmanager
def changed(limits: dict[Any, dict[str, float]]) -> Iterator[None]:
    """Modules with other constants for a while."""
    before = {module: {name: getattr(module, name) for name in names} for module, names in limits.items()}
    try:
        for module, names in limits.items():
            vars(module).update(names)
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


def outcomes(seed: int, trials: int, large: int, workers: int) -> Iterator[Outcome]:
    """Of ``trials`` small cases and ``large`` large ones, in order, from ``workers`` processes of one thread each."""
    work = [partial(prove, seed, trial) for trial in range(trials)]
    # Every other large one with the limits as they are.
    work += [partial(prove, seed, trial, SEVERAL_HUNDRED, bool(trial % 2)) for trial in range(large)]
    if workers == 1:
        yield from (item() for item in work)
        return
    threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            yield from pool.map(_call, work, chunksize=CHUNK if trials else 1)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def _call(work: Callable[[], Outcome]) -> Outcome:
    return work()


def run(options: Options) -> Iterator[Row]:
    """A row per kind of spectrum, and one for all."""
    trials = options.trials if options.trials is not None else options.scale(quick=300, default=10_000)
    large = options.large if options.large is not None else options.scale(quick=4, default=0, full=300)
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*SPECTRA, "all")}
    started, total = time.perf_counter(), trials + large
    for done, outcome in enumerate(outcomes(options.seed, trials, large, options.workers), 1):
        for name in (outcome.spectrum, "all"):
            counts[name].update(outcome.by_itself)
            counts[name].update(
                matrices=1,
                vectors=outcome.vectors,
                intruders=outcome.intruders,
                borderline=outcome.borderline,
                edges=outcome.edges,
                wrong=len(outcome.problems),
            )
        for problem in outcome.problems:
            print(problem, file=sys.stderr, flush=True)
        if done % max(total // 20, 1) == 0:
            seconds = time.perf_counter() - started
            print(f"proof: {done} of {total}, {1e3 * seconds / done:.1f} ms each", file=sys.stderr, flush=True)
    for name, count in counts.items():
        asked = count["matrices"] - count["borderline"]
        yield {
            "spectrum": name,
            **{key: count[key] for key in ("matrices", "vectors", "intruders", "borderline", "edges", "wrong")},
            **{f"{variant} by itself": round(count[variant] / max(asked, 1), 3) for variant in VARIANTS},
            "agrees": count["wrong"] == 0,
        }


def notes(rows: list[Row]) -> list[str]:
    whole = rows[-1]
    return [
        f"{whole['matrices']:,} matrices, {whole['vectors']:,} verdicts: {whole['wrong']} wrong.",
        "borderline: not asked, since a value lies within 1e-6 of ε; edges: a gap lies at the limit of a cluster, "
        "and the answer is that of one side; by itself: share of matrices that the engine decided without another.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    names = [row["spectrum"] for row in rows]
    for at, variant in enumerate(("krylov", "cached")):
        places = [i + 0.4 * (0.5 - at) for i in range(len(rows))]
        axes.barh(
            places,
            [100 * row[f"{variant} by itself"] for row in rows],
            0.38,
            label=variant,
            color=look(variant)["color"],
        )
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("matrices decided without another engine (%)")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=10_000, help="matrices up to 96 wide (default: 10000)")
    parser.add_argument(
        "--large", type=int, nargs="?", const=300, default=0, help="matrices of 128 to 768 (300 if no number is given)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="TRIAL", help="this one, with all that is known of it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    options = parser.parse_args()
    if options.only is not None:
        sizes = SEVERAL_HUNDRED if options.large else (1, LARGEST)
        small_scale = not options.large or bool(options.only % 2)
        print(case(options.seed, options.only, sizes))
        outcome = prove(options.seed, options.only, sizes, small_scale)
        print(replace(outcome, problems=()), *outcome.problems, sep="\n")
        return int(bool(outcome.problems))
    asked = Options(trials=options.trials, large=options.large, seed=options.seed, workers=options.workers)
    rows = list(run(asked))
    for row in rows:
        print("  ".join(f"{value!s:>9}" for value in row.values()))
    print(*notes(rows), sep="\n")
    return int(not rows[-1]["agrees"])


if __name__ == "__main__":
    sys.exit(main())
