"""Which singular vectors of a fine-tune are scaled, by how much, and what becomes of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectra.adapters import PlannedUpdate
from spectra.adapters.peft.writing import STORED
from spectra.analysis.layer import Findings, LayerAnalysis
from spectra.analysis.scaling import Change, edited_dense, edited_update, outcome_of, scaled, uncertainty
from spectra.errors import NonFiniteError, UsageError
from spectra.pairing.pairs import LayerPair, name_matches
from spectra.records.repair import LayerRepair, ScaledVector
from spectra.records.report import Report, module_type
from spectra.svd.triplets import Triplets
from spectra.updates.algebra import DenseWeight, FactoredWeight, LowRank, RowScaled, TunedWeight

NUMBERS = (int, float, np.integer, np.floating)
NOTHING = 1e-6  # of the largest singular value: rounding is all that float32 leaves below

Scale: TypeAlias = float | Mapping[str, float]
Which: TypeAlias = Literal["all", "top"] | Mapping[str, Sequence[int]]


class Choice:
    """Which vectors of which layers, and their scales.

    Parameters
    ----------
    scale : one for all, or {pattern over module names: scale}, of which the last that matches counts; layers that
        none matches stay as they are.
    which : "all" intruders among the leading vectors, the "top" one of each weight, or {pattern: indices}.
    noise_like : the first two also in layers whose base is plain noise, where anything moves the vectors.

    Raises
    ------
    UsageError : a scale that is no number from 0 to 1, or indices that are none.
    """

    def __init__(self, scale: Scale, which: Which = "all", *, noise_like: bool = False):
        self.noise_like = noise_like
        self.scales = dict(scale) if isinstance(scale, Mapping) else {"*": scale}
        for pattern, value in self.scales.items():
            number = isinstance(value, NUMBERS) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                of = "" if pattern == "*" else f" for {pattern!r}"
                raise UsageError(f"scale = {value}{of}; expected a number from 0 (removes) to 1 (changes nothing)")
        self.which = which
        if isinstance(which, str):
            if which not in ("all", "top"):
                raise UsageError(f"which = {which!r}; expected all, top, or indices by layer")
            self.named: dict[str, list[int]] = {}
            return
        self.named = {pattern: list(indices) for pattern, indices in which.items()}
        for pattern, indices in self.named.items():
            if not indices or not all(
                isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in indices
            ):
                raise UsageError(f"vectors {indices} for {pattern!r}; expected ranks from 0 on")
            self.named[pattern] = list(map(int, indices))

    def record(self) -> dict[str, Any]:
        """What a record's settings say of it."""
        scales = {pattern: float(value) for pattern, value in self.scales.items()}
        return {
            "scale": scales["*"] if set(scales) == {"*"} else scales,
            "which": self.named or self.which,
            "noise_like": self.noise_like,
        }

    def left_alone(self, report: Report) -> tuple[str, ...]:
        """What to say of intruders that were not chosen since the base of their layer is plain noise."""
        apart = report.total("all") - report.total()
        if self.noise_like or self.named or not apart:
            return ()
        what = "another intruder lies" if apart == 1 else f"another {apart} intruders lie"
        return (
            f"{what} in layers whose base is plain noise, where anything moves the vectors, and stay as they are; "
            "noise_like=True, or --noise-like, scales them too",
        )

    def check(self, pairs: Iterable[LayerPair]) -> None:
        """Raises UsageError where a pattern matches no layer, or its weight has no such index."""
        pairs = list(pairs)
        for pattern in (*self.scales, *self.named):
            matches = [pair for pair in pairs if name_matches(pair.name, pattern)]
            if not matches:
                raise UsageError(f"{pattern!r} matches no layer that is analysed")
            last = max(self.named.get(pattern, ()), default=0)
            for pair in matches:
                if last >= min(pair.shape):
                    raise UsageError(
                        f"{pair.name}: vector {last}; a weight of {list(pair.shape)} has {min(pair.shape)}"
                    )
                if pattern in self.named and pair.update.scaling == 0:
                    raise UsageError(f"{pair.name}: its scaling is 0, and no factors times that make a change")

    def scale_of(self, name: str) -> float:
        """The scale of a layer's chosen vectors."""
        scale = 1.0
        for pattern, value in self.scales.items():
            scale = float(value) if name_matches(name, pattern) else scale
        return scale

    def of(self, name: str, findings: Findings) -> dict[int, float]:
        """{index: scale} of one layer, without scales of 1."""
        scale = self.scale_of(name)
        if scale == 1 or (findings.noise_like_base and not self.noise_like and not self.named):
            return {}
        indices: Sequence[int] = findings.intruders
        if self.which == "top":
            indices = indices[:1]
        elif self.which != "all":
            indices = sorted({i for pattern, some in self.named.items() if name_matches(name, pattern) for i in some})
        return dict.fromkeys(indices, scale)


def triplets_of(
    pair: LayerPair, tuned: TunedWeight, analysis: LayerAnalysis, chosen: Iterable[int], others: Iterable[int] = ()
) -> Triplets:
    """The leading triplets as far as ``chosen`` reach, and ``others`` where W1 has so many.

    Raises
    ------
    UsageError : a chosen index beyond the rank of W1, where there is no vector.
    NonFiniteError, ConvergenceError
    """
    last = max(chosen)
    triplets = analysis.triplets(tuned, max(last, *others, 0) + 1)
    if last >= triplets.s.size:
        raise UsageError(f"{pair.name}: vector {last}; the weight has {triplets.s.size} above its null space")
    return triplets


