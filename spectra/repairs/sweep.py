"""What a repair gains and costs: an evaluation of one's own at every scale, with controls beside it.

Nothing is written: the weights are changed in a model in memory, or handed over.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import numpy as np
import torch
from torch import Tensor

from spectra.analysis.layer import LayerAnalysis
from spectra.analysis.null import haar
from spectra.analysis.scaling import Change, edited_dense, scaled
from spectra.errors import UsageError
from spectra.files.orientation import as_stored
from spectra.pairing.carried import Carried
from spectra.pairing.pairs import LayerPair, Pairing, pair_layers
from spectra.records.schemas import as_dataframe
from spectra.repairs.choice import Choice, Which, triplets_of
from spectra.repairs.insertion import (
    ByName,
    Target,
    borrow_model,
    carried_beside,
    forms_of,
    name_in_model,
    working,
)
from spectra.runs.jobs import Job, read_weight
from spectra.runs.options import AuditOptions, Progress, takes_options
from spectra.runs.progress import shown
from spectra.runs.reports import Analysis, Result, open_cache
from spectra.runs.run import SingleRun, check_whole, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import LiveCheckpoint, Source
from spectra.svd.triplets import Triplets
from spectra.updates.algebra import ALL, TunedWeight, slabs

if TYPE_CHECKING:
    import pandas

REPAIR, BASE = "intruders", "base"
CONTROLS = ("neighbour", "random", "shrink", "weight")
UNIFORM = CONTROLS[2:]  # those that scale the update, and no vectors
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)
COLUMNS = ("variant", "scale", "seed", "vectors", "layers", "change_norm", "update_norm", "update_change")

Evaluate: TypeAlias = Callable[[Any], float | Mapping[str, float]]


@takes_options(AuditOptions)
def sweep(
    tuned: Source,
    base: Source | None = None,
    *,
    evaluate: Evaluate,
    model: torch.nn.Module | None = None,
    scales: Sequence[float] = SCALES,
    which: Which = "all",
    controls: Sequence[str] = CONTROLS[:3],
    seeds: int = 1,
    include_base: bool = True,
    **options: Unpack[AuditOptions],
) -> pandas.DataFrame:
    """Evaluates a fine-tune with its intruder dimensions scaled by each λ, and controls of the same size.

    The repair is that of :func:`spectra.repairs.repair.repair`: W' = W1 + (λ − 1) Σ σ u vᵀ.  A gain says something of
    intruders only where changes of the same size without them do not bring it, so each λ has controls beside it:

    - "neighbour": instead of each intruder the singular vector of the same W1, among the leading ``top_k``, that is
      next to it in rank and no intruder; each is taken once, so there may be fewer of them.
    - "random": (λ − 1) Σ σ a bᵀ with the intruders' σ and random orthonormal a and b.
    - "shrink": W0 + t·dW, t = ‖dW'‖_F/‖dW‖_F of each layer: an update as large as the repaired one, which need not be
      smaller than dW.
    - "weight": W0 + λ·dW, the whole update turned down: what a repair has to be better than to be worth it.

    Parameters
    ----------
    tuned, base : a fine-tune and the model it was made from, as for :func:`spectra.audit`.
    evaluate : called with the model, or with the weights; returns a number (column "value"), or numbers by name (a
        column each).  It is to leave weights as they are, and to give the same for the same weights.
    model : one of the base's architecture with the base's weights, and whatever the fine-tune adds; not one whose
        values are read, but a copy.  Every tensor that
        the fine-tune changes is put into it in place, and its own values come back at the end.  None:
        ``evaluate`` gets {name: tensor} of these, named and laid out as in the fine-tuned model, in float32 (float64
        where stored so), on ``device``.
    scales : the λ; 1 is the fine-tune itself, which is evaluated once and stands in the rows of all variants.
    which : as for :func:`spectra.repairs.repair.repair`.
    controls : some of the above, in the order of the result.
    seeds : random controls, with seeds from 0 on.
    include_base : also evaluate the base's own weights wherever the fine-tune changed them and the base has them.
    {options}

    Layers that ``include`` and ``exclude`` leave out stay as the fine-tune has them.  ``progress`` is called after each
    layer and, counting anew, after each evaluation.

    Returns
    -------
    pandas.DataFrame : "variant" ("intruders", a control, or "base"), "scale" (λ), "seed", "vectors" (how many were
        scaled), "layers" (how many changed), then over all layers with chosen vectors "change_norm", ‖W' − W1‖_F,
        "update_norm", ‖W' − W0‖_F, and "update_change", ‖W' − W1‖_F/‖W1 − W0‖_F; then what ``evaluate`` returned.

    Raises
    ------
    UsageError : bad options; nothing to scale; a tensor without its place in the model; pandas is missing.
    SpectraError : as for :func:`spectra.audit_many`; also where a layer could not be analysed.
    """
    as_dataframe([], COLUMNS)  # before the work: is pandas there?
    scales, controls = _checked(scales, controls, seeds)
    choice = Choice(0.0, which)
    settings = checked_settings(**options)
    run = open_run(tuned, base, settings)
    check_whole(run, "a sweep")
    choice.check(run.pairs)
    pairing = pair_layers(run.base, run.tuned, run.plan)
    carried = carried_beside(run, pairing)
    with ExitStack() as stack:
        progress = stack.enter_context(shown(options["progress"]))
        target: Target = ByName()
        if model is not None:
            _check_apart(model, run)
            target = borrow_model(model, forms_of(run, pairing, carried), run)
            stack.callback(target.restore)
        trial = _Trial(run, pairing, carried, choice, target, controls, seeds)
        trial.put_beside()
        analysis = Analysis(settings, open_cache(options["cache"]), visit=trial.visit, chance=False)
        report = analysis.reports([run], time.perf_counter(), progress)
        for layer in report[0].failed:
            raise UsageError(f"{layer.error}; exclude {layer.name!r} to keep this layer as it is")
        if not trial.layers:
            raise UsageError(f"{run.tuned.path}: no intruder dimensions, so there is nothing to scale")
        return _evaluated(trial, evaluate, scales, include_base, progress)


def _check_apart(model: object, run: SingleRun) -> None:
    """Raises UsageError where weights put into the model would be those that are read."""
    for read in (run.tuned, run.base):
        if isinstance(model, torch.nn.Module) and isinstance(read, LiveCheckpoint) and read.shares(model.parameters()):
            raise UsageError(f"{read.path}: model= shares its values with it; give a copy, such as copy.deepcopy of it")


def _checked(scales: Sequence[float], controls: Sequence[str], seeds: int) -> tuple[list[float], list[str]]:
    for scale in scales:
        Choice(scale)
    if not scales:
        raise UsageError("no scales; expected at least one")
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"control {control!r}; expected some of {', '.join(CONTROLS)}")
    if not isinstance(seeds, int) or seeds < 1:
        raise UsageError(f"seeds = {seeds}; expected a whole number, at least 1")
    return sorted({float(scale) for scale in scales}, reverse=True), list(dict.fromkeys(controls))


def _evaluated(
    trial: _Trial, evaluate: Evaluate, scales: Sequence[float], include_base: bool, progress: Progress | None
) -> pandas.DataFrame:
    variants = [(variant, seed) for variant in (REPAIR, *trial.controls) for seed in trial.seeds_of(variant)]
    whole = len(variants) * sum(scale != 1 for scale in scales) + (1 in scales) + include_base
    metrics: list[str] = []
    done = 0

    def measure(what: str) -> dict[str, float]:
        nonlocal done
        numbers = _numbers(evaluate(trial.target.subject))
        if metrics and set(metrics) != set(numbers):
            raise UsageError(f"evaluate returned {', '.join(numbers)}, and before that {', '.join(metrics)}")
        metrics[:] = metrics or numbers
        done += 1
        if progress is not None:
            progress(done, whole, what)
        return numbers

    rows: list[dict[str, Any]] = []
    as_tuned = None
    if 1 in scales:
        trial.put(REPAIR, 0, 1.0)
        as_tuned = measure("the fine-tune")
    for variant, seed in variants:
        for scale in scales:
            values = as_tuned if scale == 1 else None
            if values is None:
                trial.put(variant, seed, scale)
                values = measure(f"{variant}, scale {scale:g}")
            rows.append({**trial.facts(variant, seed, scale), **values})
    if include_base:
        trial.put_base()
        rows.append({**trial.base_facts(), **measure("the base")})
    order = {variant: place for place, variant in enumerate((REPAIR, *trial.controls, BASE))}
    rows.sort(key=lambda row: (order[row["variant"]], -row["scale"], row["seed"]))
    return as_dataframe(rows, (*COLUMNS, *metrics))


def _numbers(returned: Any) -> dict[str, float]:
    values = returned if isinstance(returned, Mapping) else {"value": returned}
    for name, value in values.items():
        if not isinstance(name, str) or name in COLUMNS:
            raise UsageError(f"evaluate returned {name!r}; expected other names than {', '.join(COLUMNS)}")
        if isinstance(value, bool) or not isinstance(value, Real):
            kind = type(value).__name__
            raise UsageError(f"evaluate returned {kind} for {name!r}; expected a number, or a dict of numbers by name")
    if not values:
        raise UsageError("evaluate returned nothing; expected a number, or a dict of numbers by name")
    return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class _Line:
    """W1 + (1 − λ)·C, C being the change at λ = 0; ``along`` is ⟨dW, C⟩."""

    change: Change
    vectors: int
    along: float

    def at(self, scale: float) -> Change:
        return Change(self.change.B * (1 - scale), self.change.A)

    def squares(self, scale: float, update: float) -> tuple[float, float]:
        """‖W' − W1‖_F² and ‖W' − W0‖_F²; ``update`` is ‖dW‖_F²."""
        change = ((1 - scale) * self.change.norm) ** 2
        return change, max(update + 2 * (1 - scale) * self.along + change, 0.0)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer with chosen vectors; ``square`` is ‖dW‖_F²."""

    pair: LayerPair
    tuned: TunedWeight
    lines: Mapping[tuple[str, int], _Line]
    square: float

    def squares(self, variant: str, seed: int, scale: float) -> tuple[float, float]:
        """‖W' − W1‖_F² and ‖W' − W0‖_F²."""
        if variant not in UNIFORM:
            return self.lines[variant, seed].squares(scale, self.square)
        t = self._weight_of_update(variant, scale)
        return (1 - t) ** 2 * self.square, t**2 * self.square

    def _weight_of_update(self, variant: str, scale: float) -> float:
        """The t of W0 + t·dW."""
        if variant == "weight" or not self.square:
            return scale
        return float(np.sqrt(self.lines[REPAIR, 0].squares(scale, self.square)[1] / self.square))

    def weight(self, variant: str, seed: int, scale: float, dtype: torch.dtype) -> Tensor:
        if scale == 1:
            return edited_dense(self.tuned, None, dtype)
        if variant in UNIFORM:
            return edited_dense(self.tuned.scaled(self._weight_of_update(variant, scale)), None, dtype)
        line = self.lines[variant, seed]
        return edited_dense(self.tuned, line.at(scale) if line.vectors else None, dtype)


