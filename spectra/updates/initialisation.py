"""LoRA whose first factors were taken out of the base: PiSSA, OLoRA and others.

Training begins at W0 − B0·A0 with factors that make up for it, so that the tuned weight is W0 − B0·A0 + s·B·A.  What
was taken out follows from W0, or from the factors that training began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectra.errors import NonFiniteError, SpectraError
from spectra.updates.algebra import ALL, DenseWeight, FactoredWeight, LowRank, RowScaled, slabs

# Of what float32 decompositions leave: 4·eps·σ1·√r (1 + 2·σ_r/gap) is above all that was measured, by a factor of 2.
ROUNDING = 4 * 2.0**-23
UNDECIDED = 0.05  # the part of an update that may be in doubt
HALVES = (torch.bfloat16, torch.float16)
EARLIER = (
    "give the adapter as it was before training: audit, compare, plot, ranks and inspect take it as --initial-adapter"
)
RESIDUAL = (
    'audit against what was left of the base (the "residual" model) instead, with "init_lora_weights": true in a copy '
    "of the adapter's config"
)
AKIN = 0.3  # the cosine of what was taken out and of trained factors, which is about 1 where the base is the right one


@dataclass(frozen=True, eq=False)
class Taken:
    """B (m, r) and A (r, n) in float64: what initialisation took out of a weight, scaled.

    ``error`` bounds ‖B·A − what was taken out in float32‖_F; ``why`` says where it comes from, ``advice`` what helps.
    """

    B: Tensor
    A: Tensor
    error: float = 0.0
    why: str = ""
    advice: str = EARLIER

    @property
    def size(self) -> float:
        """‖B·A‖_F."""
        return math.sqrt(max(0.0, _inner(self.B, self.A, self.B, self.A)))


def leading(W: Tensor, rank: int) -> Taken:
    """The best approximation of a rank: PiSSA; Meng et al. 2024, arXiv 2404.02948."""
    m, n = W.shape
    shorter = W.double() if n <= m else W.T.double()
    values, vectors = torch.linalg.eigh(shorter.T @ shorter)
    s = values.flip(0).clamp(min=0).sqrt()[: rank + 1].tolist()
    V = vectors.flip(1)[:, :rank]
    B, A = (shorter @ V, V.T) if n <= m else (V, (shorter @ V).T)
    error, why = ROUNDING * s[0] * math.sqrt(rank), ""
    if rank < len(s):
        gap = s[rank - 1] - s[rank]
        error += min(2 * s[rank - 1], error * 2 * s[rank - 1] / gap) if gap > 0 else 2 * s[rank - 1]
        why = f"its singular values {rank} and {rank + 1} are too close ({s[rank - 1]:.6g} and {s[rank]:.6g})"
    return Taken(B, A, error, why)


def of_first_columns(W: Tensor, rank: int) -> Taken:
    """Q[:, :r]·R[:r] of W = Q·R, the part of W in the span of its first columns: OLoRA; arXiv 2406.01775."""
    Q, R = torch.linalg.qr(W[:, :rank].double())
    A = Q.T @ W.double()
    s = torch.linalg.svdvals(R).tolist()
    condition = s[0] / s[-1] if s[-1] > 0 else math.inf
    size = float(torch.linalg.vector_norm(A))
    why = f"its first {rank} columns are close to dependent (condition {condition:.3g})"
    return Taken(Q, A, min(2 * size, ROUNDING * size * math.sqrt(rank) * condition), why)


def as_saved(B: Tensor, A: Tensor, scaling: float) -> Taken:
    """What an adapter saved before training says: float32 factors, or these rounded to half precision.

    Of a model in half precision peft takes out the product of float32 factors, and rounds these afterwards.  With
    B = B̂ + E, A = Â + F of the saved B̂ and Â, and |E| ≤ u·|B̂|, |F| ≤ u·|Â| by entry (u = 2⁻⁸ for bfloat16, 2⁻¹¹ for
    float16), ‖B·A − B̂·Â‖_F ≤ ‖E‖_F·‖Â‖₂ + ‖B̂‖₂·‖F‖_F + ‖E‖_F·‖F‖_F.
    """
    taken = Taken(B * scaling, A)
    dtype = next((dtype for dtype in HALVES if all(_is_held(factor, dtype) for factor in (B, A))), None)
    if dtype is None or not bool(B.isfinite().all() and A.isfinite().all()):
        return taken
    limits = torch.finfo(dtype)
    unit = limits.eps / 2
    E, F = (
        unit * (float(torch.linalg.vector_norm(factor)) + limits.smallest_normal * math.sqrt(factor.numel()))
        for factor in (B, A)
    )
    error = E * float(torch.linalg.matrix_norm(A, 2)) + float(torch.linalg.matrix_norm(B, 2)) * F + E * F
    why = f"the adapter from before training holds it rounded to {str(dtype).removeprefix('torch.')}"
    return replace(taken, error=error * abs(scaling), why=why, advice=RESIDUAL)


def _is_held(values: Tensor, dtype: torch.dtype) -> bool:
    return bool((values.to(dtype).to(values.dtype) == values).all())


def surer(computed: Taken, saved: Taken) -> Taken:
    """What was computed from the base, where that agrees with what was saved and is the more certain of both."""
    apart = Taken(torch.cat([computed.B, -saved.B], 1), torch.cat([computed.A, saved.A])).size
    return computed if computed.error <= saved.error and apart <= computed.error + saved.error else saved


@dataclass(frozen=True, eq=False)
class Reinitialised:
    """W1 = (W0 − B0·A0) + s·B·A, or DoRA of that, with B0·A0 as ``taken`` finds it.

    Attributes
    ----------
    update : the trained factors.
    taken : of a weight (m, n) in the working dtype, what was taken out of it.
    refuse : the error for a reason that this cannot be told.
    dtype : the half precision to which the base was rounded after something had been taken out of it; None for float32.
    turned : what is taken out is that of W0ᵀ, as it is stored.
    from_base : ``taken`` depends on W0, so that trained factors unlike it show that W0 is another weight.
    """

    update: LowRank | RowScaled
    taken: Callable[[Tensor], Taken]
    refuse: Callable[[str], SpectraError]
    dtype: torch.dtype | None = None
    turned: bool = False
    from_base: bool = True

    def tuned(self, W0: Tensor) -> FactoredWeight | DenseWeight:
        taken = self.taken(W0.T if self.turned else W0)
        B, A = self.update.B.double() * self.update.scaling, self.update.A.double()
        if not bool(
            B.isfinite().all() and A.isfinite().all() and taken.B.isfinite().all() and taken.A.isfinite().all()
        ):
            raise NonFiniteError("holds NaN or infinity")
        if self.from_base and not _cosine(B, A, taken) >= AKIN:
            raise self.refuse(
                "the trained factors are nothing like what their initialisation took out of this base: it is another "
                'model, or what was left of it already; if so, set "init_lora_weights": true in a copy of the '
                "adapter's config"
            )
        B0, A0 = (taken.A.T, taken.B.T) if self.turned else (taken.B, taken.A)
        B, A = condensed(torch.cat([B, -B0], 1), torch.cat([A, A0], 0))
        size, change = taken.size, float(torch.linalg.vector_norm(B.T @ B))
        if taken.error > UNDECIDED * change:
            if change > taken.error or taken.error > 1e-3 * size:
                raise self.refuse(
                    "what its initialisation took out of the base weight cannot be told closely enough, since "
                    f"{taken.why or 'the change is as small as rounding'}; {taken.advice}"
                )
            B, A = torch.zeros_like(B[:, :1]), torch.zeros_like(A[:1])
        if self.dtype is None:
            return replace(self.update, B=B, A=A, scaling=1.0).tuned(W0)
        return self._rounded(W0, B0, A0, self.dtype)

    def _rounded(self, W0: Tensor, B0: Tensor, A0: Tensor, dtype: torch.dtype) -> DenseWeight:
        rest, whole = torch.empty_like(W0), torch.empty_like(W0)
        for rows in slabs(W0.shape[0]):
            rest[rows] = (W0[rows].double() - B0[rows] @ A0).float().to(dtype).to(W0.dtype)
        inner = self.update.tuned(rest)
        for rows in slabs(W0.shape[0]):
            whole[rows] = inner.block(rows, ALL).to(W0.dtype)
        return DenseWeight(W0, whole, free=False)


def condensed(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, B' = U·√S and A' = √S·Vᵀ of its singular values: nothing in it cancels."""
    Q, R = torch.linalg.qr(B)
    P, L = torch.linalg.qr(A.T)
    U, s, V = torch.linalg.svd(R @ L.T, full_matrices=False)
    root = s.sqrt()
    return Q @ (U * root), (P @ (V.T * root)).T


def _cosine(B: Tensor, A: Tensor, other: Taken) -> float:
    """The cosine of B·A and another product, as vectors; 0 where one of them is zero."""

    sizes = _inner(B, A, B, A) * _inner(other.B, other.A, other.B, other.A)
    return _inner(B, A, other.B, other.A) / math.sqrt(sizes) if sizes > 0 else 0.0


def _inner(B: Tensor, A: Tensor, B2: Tensor, A2: Tensor) -> float:
    """⟨B·A, B2·A2⟩, without the products."""
    return float(((B.T @ B2) * (A @ A2.T)).sum())
