"""How many intruder dimensions a random update of the same size and spectrum makes: the null model of a count.

W0 + R with R = E·diag(σ)·Fᵀ, where σ are the singular values of dW and E (m × r), F (n × r) are Haar-random
orthonormal.  Their distribution does not change with a rotation, so W0 may be taken as diag(s): only singular
values are needed.  On the short side, p = min(m, n) long, with F's first p rows F₁ and B = E·diag(σ),

    W1·W1ᵀ = diag(s²) + S·F₁·Bᵀ + B·F₁ᵀ·S + B·Bᵀ        S = diag(s)

has as eigenvectors P the cosines of W1's vectors with W0's; on the long side these are (S·P + F₁·Bᵀ·P)/σ_j
(see ``spectra.svd.cached``, whose solver serves here).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectra.svd import Question, Spectrum, clusters, match_vectors, numerical_rank
from spectra.svd.decompose import eigh
from spectra.svd.secular import DiagonalPlusLowRank

EXTRA = 2  # eigenvalues beyond the top k, which say whether a tie crosses it
TOLERANCE = 1e-11  # residual of an eigenpair of W1·W1ᵀ, relative to the largest: enough down to σ_k of 1e-3 σ₁
SMALL = 192  # below, a dense eigenproblem is as fast as the low-rank one (measured, r = 4)
LARGEST_SHARE = 4  # of p that 2r may be for the low-rank solver to pay


def null_counts(
    base_values: np.ndarray,
    shape: tuple[int, int],
    update_values: np.ndarray,
    question: Question,
    *,
    draws: int,
    seed: int,
) -> np.ndarray:
    """The numbers of intruder dimensions of ``draws`` random updates.

    Parameters
    ----------
    base_values : (p,) all singular values of W0, descending, p = min(m, n).
    shape : (m, n).
    update_values : (r,) the singular values of dW, r ≤ p, in the same units.
    question : how many leading vectors of which side, and epsilon.
    draws : how many random updates.
    seed : of their directions; the first draws of a longer run are those of a shorter one.

    Returns
    -------
    (draws,) int, by the rule of :func:`spectra.svd.match_vectors`: values equal up to rounding are one
    subspace, the null space is no vector, a tie across k counts whole.

    A draw costs the order of p·(r + k)² operations for small r; else, and for p < 192, an eigenproblem of p × p,
    and of r ≈ p two QR factorisations besides.

    Raises
    ------
    ConvergenceError
    """
    largest = max(base_values.max(initial=0.0), update_values.max(initial=0.0))
    sigma = update_values[update_values > np.finfo(np.float64).eps * largest]
    if not sigma.size:
        return np.zeros(draws, dtype=np.int64)
    model = _RandomUpdates(base_values / largest, shape, sigma / largest, question)
    rng = np.random.default_rng(seed)
    return np.array([model.count(rng) for _ in range(draws)], dtype=np.int64)


def by_low_rank(p: int, r: int) -> bool:
    """Whether the low-rank solver pays for random updates of rank r, rather than an eigenproblem of p × p."""
    return p >= SMALL and 2 * LARGEST_SHARE * r <= p


def p_value(observed: int, counts: np.ndarray) -> float:
    """(1 + #{count ≥ observed})/(1 + draws): how rarely a random update has as many intruders.

    The observed update counts as one of the draws, so that the value is never 0 and the test is valid at any
    number of draws (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39).
    """
    return (1 + int(np.count_nonzero(counts >= observed))) / (1 + counts.size)


class _RandomUpdates:
    """W0 in the basis of its own singular vectors, to which random updates are added one by one."""

    def __init__(self, s: np.ndarray, shape: tuple[int, int], sigma: np.ndarray, question: Question):
        self.s, self.shape, self.question = s, shape, question
        self.p, self.q = min(shape), max(shape)
        self.S, self.sigma = torch.from_numpy(s.copy()), torch.from_numpy(sigma.copy())
        short = "left" if shape[0] < shape[1] else "right"
        self.is_aligned = question.side == short or self.p == self.q
        self.wanted = min(self.p, question.top_k + EXTRA)
        starts = clusters(s)
        self.groups = starts[: np.searchsorted(starts, numerical_rank(s, shape)) + 1]  # and where the last one ends

    def count(self, rng: np.random.Generator) -> int:
        r = self.sigma.numel()
        B = haar(rng, self.p, r) * self.sigma
        F = haar(rng, self.q, r)[: self.p]
        values, P = self._leading(B, F, self.wanted)
        starts = clusters(values)
        k = min(self.question.top_k, self.p)
        if values.size < self.p and starts[np.searchsorted(starts, k)] == values.size:  # a tie of unknown width
            values, P = self._leading(B, F, self.p)
            starts = clusters(values)
        cosines = P if self.is_aligned else self._turned(P, B, F, values)
        if not np.array_equal(starts[: k + 1], np.arange(k + 1)):
            return self._count_with_ties(values, cosines)
        compared = min(k, numerical_rank(values, self.shape))
        if self.groups.size < 2:  # nothing to resemble
            return compared
        squares = cosines[: self.groups[-1], :compared].numpy() ** 2
        masses = np.add.reduceat(squares, self.groups[:-1], axis=0)
        return int(np.count_nonzero(np.sqrt(masses.max(axis=0)) < self.question.epsilon))

    def _leading(self, B: Tensor, F: Tensor, wanted: int) -> tuple[np.ndarray, Tensor]:
        """The ``wanted`` largest singular values of W1, and their vectors of the short side."""
        r = B.shape[1]
        SF = self.S[:, None] * F
        eigenpairs = None
        if wanted < self.p and by_low_rank(self.p, r):
            eye = torch.eye(r, dtype=torch.float64)
            middle = torch.cat([torch.cat([eye, eye], 1), torch.cat([eye, torch.zeros_like(eye)], 1)])
            eigenpairs = DiagonalPlusLowRank(self.S**2, torch.cat([B, SF], 1), middle).leading(wanted, TOLERANCE)
        if eigenpairs is not None:
            theta, P, _ = eigenpairs
        else:
            H = (SF + B / 2) @ B.T
            H += H.T.clone()
            H.diagonal().add_(self.S**2)
            theta, P = eigh(H)
            theta, P = theta[-wanted:].flip(0), P[:, -wanted:].flip(1)
        return theta.clamp_min(0).sqrt().numpy(), P

    def _turned(self, P: Tensor, B: Tensor, F: Tensor, values: np.ndarray) -> Tensor:
        """The cosines on the long side; zero for W1's null space."""
        inner = self.S[:, None] * P + F @ (B.T @ P)
        sigma = torch.from_numpy(values)
        return torch.where(sigma > 0, inner / sigma.clamp_min(np.finfo(np.float64).tiny), 0.0)

    def _count_with_ties(self, values: np.ndarray, cosines: Tensor) -> int:
        """Tied vectors of W1 are turned to resemble W0 as much as they can."""
        base, tuned = (self._spectrum(s) for s in (self.s, values))
        matches = match_vectors(base, tuned, self.question.top_k, cosines.numpy())
        epsilon = self.question.epsilon
        return sum(match.max_cosine is not None and match.max_cosine < epsilon for match in matches)

    def _spectrum(self, s: np.ndarray) -> Spectrum:
        """Values without error; the vectors themselves are nowhere needed."""
        vectors = torch.empty(0, s.size, dtype=torch.float64)
        return Spectrum(s, vectors, self.question.side, np.zeros(s.size), 0.0, self.shape, "random")


def haar(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Uniformly random orthonormal columns; without the signs of R, QR is not uniform (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.from_numpy(rng.standard_normal((rows, columns))))
    turned: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return turned