class _Trial:
    """A fine-tune's weights put where they are evaluated, and the layers that have chosen vectors."""

    def __init__(
        self, run: SingleRun, pairing: Pairing, carried: Sequence[Carried], choice: Choice, target: Target,
        controls: Sequence[str], seeds: int,
    ):  # fmt: skip
        self.run, self.pairing, self.carried, self.choice, self.target = run, pairing, carried, choice, target
        self.controls, self.seeds = controls, seeds
        self.layers: list[_Layer] = []

    def seeds_of(self, variant: str) -> range:
        return range(self.seeds if variant == "random" else 1)

    def put_beside(self) -> None:
        """All that the fine-tune has besides the layers that are analysed."""
        for item in self.carried:
            self._put_as_it_is(item.name, item.read(self.run.base, self.run.tuned))
        analysed = {pair.name for pair in self.run.pairs}
        for pair in self.pairing.pairs:
            if pair.rows is not None:  # the rows that only the fine-tune has
                self._put_as_it_is(name_in_model(pair), self.run.tuned.read(pair.update.tensors[0]))
            if pair.name not in analysed:
                weight = read_weight(self.run, pair)
                self._put_matrix(pair, edited_dense(weight, None, self._dtype(pair, weight.W0)))

    def visit(self, pair: LayerPair, tuned: TunedWeight, analysis: LayerAnalysis, result: Result) -> None:
        findings = result.findings
        assert findings is not None
        chosen = list(self.choice.of(pair.name, findings))
        if not chosen:
            self._put_matrix(pair, edited_dense(tuned, None, self._dtype(pair, tuned.W0)))
            return
        free = [vector.index for vector in findings.vectors if not vector.intruder and vector.index not in chosen]
        triplets = triplets_of(pair, tuned, analysis, chosen, free)
        own = triplets.take(chosen)
        taken = {(REPAIR, 0): own}
        for variant in self.controls:
            if variant == "neighbour":
                taken[variant, 0] = triplets.take(
                    neighbours(chosen, [index for index in free if index < triplets.s.size])
                )
            elif variant == "random":
                taken |= {(variant, seed): _random(own, pair.name, seed) for seed in self.seeds_of(variant)}
        self.layers.append(_layer(pair, tuned, taken))

    def put(self, variant: str, seed: int, scale: float) -> None:
        """The chosen layers as a variant has them; all others are there already."""
        for layer in self.layers:
            dtype = self._dtype(layer.pair, layer.tuned.W0)
            self._put_matrix(layer.pair, layer.weight(variant, seed, scale, dtype))

    def put_base(self) -> None:
        """The base's own weights where it has them, one at a time."""
        for pair in self.pairing.pairs:
            W0 = Job(((self.run, pair),)).read_base()
            self._put_matrix(pair, W0.to(self._dtype(pair, W0)))
        for item in self.carried:
            if item.base is not None and self.run.base.tensors[item.base].shape == item.shape:
                self._put_as_it_is(item.name, self.run.base.read(item.base))

    def _put_as_it_is(self, name: str, value: Tensor) -> None:
        self.target.put(name, working(value).to(self.run.settings.device))

    def _put_matrix(self, pair: LayerPair, matrix: Tensor) -> None:
        self.target.put(name_in_model(pair), as_stored(matrix, pair.layout, pair.analysed_shape), pair.rows)

    def _dtype(self, pair: LayerPair, W0: Tensor) -> torch.dtype:
        return self.target.dtype_of(name_in_model(pair)) or W0.dtype

    def facts(self, variant: str, seed: int, scale: float) -> dict[str, Any]:
        uniform = variant in UNIFORM
        vectors = [0 if uniform else layer.lines[variant, seed].vectors for layer in self.layers]
        layers = len(self.layers) if uniform else int(np.count_nonzero(vectors))
        change, update = np.sum([layer.squares(variant, seed, scale) for layer in self.layers], axis=0)
        return self._row(variant, scale, seed, sum(vectors), layers, float(change), float(update))

    def base_facts(self) -> dict[str, Any]:
        return self._row(BASE, np.nan, 0, 0, len(self.pairing.pairs), sum(layer.square for layer in self.layers), 0.0)

    def _row(
        self, variant: str, scale: float, seed: int, vectors: int, layers: int, change: float, update: float
    ) -> dict[str, Any]:
        before = sum(layer.square for layer in self.layers)
        relative = np.sqrt(change / before) if before else np.nan
        norms = (float(np.sqrt(change)), float(np.sqrt(update)), float(relative))
        return dict(zip(COLUMNS, (variant, scale, seed, vectors, layers, *norms), strict=True))