@dataclass(frozen=True, eq=False)
class Edited:
    """One layer as it is written: ``update`` in factors, or the ``dense`` weight, both as stored."""

    record: LayerRepair
    findings: Findings
    update: LowRank | RowScaled | None
    dense: Tensor | None


def edit(
    pair: LayerPair,
    tuned: TunedWeight,
    analysis: LayerAnalysis,
    findings: Findings,
    chosen: Mapping[int, float],
    *,
    dtype: torch.dtype,
    in_factors: bool,
    keep_rank: bool,
) -> Edited:
    """The layer with its ``chosen`` vectors, {index: scale}, scaled as stored in ``dtype``, and what that came to.

    Raises
    ------
    UsageError : no such vector, or values that the dtype cannot hold.
    NonFiniteError, ConvergenceError
    """
    planned, indices, scales = pair.update, list(chosen), np.array(list(chosen.values()))
    triplets = triplets_of(pair, tuned, analysis, chosen)
    own = triplets.take(indices)
    change = scaled(own, scales)
    update, dense = None, None
    if in_factors:
        assert isinstance(tuned, FactoredWeight)
        assert planned.scaling is not None
        rank = planned.rank if keep_rank else None
        with _naming(pair):
            update = edited_update(tuned, change, planned.scaling, rank=rank, dtype=dtype)
        after: TunedWeight = update.tuned(tuned.W0)
    else:
        dense = whole_weight(pair, tuned, change, dtype)
        after = DenseWeight(tuned.W0, dense.to(tuned.W0.dtype))
    findings_after = analysis.of(after)
    outcome = outcome_of(tuned, change, after, own)
    error = outcome.error + uncertainty(own, scales)
    achieved = [scale * sigma for scale, sigma in zip(outcome.scales, own.s.tolist(), strict=True)]
    known = _known_values(triplets, findings)
    ranks = _ranks_after(known, indices, achieved, known.size == min(tuned.shape))
    verdicts = {vector.index: vector for vector in findings.vectors}
    vectors = []
    for at, (index, scale) in enumerate(chosen.items()):
        verdict = verdicts.get(index)
        vectors.append(
            ScaledVector(
                index=index,
                sigma=float(own.s[at]),
                scale=scale,
                scale_achieved=outcome.scales[at],
                sigma_after=achieved[at],
                energy=(_share(float(own.s[at]), outcome.before) or 0.0) ** 2,
                energy_after=(_share(achieved[at], outcome.after) or 0.0) ** 2,
                index_after=ranks[at],
                max_cosine=None if verdict is None else verdict.max_cosine,
                intruder=verdict is not None and verdict.intruder,
            )
        )
    record = LayerRepair(
        name=pair.name,
        module_type=module_type(pair.name),
        role=pair.role,
        shape=pair.shape,
        kind=planned.kind,
        vectors=tuple(vectors),
        intruders_before=len(findings.intruders),
        intruders_after=len(findings_after.intruders),
        update_norm=outcome.update_before,
        update_norm_after=outcome.update_after,
        update_change=_share(outcome.change, outcome.update_before),
        update_error=_share(error, outcome.update_meant, NOTHING * outcome.update_before),
        weight_error=_share(error, outcome.meant, NOTHING * outcome.before),
        residual=own.residual,
        rank=planned.rank,
        rank_after=None if update is None else update.A.shape[0],
        parameters=planned.parameters,
        parameters_after=_parameters(pair, update),
        dtype=next(name for name, stored in STORED.items() if stored == dtype),
        noise_like_base=findings.noise_like_base,
        notes=pair.notes,
    )
    return Edited(record, findings_after, update, dense)


def whole_weight(pair: LayerPair, tuned: TunedWeight, change: Change | None, dtype: torch.dtype) -> Tensor:
    """W1 + change as it is stored whole; raises UsageError where the dtype cannot hold it."""
    with _naming(pair):
        return edited_dense(tuned, change, dtype)


@contextmanager
def _naming(pair: LayerPair) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        raise UsageError(f"{pair.name}: {error}") from None


def _parameters(pair: LayerPair, update: LowRank | RowScaled | None) -> int:
    if update is not None:
        return parameters_of(pair.update, pair.shape[0], update.A.shape[0])
    return pair.update.parameters if pair.update.kind == "dense" else pair.shape[0] * pair.shape[1]


def _known_values(triplets: Triplets, findings: Findings) -> np.ndarray:
    """The leading singular values of W1 as far as they are known, descending; all of them of small weights."""
    values = triplets.values
    more = [vector.sigma for vector in findings.vectors if vector.index >= values.size]
    return np.concatenate([values, more])


def _ranks_after(known: np.ndarray, chosen: list[int], achieved: list[float], complete: bool) -> list[int | None]:
    """The rank of each scaled value among all; None where it fell below what is known, or to nothing."""
    others = np.delete(known, chosen)
    least = NOTHING * float(known[0])
    if not complete and others.size:
        least = max(least, float(others[-1]))
    return [
        int(np.count_nonzero(others > value)) + sum(other > value for other in achieved) if value > least else None
        for value in achieved
    ]


def parameters_of(planned: PlannedUpdate, rows: int, rank: int) -> int:
    """How many values are stored for a low-rank update of (rows, …) at another rank."""
    assert planned.rank is not None
    magnitudes = rows if planned.kind == "row_scaled" else 0
    return (planned.parameters - magnitudes) // planned.rank * rank + magnitudes


def _share(part: float, whole: float, nothing: float = 0.0) -> float | None:
    return part / whole if whole > nothing else None
