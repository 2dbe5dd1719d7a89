"""Spectra: what did this fine-tune do to the spectrum of the weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectra import plots as plots
    from spectra import training as training
    from spectra.analysis.layer import Findings, find_intruders
    from spectra.errors import SpectraError
    from spectra.page import to_html
    from spectra.plots.kinds import figure_of
    from spectra.records.comparison import Comparison
    from spectra.records.inspection import Inspection
    from spectra.records.layer import LayerSpectra
    from spectra.records.ranks import RankReport
    from spectra.records.repair import Repair, Verification
    from spectra.records.report import Report
    from spectra.render.card import to_model_card
    from spectra.render.notebook import to_table_html
    from spectra.render.records import to_text
    from spectra.render.sarif import to_sarif
    from spectra.repairs.repair import repair
    from spectra.repairs.sweep import sweep
    from spectra.repairs.verify import verify
    from spectra.sources.live import Source, checkpoint_of
    from spectra.sources.saved import load
    from spectra.tasks.audit import audit, audit_many
    from spectra.tasks.cache import CachedBase, cache
    from spectra.tasks.compare import compare, layer_spectra
    from spectra.tasks.extract import Extraction, extract
    from spectra.tasks.inspect import inspect
    from spectra.tasks.layers import Update, iter_layers
    from spectra.tasks.plot import plot
    from spectra.tasks.ranks import ranks
    from spectra.tasks.similarity import similarity_matrices

# Where each public name lives; it is loaded when it is first used.
_HOMES = {
    "CachedBase": "spectra.tasks.cache",
    "Comparison": "spectra.records.comparison",
    "Extraction": "spectra.tasks.extract",
    "Findings": "spectra.analysis.layer",
    "Inspection": "spectra.records.inspection",
    "LayerSpectra": "spectra.records.layer",
    "RankReport": "spectra.records.ranks",
    "Repair": "spectra.records.repair",
    "Report": "spectra.records.report",
    "Source": "spectra.sources.live",
    "SpectraError": "spectra.errors",
    "Update": "spectra.tasks.layers",
    "Verification": "spectra.records.repair",
    "audit": "spectra.tasks.audit",
    "audit_many": "spectra.tasks.audit",
    "cache": "spectra.tasks.cache",
    "checkpoint_of": "spectra.sources.live",
    "compare": "spectra.tasks.compare",
    "extract": "spectra.tasks.extract",
    "figure_of": "spectra.plots.kinds",
    "find_intruders": "spectra.analysis.layer",
    "inspect": "spectra.tasks.inspect",
    "iter_layers": "spectra.tasks.layers",
    "layer_spectra": "spectra.tasks.compare",
    "load": "spectra.sources.saved",
    "plot": "spectra.tasks.plot",
    "ranks": "spectra.tasks.ranks",
    "repair": "spectra.repairs.repair",
    "similarity_matrices": "spectra.tasks.similarity",
    "sweep": "spectra.repairs.sweep",
    "to_html": "spectra.page",
    "to_model_card": "spectra.render.card",
    "to_sarif": "spectra.render.sarif",
    "to_table_html": "spectra.render.notebook",
    "to_text": "spectra.render.records",
    "verify": "spectra.repairs.verify",
}
_FOLDERS = ("plots", "training")  # public as they are

__all__ = [
    "CachedBase",
    "Comparison",
    "Extraction",
    "Findings",
    "Inspection",
    "LayerSpectra",
    "RankReport",
    "Repair",
    "Report",
    "Source",
    "SpectraError",
    "Update",
    "Verification",
    "__version__",
    "audit",
    "audit_many",
    "cache",
    "checkpoint_of",
    "compare",
    "extract",
    "figure_of",
    "find_intruders",
    "inspect",
    "iter_layers",
    "layer_spectra",
    "load",
    "plot",
    "plots",
    "ranks",
    "repair",
    "similarity_matrices",
    "sweep",
    "to_html",
    "to_model_card",
    "to_sarif",
    "to_table_html",
    "to_text",
    "training",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that ``import spectra`` costs nothing."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _FOLDERS:
        return import_module(f"spectra.{name}")
    raise AttributeError(f"module 'spectra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
