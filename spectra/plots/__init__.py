"""Figures for papers and notebooks: pure functions of the records, drawn with matplotlib.

Each function returns a :class:`matplotlib.figure.Figure` that belongs to no pyplot state, at the width of
one column of a paper (3.4 in) or two (7 in).  Save it with :meth:`~matplotlib.figure.Figure.savefig`, with
:func:`save`, or take its bytes from :func:`render`.  Colours are those of Okabe & Ito, which the colour-blind
can tell apart, and markers, line styles and hatches say the same in black and white.

``kinds.KINDS`` lists the figures of records without loading matplotlib, :func:`repair_tradeoff` draws what
:func:`spectra.repairs.sweep.sweep` measured and :func:`training_history` what a
:class:`spectra.training.Monitor` saw; drawing one raises UsageError where it is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra.plots.kinds import KINDS, Kind

if TYPE_CHECKING:
    from spectra.plots.counts import counts_by_layer, layer_index_counts
    from spectra.plots.curves import epsilon_sweep, top_k_sweep, weight_curve
    from spectra.plots.fine_tunes import counts_by_rank, overlap_matrix, size_and_intruders, trajectory
    from spectra.plots.layers import cosine_profile, similarity_matrix, spectra
    from spectra.plots.style import FORMATS, file_format, render, save
    from spectra.plots.tradeoff import repair_tradeoff
    from spectra.plots.watched import training_history

_HOMES = {
    "FORMATS": "style",
    "file_format": "style",
    "render": "style",
    "save": "style",
    "repair_tradeoff": "tradeoff",
    "training_history": "watched",
    **{kind.function: kind.module for kind in KINDS.values()},
}

__all__ = [
    "FORMATS",
    "KINDS",
    "Kind",
    "cosine_profile",
    "counts_by_layer",
    "counts_by_rank",
    "epsilon_sweep",
    "file_format",
    "layer_index_counts",
    "overlap_matrix",
    "render",
    "repair_tradeoff",
    "save",
    "similarity_matrix",
    "size_and_intruders",
    "spectra",
    "top_k_sweep",
    "training_history",
    "trajectory",
    "weight_curve",
]


def __getattr__(name: str) -> Any:
    """Loads a figure's function, and matplotlib with it, when it is first used."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"spectra.plots.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spectra.plots' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
