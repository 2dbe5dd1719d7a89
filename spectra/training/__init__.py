"""Intruder dimensions watched while they come about: in the Trainer of transformers, or in a loop of one's own.

Only :class:`SpectraCallback` needs transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra.training.monitor import Monitor
from spectra.training.records import Record, load_history

if TYPE_CHECKING:
    from spectra.training.callback import SpectraCallback

__all__ = ["Monitor", "Record", "SpectraCallback", "load_history"]


def __getattr__(name: str) -> Any:
    """Loads the callback, and transformers with it, when it is first used."""
    if name == "SpectraCallback":
        from spectra.training.callback import SpectraCallback

        return SpectraCallback
    raise AttributeError(f"module 'spectra.training' has no attribute {name!r}")
