"""Weights that were stored with fewer bits: which form each has, from headers and ``config.json``.

Each form is dequantised as its writer defines it, in float32, and never rounded to the half precision that a model
computes in: what is analysed is the matrix that the stored numbers mean.  Forms that are known by name alone, or whose
settings leave their meaning open, are refused with the reason.

To add a form: a function in a file here that finds its weights among those of a :class:`~.weights.Quantised`
checkpoint, and its place in ``FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Unreadable, Weights
from spectra.files.stored.quantised.bitsandbytes import eight_bit, four_bit
from spectra.files.stored.quantised.float8 import float8, int8, mxfp4
from spectra.files.stored.quantised.ggml import ggml
from spectra.files.stored.quantised.mlx import mlx
from spectra.files.stored.quantised.named import left_over, named
from spectra.files.stored.quantised.packed import packed, qweights
from spectra.files.stored.quantised.weights import Quantised

# In this order: what is known by its names, then what its dtype alone gives away.
FORMS: tuple[Callable[[Quantised], Iterator[Derived | Unreadable]], ...] = (
    ggml, mlx, four_bit, eight_bit, mxfp4, qweights, packed, named, int8, float8, left_over,
)  # fmt: skip


def quantised(weights: Weights, config: Mapping[str, Any]) -> Iterator[Derived | Unreadable]:
    """The weights that quantised tensors are made into.

    Raises
    ------
    CorruptFileError : dtypes or shapes of what belongs together do not fit; file and tensor are named.
    """
    checkpoint = Quantised.of(weights, config)
    used: set[str] = set()
    for form in FORMS:
        for item in form(checkpoint):
            if isinstance(item, Unreadable):  # of what nothing else accounts for
                item = replace(item, sources=tuple(name for name in item.sources if name not in used))
            if not item.sources or not used.isdisjoint(item.sources):
                continue
            used.update(item.sources)
            stored = weights.get(item.name)
            if stored is not None and item.name not in item.sources:
                raise CorruptFileError(
                    stored.file, f"it is there as such and, quantised, as {item.sources[0]!r}", stored.name
                )
            yield item
