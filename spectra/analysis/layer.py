"""One layer from W0 and an update to its findings; also for plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.analysis.chance import Chance, chance_of
from spectra.analysis.detect import detect, is_noise_like, random_floor
from spectra.analysis.measures import UpdateSize, layer_measures
from spectra.analysis.study import Extras, Study, update_spectrum
from spectra.errors import NonFiniteError, UsageError
from spectra.records.layer import Vector
from spectra.svd import Base, Engine, Question, Spectrum, check_finite, choose_engine
from spectra.svd.triplets import Triplets, leading_triplets
from spectra.updates.algebra import Dense, LowRank, TunedWeight

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Findings:
    """What one layer's analysis found.

    Attributes
    ----------
    status : "analysed"; "proved_small" where the size of the update alone rules intruders out;
        "unchanged" where W1 equals W0 and nothing was decomposed.
    shape : (m, n) of the weight.
    vectors : the compared singular vectors of W1, by falling singular value.
    measures : see :func:`spectra.analysis.measures.layer_measures` and, in comparisons,
        :class:`spectra.analysis.study.Extras`.
    random_floor : the mean max |cos| of a random direction.
    noise_like_base : W0's spectrum is plain noise, so that its intruders say little.
    flags : "settled_in_float64", "zero_base", "stale_cache" (the spectrum kept by an earlier run is
        that of another weight, and was not used).
    residual, orthogonality : of the decompositions, relative to σ₁; None where there was none.
    chance : what is known of the number of intruders by chance; None for an unchanged layer.
    """

    status: Literal["analysed", "proved_small", "unchanged"]
    shape: tuple[int, int]
    vectors: tuple[Vector, ...] = ()
    measures: dict[str, float | None] = field(default_factory=dict)
    random_floor: float | None = None
    noise_like_base: bool | None = None
    flags: tuple[str, ...] = ()
    engine: str | None = None
    methods: tuple[str, ...] = ()
    residual: float | None = None
    orthogonality: float | None = None
    extras: Extras = field(default=Extras(), repr=False, compare=False)
    chance: Chance | None = field(default=None, repr=False, compare=False)

    @property
    def intruders(self) -> tuple[int, ...]:
        """The indices of the intruder dimensions."""
        return tuple(vector.index for vector in self.vectors if vector.intruder)


class LayerAnalysis:
    """The analysis of one base weight, for any number of updates of it.

    The base is decomposed only if some update changes it, and what is learnt of it is kept.
    """

    def __init__(
        self,
        W0: Tensor,
        question: Question,
        engine: Engine,
        *,
        fine_tunes: int = 1,
        stored: Callable[[], Spectrum | None] | None = None,
        study: Study | None = None,
    ):
        check_finite(W0)
        self._question, self._engine, self._study = question, engine, study
        self._base = Base(W0, question.side, fine_tunes=fine_tunes, stored=stored)

    def of(self, tuned: TunedWeight, seed: int = 0) -> Findings:
        """Findings for W1; ``seed`` is that of the random updates of a :class:`Study`.

        Raises
        ------
        NonFiniteError, ConvergenceError
        """
        for part in tuned.parts():
            check_finite(part)
        if tuned.is_unchanged():
            return Findings("unchanged", tuned.shape)
        question, spectrum, extras = self._question, None, Extras()
        with ieee_arithmetic():
            answer = self._engine.compare(self._base, tuned, question)
            vectors = detect(answer, question)
            if self._study is not None:
                spectrum = update_spectrum(tuned, question.side, question.top_k)
            update = UpdateSize.of(tuned, answer.engine, None if spectrum is None else spectrum.s)
            m, n = tuned.shape
            chance = chance_of(answer, (m, n), update.fro, update.spectral, update.values, question, seed)
            if self._study is not None and spectrum is not None:
                extras = self._study.of(self._base, tuned, question, self._engine, answer, vectors, spectrum, chance)
        measures = layer_measures((m, n), answer, vectors, self._base.norm_fro, update, chance.threshold)
        flags = ["settled_in_float64"] if answer.settled_in_float64 else []
        top, size = answer.base_norm_spectral, measures["base_norm_fro"]
        assert size is not None
        if top == 0:
            flags.append("zero_base")
        if self._base.stale:
            flags.append("stale_cache")
        small = all(match.decided_by == "bound" for match in answer.matches)
        return Findings(
            status="proved_small" if small else "analysed",
            shape=(m, n),
            vectors=vectors,
            measures={**measures, **extras.measures},
            random_floor=random_floor(m if question.side == "left" else n, min(m, n)),
            noise_like_base=is_noise_like((m, n), size, top),
            flags=tuple(flags),
            engine=answer.engine,
            methods=answer.methods,
            residual=answer.residual,
            orthogonality=answer.orthogonality,
            extras=extras,
            chance=chance,
        )

    def triplets(self, tuned: TunedWeight, k: int) -> Triplets:
        """The k leading singular triplets of W1, the i-th being what the i-th verdict is about.

        Raises
        ------
        NonFiniteError, ConvergenceError
        """
        with ieee_arithmetic():
            return leading_triplets(self._base, tuned, k)


def find_intruders(
    W0: Any,
    W1: Any = None,
    *,
    B: Any = None,
    A: Any = None,
    scaling: float = 1.0,
    top_k: int = 10,
    epsilon: float = 0.5,
    side: Literal["left", "right"] = "left",
    engine: str = "auto",
    dtype: Literal["float32", "float64"] = "float32",
) -> Findings:
    """Intruder dimensions of one fine-tuned weight.

    Parameters
    ----------
    W0 : the base weight, (out, in); an array or tensor.
    W1 : the tuned weight, (out, in); or give the factors of its update instead:
    B, A : (out, r) and (r, in), with W1 = W0 + scaling · B · A.
    top_k : how many of the largest singular values of W1 to look at.
    epsilon : a vector is an intruder when its |cos| with every base vector is strictly below.
    side : "left" as in the paper, or "right".
    engine, dtype : how to compute; all engines give the same verdicts.

    Raises
    ------
    UsageError : shapes that do not fit, or options out of range.
    NonFiniteError, ConvergenceError : the weights cannot be decomposed.

    Examples
    --------
    >>> import numpy as np, spectra
    >>> rng = np.random.default_rng(0)
    >>> W0 = rng.normal(size=(200, 200)) / 14
    >>> u, v = rng.normal(size=(2, 200)) / 14
    >>> spectra.find_intruders(W0, W0 + 30 * np.outer(u, v)).intruders
    (0,)
    """
    question = checked_question(top_k, epsilon, side)
    if dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r}; expected float32 or float64")
    base = _matrix("W0", W0, DTYPES[dtype])
    if (W1 is None) == (B is None and A is None) or (B is None) != (A is None):
        raise UsageError("give either W1, or both B and A")
    tuned: TunedWeight
    if W1 is not None:
        dense = _matrix("W1", W1, DTYPES[dtype])
        if dense.shape != base.shape:
            raise UsageError(f"W0 has shape {tuple(base.shape)}, W1 {tuple(dense.shape)}; expected the same")
        tuned = Dense(dense).tuned(base)
    else:
        left, right = _matrix("B", B, torch.float64), _matrix("A", A, torch.float64)
        if (left.shape[0], right.shape[1]) != tuple(base.shape) or left.shape[1] != right.shape[0]:
            raise UsageError(
                f"B {tuple(left.shape)} and A {tuple(right.shape)} do not make an update of {tuple(base.shape)}"
            )
        tuned = LowRank(left, right, scaling).tuned(base)
    return LayerAnalysis(base, question, choose_engine(engine)).of(tuned)


@contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Float32 products in float32: on CUDA, TF32 would keep 10 bits of them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check_device(device: str) -> None:
    """Raises UsageError where torch cannot compute there."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device = {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device = {device!r}, but torch finds no CUDA device here")


def checked_question(top_k: Any, epsilon: Any, side: str) -> Question:
    """The question with its options checked; raises UsageError."""
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
        raise UsageError(f"top-k = {top_k!r:.80}; expected a whole number, at least 1")
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float | np.number) or not 0 < epsilon <= 1:
        raise UsageError(f"epsilon = {epsilon!r:.80}; expected a cosine above 0, at most 1")
    top_k, epsilon = int(top_k), float(epsilon)
    if side == "left":
        return Question(top_k, epsilon, "left")
    if side == "right":
        return Question(top_k, epsilon, "right")
    raise UsageError(f"side = {side!r}; expected left or right")


def _matrix(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise UsageError(f"{name} has dtype {array.dtype}; expected real numbers")
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    if tensor.is_complex():
        raise UsageError(f"{name} has dtype {tensor.dtype}; expected real numbers")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UsageError(f"{name} has shape {tuple(tensor.shape)}; expected a matrix")
    try:
        check_finite(tensor)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from None
    return tensor.to(dtype)
