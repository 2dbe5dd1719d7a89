"""Spectra: what did this fine-tune do to the spectrum of the weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectra.analysis import Findings, find_intruders
    from spectra.audits import audit, audit_many
    from spectra.checking import verify_mitigation
    from spectra.comparing import compare, layer_spectra
    from spectra.comparison import Comparison
    from spectra.errors import SpectraError
    from spectra.live import Source, checkpoint_of
    from spectra.mitigating import mitigate
    from spectra.mitigation import Mitigation, Verification
    from spectra.page import to_html
    from spectra.precompute import CachedBase, cache_base
    from spectra.ranking import Extraction, extract_adapter, suggest_ranks
    from spectra.ranks import RankReport
    from spectra.records import LayerSpectra
    from spectra.render.records import to_text
    from spectra.report import Report
    from spectra.similarity import similarity_matrices
    from spectra.tradeoff import mitigation_sweep

_HOMES = {
    "CachedBase": "spectra.precompute",
    "Comparison": "spectra.comparison",
    "Extraction": "spectra.ranking",
    "Findings": "spectra.analysis",
    "LayerSpectra": "spectra.records",
    "Mitigation": "spectra.mitigation",
    "RankReport": "spectra.ranks",
    "Report": "spectra.report",
    "Source": "spectra.live",
    "SpectraError": "spectra.errors",
    "Verification": "spectra.mitigation",
    "audit": "spectra.audits",
    "audit_many": "spectra.audits",
    "cache_base": "spectra.precompute",
    "checkpoint_of": "spectra.live",
    "compare": "spectra.comparing",
    "extract_adapter": "spectra.ranking",
    "find_intruders": "spectra.analysis",
    "layer_spectra": "spectra.comparing",
    "mitigate": "spectra.mitigating",
    "mitigation_sweep": "spectra.tradeoff",
    "similarity_matrices": "spectra.similarity",
    "suggest_ranks": "spectra.ranking",
    "to_html": "spectra.page",
    "to_text": "spectra.render.records",
    "verify_mitigation": "spectra.checking",
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
