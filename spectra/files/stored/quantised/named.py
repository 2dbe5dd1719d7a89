"""Quantised weights that are known by their tensors' names, and not read: what each is, so that it can be said."""

from __future__ import annotations

from collections.abc import Iterator

from spectra.files.derived import Derived, Unreadable
from spectra.files.stored.quantised.weights import Quantised

NOT_READ = "this version does not read it"
# The end of a tensor's name after its module's, and what writes it.
NAMES = {
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "weight_scales": "EETQ",
    "weight._data": "quanto",
    "weight_qdata": "torchao",
    "weight__qdata": "torchao",
    "_weight_qdata": "torchao",
    "weight_global_scale": "NVFP4 (compressed-tensors)",
    "weight_scale_2": "NVFP4 (modelopt)",
    "weight_packed": "compressed-tensors, four-bit floats",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "suh": "EXL3",
    "centroids": "VPTQ",
    "B": "Marlin",
    "biases": "MLX",
}
# Names that say enough only beside another: a parameter may be called B, a codebook may be what was trained.
BESIDE = {
    "W_q": "scale",
    "B": "s",
    "codebooks": "codes",
    "centroids": "indices",
    "biases": "scales",
    "weight_scales": "weight",
}


def named(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """A weight for each module that has a name of :data:`NAMES`."""
    done: set[str] = set()
    for name in checkpoint.weights:
        for depth in (1, 2):
            parts = name.rsplit(".", depth)
            module, end = parts[0], ".".join(parts[1:])
            if len(parts) <= depth or end not in NAMES or module in done:
                continue
            if end in BESIDE and checkpoint.get(f"{module}.{BESIDE[end]}") is None:
                continue
            done.add(module)
            method = f"quantised ({NAMES[end]})"
            yield checkpoint.refused(f"{module}.weight", f"{method}: {NOT_READ}", [name, *checkpoint.belonging(module)])


def left_over(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """Matrices of integers named as weights that nothing above knows, where the config names a method."""
    method = checkpoint.method
    for name, info in checkpoint.weights.items():
        if not name.endswith(".weight") or len(info.shape) < 2 or info.dtype[0] not in "IU" or not method:
            continue
        reason = f"quantised ({method[:40]!r} by config.json) and stored as {info.dtype}: {NOT_READ}"
        module = name.removesuffix(".weight")
        yield checkpoint.refused(name, reason, [name, *checkpoint.belonging(module, name)])
