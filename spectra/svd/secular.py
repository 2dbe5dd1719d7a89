"""The leading eigenpairs of a diagonal plus a low-rank matrix, and the proof that none was missed.

H = diag(d) + L·M·Lᵀ with L (p, q), q small.  Block Davidson: the search space starts with the
leading unit vectors and the range of L, and grows by (diag(d) − θ)⁻¹ times the residuals; since every
eigenvector is (diag(d) − θ)⁻¹·L·g for some g, a few steps suffice.  Completeness is Sylvester's law
of inertia on the bordered matrix [[diag(d) − τ, L], [Lᵀ, −M⁻¹]].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.errors import ConvergenceError
from spectra.svd.decompose import eigh, leading_eigenpairs
from spectra.svd.threads import using_threads

EXTRA = 24  # leading unit vectors beyond the ones asked for
MAX_STEPS = 40
LEAST = 1e-9  # of a direction that is new
SINGULAR = 1e-9  # |d − θ| below this, relative to θ₁, is not divided by


@dataclass(frozen=True, eq=False)
class DiagonalPlusLowRank:
    """H = diag(d) + L·M·Lᵀ: d (p,), L (p, q), M (q, q) symmetric; float64."""

    d: Tensor
    L: Tensor
    M: Tensor

    def matmul(self, X: Tensor) -> Tensor:
        return self.d[:, None] * X + self.L @ (self.M @ (self.L.T @ X))

    def leading(self, k: int, tolerance: float, more: int = 0) -> tuple[Tensor, Tensor, Tensor] | None:
        """(θ, Y, residuals): the ``k`` largest eigenpairs, or None where they do not converge.

        θ (k,) descends, Y (p, k) is orthonormal, residuals (k,) are ‖H·y − θ·y‖ ≤ tolerance·θ₁.  Of ``more``
        approximate pairs that follow nothing is promised.
        """
        with using_threads(1):
            return self._leading(k, tolerance, k + more)

    def _leading(self, k: int, tolerance: float, taken: int) -> tuple[Tensor, Tensor, Tensor] | None:
        # The search space is [I, 0; 0, Q]: the leading unit vectors, and a basis of the other coordinates.
        p = self.d.numel()
        start = min(p, taken + EXTRA)
        d, L = self.d[start:, None], self.L[start:]
        Q = _added(L.new_empty(L.shape[0], 0), L)
        if start + Q.shape[1] < taken:
            return None
        inner = Q.T @ (d * Q)
        G = torch.cat([self.L[:start].T, L.T @ Q], 1)
        for _ in range(MAX_STEPS):
            projected = G.T @ (self.M @ G)
            projected[:start, :start].diagonal().add_(self.d[:start])
            projected[start:, start:] += inner
            values, C = leading_eigenpairs((projected + projected.T) / 2)
            values, C = values[:taken], C[:, :taken]
            below = Q @ C[start:]
            R = (d - values) * below + L @ (self.M @ (G @ C))  # of the leading coordinates nothing is left
            residuals = R.norm(dim=0)
            largest = float(values[0])
            if not largest > 0:
                return None
            open_ones = residuals > tolerance * largest
            open_ones[k:] = False
            if not bool(open_ones.any()):
                return values, torch.cat([C[:start], below]), residuals
            if Q.shape[1] >= p // 2:
                return None
            shift = d - values[open_ones]
            least = SINGULAR * largest
            added = _added(Q, R[:, open_ones] / torch.where(shift.abs() < least, least, shift))
            if not added.shape[1]:
                return None
            image = d * added
            border = Q.T @ image
            inner = torch.cat([torch.cat([inner, border], 1), torch.cat([border.T, added.T @ image], 1)])
            G = torch.cat([G, L.T @ added], 1)
            Q = torch.cat([Q, added], 1)
        return None

    def count_above(self, tau: float) -> int:
        """How many eigenvalues exceed ``tau``, which is no entry of d; M must be [[K, I], [I, 0]], as it is for
        W·Wᵀ + F·Eᵀ + E·Fᵀ + E·K·Eᵀ: its inverse is [[0, I], [I, −K]], with as many positive as negative eigenvalues.
        −1 where the count fails, as it may for ``tau`` next to many equal entries of d.
        """
        r = self.M.shape[0] // 2
        inverse = torch.zeros_like(self.M)
        inverse[:r, r:], inverse[r:, :r], inverse[r:, r:] = self.M[:r, r:], self.M[r:, :r], -self.M[:r, :r]
        shift = self.d - tau
        schur = -inverse - self.L.T @ (self.L / shift[:, None])
        try:
            values, _ = eigh((schur + schur.T) / 2)
        except ConvergenceError:
            return -1
        return int((shift > 0).sum()) + int((values > 0).sum()) - r


def _added(Z: Tensor, X: Tensor) -> Tensor:
    """An orthonormal basis of what X adds to the span of Z, without directions that are rounding."""
    size = X.norm(dim=0)
    X = X[:, size > 0] / size[size > 0]
    X = X - Z @ (Z.T @ X)
    length = X.norm(dim=0)
    X = X[:, length > LEAST] / length[length > LEAST]
    if not X.shape[1]:
        return X
    Q, R = torch.linalg.qr(X)
    Q = Q[:, R.diagonal().abs() > LEAST]
    Q = Q - Z @ (Z.T @ Q)  # what is left of Z is 1e-16 over the least length
    orthonormal: Tensor = torch.linalg.qr(Q).Q
    return orthonormal
