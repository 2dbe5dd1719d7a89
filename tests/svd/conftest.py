"""Fixtures of engines: small matrices tried by what is meant for large ones."""

from __future__ import annotations

import pytest

from spectra.svd import krylov, lanczos


@pytest.fixture
def small_scale(monkeypatch):
    """Lets the engine try itself on matrices far below the size from which it pays."""
    monkeypatch.setattr(krylov, "FIRST_STEPS", 2)
    monkeypatch.setattr(krylov, "LARGEST_SHARE", 1.0)
    monkeypatch.setattr(lanczos, "FIRST_STEPS", 2)
    monkeypatch.setattr(lanczos, "LARGEST_SHARE", 1.0)
