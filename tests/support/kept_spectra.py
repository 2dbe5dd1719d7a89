"""A small family whose base's spectra are kept on disk, and what there is of them."""

from __future__ import annotations

import os

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.problems import trained_like


def weights(rng, *names, shape=(40, 32)):
    return {name: torch.from_numpy(trained_like(rng, *shape)).float() for name in names}


def kept(root):
    """The layer files under a root."""
    return sorted(root.glob("*/*.safetensors"))


def rewrite(base, tensors, *, later=True):
    """Other values in the same file, of the same size, written later or at the very same time."""
    file = base / "model.safetensors"
    before = file.stat()
    save_file(tensors, file)
    assert file.stat().st_size == before.st_size
    shift = 10**9 if later else 0
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + shift))


def verdicts(report):
    return {layer.name: (layer.status, layer.intruder_indices) for layer in report.layers}


def engines(report):
    return {layer.engine for layer in report.layers}


def flags(report):
    return {flag for layer in report.layers for flag in layer.flags}


def a_family(rng, make_base, make_adapter):
    """(base, its tensors, an adapter of it with an intruder in each of three layers)."""
    tensors = weights(rng, *(f"layer.{i}.q.weight" for i in range(3)))
    factors = {}
    for i in range(3):
        B, A = rng.normal(size=(40, 1)), rng.normal(size=(1, 32))
        factors[f"layer.{i}.q"] = 4 * B / np.linalg.norm(B), A / np.linalg.norm(A)
    factors = {name: (B.astype("f4"), A.astype("f4")) for name, (B, A) in factors.items()}
    return make_base(tensors), tensors, make_adapter(factors)
