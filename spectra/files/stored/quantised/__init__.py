"""Weights that were stored with fewer bits: which form each has, from headers and ``config.json``.

Each form is dequantised as its writer defines it, in float32, and never rounded to the half precision that a model
computes in: what is analysed is the matrix that the stored numbers mean.  Forms that are known by name alone, or whose
settings leave their meaning open, are refused with the reason.

To add a form: a function in a file here that finds its weights among those of a :class:`~.weights.Quantised`
checkpoint, and its place in ``READS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Unreadable, Weights
from spectra.files.stored.quantised.bitsandbytes import eight_bit, four_bit
from spectra.files.stored.quantised.float8 import float8, int8, mxfp4
from spectra.files.stored.quantised.ggml import READ, ggml
from spectra.files.stored.quantised.mlx import BITS, mlx
from spectra.files.stored.quantised.named import left_over, named
from spectra.files.stored.quantised.packed import packed, qweights
from spectra.files.stored.quantised.weights import Quantised

Form = Callable[[Quantised], Iterator[Derived | Unreadable]]

# In this order: what is known by its names, then what its dtype alone gives away.  With what each reads, for the
# documentation; the two that say "" refuse.
READS: dict[Form, str] = {
    ggml: f"GGUF: {', '.join(sorted(READ))} (`pip install '.[gguf]'`)",
    mlx: f"MLX: {', '.join(map(str, BITS))} bits, bits of single modules, mxfp4",
    four_bit: "bitsandbytes: nf4, fp4",
    eight_bit: "bitsandbytes: int8",
    mxfp4: "MXFP4 of gpt-oss",
    qweights: "GPTQ°, AWQ° (gemm)",
    packed: "compressed-tensors: packed integers",
    named: "",
    int8: "compressed-tensors: int8",
    float8: "fp8 with block, row or tensor scales (DeepSeek, fbgemm, compressed-tensors)",
    left_over: "",
}
FORMS = tuple(READS)


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
