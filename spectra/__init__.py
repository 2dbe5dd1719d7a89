"""Spectra: what did this fine-tune do to the spectrum of the weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectra.analysis.layer import Findings, find_intruders
    from spectra.errors import SpectraError
    from spectra.page import to_html
    from spectra.records.comparison import Comparison
    from spectra.records.layer import LayerSpectra
    from spectra.records.ranks import RankReport
    from spectra.records.repair import Mitigation, Verification
    from spectra.records.report import Report
    from spectra.render.records import to_text
    from spectra.repairs.repair import mitigate
    from spectra.repairs.sweep import mitigation_sweep
    from spectra.repairs.verify import verify_mitigation
    from spectra.sources.live import Source, checkpoint_of
    from spectra.tasks.audit import audit, audit_many
    from spectra.tasks.cache import CachedBase, cache_base
    from spectra.tasks.compare import compare, layer_spectra
    from spectra.tasks.extract import Extraction, extract_adapter
    from spectra.tasks.ranks import suggest_ranks
    from spectra.tasks.similarity import similarity_matrices

_HOMES = {
    "CachedBase": "spectra.tasks.cache",
    "Comparison": "spectra.records.comparison",
    "Extraction": "spectra.tasks.extract",
    "Findings": "spectra.analysis.layer",
    "LayerSpectra": "spectra.records.layer",
    "Mitigation": "spectra.records.repair",
    "RankReport": "spectra.records.ranks",
    "Report": "spectra.records.report",
    "Source": "spectra.sources.live",
    "SpectraError": "spectra.errors",
    "Verification": "spectra.records.repair",
    "audit": "spectra.tasks.audit",
    "audit_many": "spectra.tasks.audit",
    "cache_base": "spectra.tasks.cache",
    "checkpoint_of": "spectra.sources.live",
    "compare": "spectra.tasks.compare",
    "extract_adapter": "spectra.tasks.extract",
    "find_intruders": "spectra.analysis.layer",
    "layer_spectra": "spectra.tasks.compare",
    "mitigate": "spectra.repairs.repair",
    "mitigation_sweep": "spectra.repairs.sweep",
    "similarity_matrices": "spectra.tasks.similarity",
    "suggest_ranks": "spectra.tasks.ranks",
    "to_html": "spectra.page",
    "to_text": "spectra.render.records",
    "verify_mitigation": "spectra.repairs.verify",
}

__all__ = [
    "CachedBase",
    "Comparison",
    "Extraction",
    "Findings",
    "LayerSpectra",
    "Mitigation",
    "RankReport",
    "Report",
    "Source",
    "SpectraError",
    "Verification",
    "__version__",
    "audit",
    "audit_many",
    "cache_base",
    "checkpoint_of",
    "compare",
    "extract_adapter",
    "find_intruders",
    "layer_spectra",
    "mitigate",
    "mitigation_sweep",
    "similarity_matrices",
    "suggest_ranks",
    "to_html",
    "to_text",
    "verify_mitigation",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that ``import spectra`` costs nothing."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spectra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
