"""The decompositions by themselves, held to numpy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from spectra.errors import ConvergenceError
from spectra.svd import decompose, decompose_gram
from spectra.svd.decompose import eigh
from spectra.svd.spectrum import EPS32
from spectra.updates.algebra import DenseWeight
from tests.support import problems

METHODS = {
    "svd32": lambda W, side: decompose(torch.from_numpy(W).float(), side),
    "svd64": lambda W, side: decompose(torch.from_numpy(W), side),
    "gram": lambda W, side: decompose_gram(DenseWeight(torch.from_numpy(W).float(), torch.from_numpy(W).float()), side),
}


def check_spectrum(W, spectrum):
    """The one strict checker of a Spectrum: values, order, vectors, orthonormality, residuals."""
    eps = 2e-7 if spectrum.dtype == torch.float32 else 1e-13
    m, n = W.shape
    p = min(m, n)
    s = np.linalg.svd(W, compute_uv=False)
    scale = s[0]
    assert spectrum.shape == (m, n)
    assert spectrum.s.dtype == np.float64
    assert spectrum.s.shape == (p,)
    assert (np.diff(spectrum.s) <= 0).all()
    # The Gram matrix squares the values, so the smallest ones are known to √eps only.
    np.testing.assert_allclose(spectrum.s**2, s**2, atol=20 * np.sqrt(max(m, n)) * eps * scale**2)
    usable = spectrum.s > max(m, n) * EPS32 * scale
    X = spectrum.vectors.double().numpy()[:, usable]
    assert X.shape[0] == (m if spectrum.side == "left" else n)
    squared = spectrum.method == "gram" and usable.any()  # squaring the matrix squares its condition
    lost = 1e-14 * (scale / s[usable].min()) ** 2 if squared else 0.0
    np.testing.assert_allclose(X.T @ X, np.eye(X.shape[1]), atol=100 * eps + lost)
    other = W.T @ X if spectrum.side == "left" else W @ X
    np.testing.assert_allclose(np.linalg.norm(other, axis=0), s[usable], atol=20 * np.sqrt(max(m, n)) * eps * scale)
    image = (W @ other if spectrum.side == "left" else W.T @ other) - X * spectrum.s[usable] ** 2
    # ‖WWᵀu − σ²u‖ ≤ (σ₁ + σ)·residual: the residuals are what they claim to be.
    claimed = spectrum.residuals[usable]
    assert (np.linalg.norm(image, axis=0) <= 2 * scale * claimed + 50 * p * eps * scale**2).all()
    squaring = 1e-15 * scale**2 / s[usable] if squared else 0.0
    assert (claimed <= 100 * np.sqrt(max(m, n)) * eps * scale + squaring).all()
    assert spectrum.residual == pytest.approx(spectrum.residuals.max() / spectrum.s[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
@pytest.mark.parametrize("spectrum", problems.SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_decomposition(rng, method, spectrum, shape, side):
    W = problems.matrix(rng, spectrum, shape).astype(np.float32).astype(np.float64)
    check_spectrum(W, METHODS[method](W, side))


@pytest.mark.parametrize("method", METHODS)
def test_the_checker_rejects_wrong_vectors(rng, method):
    W = problems.trained_like(rng, 20, 20).astype(np.float32).astype(np.float64)
    spectrum = METHODS[method](W, "left")
    spectrum.vectors[:, 3] = spectrum.vectors[:, 4]
    with pytest.raises(AssertionError):
        check_spectrum(W, spectrum)


def test_a_driver_that_fails_is_replaced(rng, monkeypatch):
    W = problems.trained_like(rng, 30, 20)

    def fail(*args, **kwargs):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    spectrum = decompose(torch.from_numpy(W))
    assert spectrum.method == "gesvd"
    check_spectrum(W, spectrum)
    monkeypatch.setattr(scipy.linalg, "svd", fail)
    with pytest.raises(ConvergenceError, match=r"gesdd: no convergence; gesvd: no convergence"):
        decompose(torch.from_numpy(W))


def test_eigenvalues_that_divide_and_conquer_does_not_find(rng, monkeypatch):
    A = torch.from_numpy(rng.normal(size=(30, 30)))
    A = A + A.T
    expected = torch.linalg.eigvalsh(A)

    def fail(*args, **kwargs):
        raise np.linalg.LinAlgError("too many repeated eigenvalues")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = eigh(A)
    np.testing.assert_allclose(values, expected, atol=1e-12)
    np.testing.assert_allclose(vectors @ torch.diag(values) @ vectors.T, A, atol=1e-12)
    monkeypatch.setattr(scipy.linalg, "eigh", fail)
    with pytest.raises(ConvergenceError, match="evd: too many"):
        decompose_gram(DenseWeight(A, A))
