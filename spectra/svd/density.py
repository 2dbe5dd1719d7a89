"""All singular values of a weight, as far as a block Lanczos process tells: stochastic Lanczos quadrature.

The start block has random columns, so that the squares of a Ritz vector's coordinates in them say how many singular
values it stands for (Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38:1075).  The leading Ritz values are taken
as they are; the others give the distribution of the rest, whose norm is then made to fit.

An estimate, and no part of any verdict: the predicted threshold from it was 0.995 to 1.003 times the one from all
singular values, and random updates had as many intruders to within their spread (``python -m benchmarks nulls``).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

LEADING = 20  # Ritz values that stand for one singular value each
LEAST = 8  # further ones, below which nothing is said of the rest


def estimated_values(theta: Tensor, weights: Tensor, p: int, size: float) -> np.ndarray | None:
    """(p,) singular values, descending, or None where the process was too short to tell.

    Parameters
    ----------
    theta : (d,) the Ritz values of W·Wᵀ, in descending order, d < p.
    weights : (d,) the part of the random start columns along each Ritz vector: squares, in any unit.
    p : how many singular values there are.
    size : ‖W‖_F, which theirs is made to be.
    """
    lead = min(LEADING, p)
    if theta.numel() < lead + LEAST or p < 2 * lead:
        return None
    s = theta.clamp_min(0).sqrt().cpu().numpy()
    share = weights.cpu().numpy()[lead:]
    if not share.sum() > 0:
        return None
    counts = np.cumsum(share) * ((p - lead) / share.sum())
    middle = counts - share * ((p - lead) / share.sum()) / 2
    rest = np.interp(np.arange(p - lead) + 0.5, middle, s[lead:])
    missing = size**2 - float((s[:lead] ** 2).sum())
    if missing > 0 and rest.any():
        rest = np.minimum(rest * np.sqrt(missing / float((rest**2).sum())), s[lead - 1])
    return np.concatenate([s[:lead], rest])
