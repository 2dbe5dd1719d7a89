"""Audits while a model is trained, in the Trainer of transformers or in any loop: watch intruders appear.

Only :class:`SpectraCallback` needs transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.records.history import Record
    from spectra.sources.saved import load_history
    from spectra.training.callback import SpectraCallback
    from spectra.training.monitor import Monitor

_HOMES = {
    "Monitor": "spectra.training.monitor",
    "Record": "spectra.records.history",
    "SpectraCallback": "spectra.training.callback",
    "load_history": "spectra.sources.saved",
}

__all__ = ["Monitor", "Record", "SpectraCallback", "load_history"]


def __getattr__(name: str) -> Any:
    """Loads a public name, and torch or transformers with it, when it is first used."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spectra.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
