"""What comparing fine-tunes asks of one layer beyond the verdicts of an audit.

Each of these needs every cosine or a whole spectrum, so it goes with the cached or the exact engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.analysis.chance import Chance
from spectra.analysis.detect import detect, random_floor
from spectra.analysis.measures import noise_edge, spectrum_shift
from spectra.analysis.null import p_value
from spectra.records.energy import norm_fro
from spectra.records.layer import LayerSpectra, Vector
from spectra.svd import (
    Answer,
    Base,
    Engine,
    Question,
    Side,
    Spectrum,
    cosines_between,
    decompose_gram,
    gram_singular_values,
    match_vectors,
    numerical_rank,
    product_svd,
)
from spectra.updates.algebra import ALL, DenseWeight, TunedWeight, slabs

# The adapter weights tried, by factors of √2: the first intruder between two of them is then found by bisection.
WEIGHTS = tuple(float(2 ** (step / 2)) for step in range(-8, 5))
LEAST_WEIGHT = 2.0**-20  # an update that has intruders even here is no fine-tune
ACCURACY = 1.01  # ratio of the two weights between which the first intruder appears


@dataclass(frozen=True, eq=False)
class Extras:
    """Findings of a :class:`Study` on one layer.

    Attributes
    ----------
    measures : "rho_k", the share of ‖dW‖_F² within the base's k leading singular vectors (OPLoRA, arXiv
        2510.13003); "principal_overlap", Σcos²/k of the principal angles between the k leading vectors of W0
        and W1, null spaces being no directions; "spectrum_shift"; "noise_edge" of a dense dW and "noise_rank",
        the number of its values above that.
    principal_cosines : (k,) cosines of these angles, descending (arXiv 2511.08567).
    weights : "counts", [weight, intruders of W0 + weight·dW] on a grid; "threshold", the weight s* at which
        the first intruder appears (None where none does within the grid); "predicted", where a random
        update of dW's size would have it.
    null : "counts", the intruders of random updates with dW's singular values; "mean"; "p_value"; "drawn", false where
        random updates of dW's size have none (:mod:`spectra.analysis.chance`): then the counts are 0.
    directions : (d, ≤ k) the leading singular vectors of dW, on the side in question.
    """

    measures: dict[str, float | None] = field(default_factory=dict)
    principal_cosines: tuple[float, ...] = ()
    weights: dict[str, Any] | None = None
    null: dict[str, Any] | None = None
    directions: Tensor | None = None


@dataclass(frozen=True)
class Study:
    """Which extras to compute.

    Attributes
    ----------
    draws : random updates per layer; 0 for none.
    weights : whether to count intruders as a function of the adapter's weight.
    shift : whether to decompose each W1 for its whole spectrum.
    """

    draws: int = 20
    weights: bool = True
    shift: bool = True

    def of(
        self,
        base: Base,
        tuned: TunedWeight,
        question: Question,
        engine: Engine,
        answer: Answer,
        vectors: Sequence[Vector],
        update: Spectrum,
        chance: Chance,
    ) -> Extras:
        """The extras of one layer, whose ``answer``, verdicts and update's spectrum are known already."""
        intruders = _intruders(vectors)
        edge = dense_noise_edge(tuned, update.s)
        measures: dict[str, float | None] = {
            "rho_k": _share_in_top(base, tuned, update, question.top_k),
            "principal_overlap": None,
            "spectrum_shift": None,
            "noise_edge": edge,
            "noise_rank": None if edge is None else int(np.count_nonzero(update.s > edge)),
        }
        cosines: tuple[float, ...] = ()
        values = answer.base_values
        k = min(question.top_k, *tuned.shape)
        if answer.cosines is not None and values is not None and values[0] > 0:
            known = sum(match.max_cosine is not None for match in answer.matches)  # null spaces are no directions
            corner = answer.cosines[: min(k, numerical_rank(values, tuned.shape)), : min(k, known)]
            cosines = tuple(float(min(value, 1.0)) for value in np.linalg.svd(corner, compute_uv=False))
            measures["principal_overlap"] = float(np.sum(np.square(cosines)) / k)
        if self.shift and values is not None and values[0] > 0:
            after = answer.tuned_values
            measures["spectrum_shift"] = spectrum_shift(values, gram_singular_values(tuned) if after is None else after)
        curve = null = None
        if self.weights:

            def count(weight: float) -> int:
                return _intruders(detect(engine.compare(base, tuned.scaled(weight), question), question))

            curve = weight_curve(count, intruders)
            expected = chance.threshold if values is not None else None
            curve["predicted"] = None if expected is None or not update.s[0] > 0 else expected / float(update.s[0])
        if self.draws and values is not None:
            counts = np.zeros(self.draws, dtype=np.int64)
            if chance.open is not None:
                counts = chance.open.counts(question, self.draws)
            null = {
                "drawn": chance.open is not None,
                "draws": self.draws,
                "counts": counts.tolist(),
                "mean": float(counts.mean()),
                "p_value": p_value(intruders, counts),
            }
        return Extras(measures, cosines, curve, null, update.vectors)


