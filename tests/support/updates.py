"""Updates of a weight of every form, with the tuned weight that each means."""

from __future__ import annotations

import numpy as np
import torch

from spectra.updates.algebra import ALL, Dense, LowRank, RowScaled


def updates(rng, W0, kind):
    """An update of W0 (float32) and the tuned weight it means, in float64."""
    m, n = W0.shape
    r = min(3, m, n)
    B, A = rng.normal(size=(m, r)), rng.normal(size=(r, n))
    scale = 0.7 * float(np.linalg.norm(W0, 2)) / float(np.linalg.norm(B @ A, 2))
    tensors = torch.from_numpy(B), torch.from_numpy(A)
    W0 = W0.astype(np.float64)
    if kind == "low rank":
        return LowRank(*tensors, scale), W0 + scale * B @ A
    if kind == "row scaled":
        magnitude = rng.uniform(0.5, 2, size=m)
        merged = W0 + scale * B @ A
        norms = np.linalg.norm(merged, axis=1)
        left = np.divide(magnitude, norms, out=np.ones(m), where=norms > 0)
        return RowScaled(*tensors, scale, torch.from_numpy(magnitude)), left[:, None] * merged
    W1 = (W0 + 0.3 * np.linalg.norm(W0, 2) * rng.normal(size=(m, n)) / np.sqrt(m)).astype(np.float32)
    return Dense(torch.from_numpy(W1)), W1.astype(np.float64)


def exact(weight):
    return weight.block(ALL, ALL).numpy()


def an_update(rng, kind: str, W0: torch.Tensor, r: int = 3, scaling: float = 2.0):
    m, n = W0.shape
    B, A = rng.normal(size=(m, r)) / np.sqrt(m), rng.normal(size=(r, n)) / np.sqrt(n)
    B, A = (torch.from_numpy(part).float() for part in (B, A))
    if kind == "dense":
        return Dense(W0 + (scaling * B @ A).to(W0.dtype))
    if kind == "dora":
        return RowScaled(B, A, scaling, torch.from_numpy(rng.uniform(0.5, 1.5, m)).float() * W0.norm(dim=1))
    return LowRank(B, A, scaling)