def neighbours(chosen: Sequence[int], free: Iterable[int]) -> list[int]:
    """For each of the chosen ranks the nearest free one, the stronger of two; none is taken twice."""
    left, taken = set(free), []
    for index in chosen:
        if not left:
            break
        nearest = min(left, key=lambda other: (abs(other - index), other))
        left.remove(nearest)
        taken.append(nearest)
    return sorted(taken)


def _random(own: Triplets, name: str, seed: int) -> Triplets:
    """Random directions with the same singular values, the same for a name in every run."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    U, V = (haar(rng, size, own.s.size).to(own.U.device) for size in own.shape)
    return replace(own, U=U, V=V)


def _layer(pair: LayerPair, tuned: TunedWeight, taken: Mapping[tuple[str, int], Triplets]) -> _Layer:
    changes = {key: scaled(triplets, np.zeros(triplets.s.size)) for key, triplets in taken.items()}
    along, square = dict.fromkeys(changes, 0.0), 0.0
    for rows in slabs(tuned.shape[0]):
        dW = tuned.block(rows, ALL) - tuned.W0[rows].double()
        square += float(dW.square().sum())
        for key, change in changes.items():
            along[key] += float(((dW @ change.A.T) * change.B[rows]).sum())
    lines = {key: _Line(change, change.B.shape[1], along[key]) for key, change in changes.items()}
    return _Layer(pair, tuned, lines, square)