def _intruders(vectors: Sequence[Vector]) -> int:
    return sum(vector.intruder for vector in vectors)


def update_spectrum(tuned: TunedWeight, side: Side, keep: int) -> Spectrum:
    """All singular values of dW and its ``keep`` leading vectors, float64.

    From the factors where there are any (two QR factorisations and an r × r problem), else from the
    Gram matrix of dW in the working dtype.
    """
    factors = tuned.low_rank()
    if factors is None:
        spectrum = decompose_gram(DenseWeight(tuned.W0, tuned.delta()), side, keep=keep)
    else:
        U, s, Vh = product_svd(*factors)
        spectrum = Spectrum(s, U if side == "left" else Vh.T, side, np.zeros(s.size), 0.0, tuned.shape, "factors")
    return replace(spectrum, vectors=spectrum.vectors[:, : min(keep, spectrum.rank)].clone())


def weight_curve(count: Callable[[float], int], at_one: int) -> dict[str, Any]:
    """The number of intruders as a function of the adapter's weight, and where the first appears.

    ``count(weight)`` is that of W0 + weight·dW, ``at_one`` the known one at weight 1.  The count need not be
    monotone: the threshold is the first crossing seen on the grid, then refined to 1 %.
    """
    counts = [(weight, at_one if weight == 1 else count(weight)) for weight in WEIGHTS]
    first = next((place for place, (_, intruders) in enumerate(counts) if intruders), None)
    threshold = None
    if first is not None:
        high = counts[first][0]
        low = counts[first - 1][0] if first else high / 2
        while not first and low > LEAST_WEIGHT and count(low):
            low, high = low / 2, low
        while high / low > ACCURACY:
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if count(middle) else (middle, high)
        threshold = high
    return {"threshold": threshold, "counts": [list(item) for item in counts]}


def _share_in_top(base: Base, tuned: TunedWeight, update: Spectrum, k: int) -> float | None:
    """ρ_k = ‖U_k·U_kᵀ·dW‖_F² / ‖dW‖_F², U_k the base's k leading vectors on the side in question."""
    size = norm_fro(update.s)
    if not base.is_decomposed or not size > 0:
        return None
    U = base.leading_vectors(k)
    if not U.shape[1]:
        return None
    factors = tuned.low_rank()
    if factors is not None:
        B, A = factors if base.side == "left" else (factors[1].T, factors[0].T)
        return min(float(torch.linalg.matrix_norm((U.T @ B) @ A) / size) ** 2, 1.0)
    inside = 0.0
    for part in slabs(tuned.shape[1 if base.side == "left" else 0]):
        where = (ALL, part) if base.side == "left" else (part, ALL)
        dW = tuned.block(*where) - tuned.W0[where].double()
        inside += float(torch.linalg.matrix_norm(U.T @ (dW if base.side == "left" else dW.T)) / size) ** 2
    return min(inside, 1.0)


def dense_noise_edge(tuned: TunedWeight, s: np.ndarray) -> float | None:
    """The noise edge of a full fine-tune's dW; None for factors, in which there is no noise."""
    return noise_edge(s, tuned.shape) if isinstance(tuned, DenseWeight) and tuned.free else None


def layer_spectra_of(
    base: Base, tuned: TunedWeight, question: Question, size: int, *, name: str, module_type: str, label: str, kind: str
) -> LayerSpectra:
    """Everything a figure of one layer shows, all of it from float64 Gram matrices."""
    W1 = decompose_gram(tuned, question.side, keep=max(size, question.top_k))
    before = base.settled
    cosines = cosines_between(before, W1.vectors)
    vectors: tuple[Vector, ...] = detect(
        Answer(
            matches=tuple(match_vectors(before, W1, question.top_k, cosines)),
            engine="exact",
            base_norm_spectral=float(before.s[0]),
            residual=max(before.residual, W1.residual),
            orthogonality=before.orthogonality,
            settled_in_float64=True,
            methods=(W1.method,),
        ),
        question,
    )
    update = update_spectrum(tuned, question.side, 1)
    return LayerSpectra(
        name=name,
        module_type=module_type,
        tuned=label,
        kind=kind,
        shape=tuned.shape,
        side=question.side,
        epsilon=question.epsilon,
        base_values=before.s,
        tuned_values=W1.s,
        update_values=update.s,
        cosines=np.abs(cosines[:size, :size]),
        vectors=vectors,
        noise_edge=dense_noise_edge(tuned, update.s),
        random_floor=random_floor(W1.vectors.shape[0], min(tuned.shape)),
    )
