"""The exact engine: full decompositions of both weights, settled in float64 where needed.

The base and the tuned weight are decomposed by a thin SVD in the working dtype.  Where that leaves
a verdict open (a cosine near epsilon, a gap that float32 cannot resolve, a cluster), the layer is
settled from its float64 Gram matrices, whose singular vectors are accurate to about
1e-15·σ₁²/(σ·gap): far beyond the float32 SVD for every singular value above its null space.
"""

from __future__ import annotations

import torch

from spectra.svd.base import Base
from spectra.svd.decompose import decompose, decompose_gram
from spectra.svd.engine import Answer, Question
from spectra.svd.matching import cosines_between, match_vectors, verdict_is_open
from spectra.svd.threads import both
from spectra.updates.algebra import TunedWeight


class ExactEngine:
    """Full decompositions of W0 and W1; the reference for every other engine."""

    name = "exact"

    def compare(self, base: Base, tuned: TunedWeight, question: Question) -> Answer:
        k = question.top_k
        settle = base.is_settled  # what is known in float64 is not decomposed again in float32
        if not settle:
            spectrum, before = both(
                lambda: decompose(tuned.dense(), question.side, keep=k),
                lambda: base.exact,
                base.W0,
                alone=base.is_exact,
            )
            cosines = cosines_between(before, spectrum.vectors)
            matches = match_vectors(before, spectrum, k, cosines)
            settle = before.dtype != torch.float64 and any(verdict_is_open(m, question.epsilon) for m in matches)
            if settle:
                del before, cosines
        if settle:
            # The tuned side first: of a large one only its top vectors stay while the base's take the memory.
            spectrum, before = both(
                lambda: decompose_gram(tuned, question.side, keep=k),
                lambda: base.settled,
                base.W0,
                alone=base.is_settled,
            )
            cosines = cosines_between(before, spectrum.vectors)
            matches = match_vectors(before, spectrum, k, cosines)
        return Answer(
            matches=tuple(matches),
            engine=self.name,
            base_norm_spectral=float(before.s[0]),
            residual=max(before.residual, spectrum.residual),
            orthogonality=max(before.orthogonality, spectrum.orthogonality),
            settled_in_float64=settle,
            methods=tuple(dict.fromkeys((before.method, spectrum.method))),
            base_values=before.s,
            tuned_values=spectrum.s if spectrum.dtype == torch.float64 else None,
            cosines=cosines,
        )
