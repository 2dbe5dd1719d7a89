"""Dialects: how each kind of writer names and stores its updates.

To add one: a file here with a class that follows :class:`~spectra.adapters.plan.Dialect`, and a
line in ``DIALECTS``.  The tests over the registry then run on it by themselves.
"""

from __future__ import annotations

from spectra.adapters.diffusers import DiffusersLora
from spectra.adapters.factors import StoredFactors, against_base
from spectra.adapters.full import FullCheckpoint
from spectra.adapters.kohya import KohyaLora
from spectra.adapters.method import MethodUpdate
from spectra.adapters.methods import PeftMethods
from spectra.adapters.mlx import MlxAdapter
from spectra.adapters.peft import PeftAdapter
from spectra.adapters.plan import Dialect, Plan, PlannedUpdate, Skipped
from spectra.adapters.unsupported import Unsupported
from spectra.checkpoint import Checkpoint

# The first that recognises a checkpoint reads it; FullCheckpoint takes what nobody else does.
DIALECTS: tuple[Dialect, ...] = (
    MlxAdapter(), PeftMethods(), PeftAdapter(), KohyaLora(), DiffusersLora(), Unsupported(), FullCheckpoint(),
)  # fmt: skip

__all__ = [
    "DIALECTS", "Dialect", "MethodUpdate", "Plan", "PlannedUpdate", "Skipped", "StoredFactors", "against_base",
    "plan_updates",
]  # fmt: skip


def plan_updates(tuned: Checkpoint) -> Plan:
    """What a fine-tuned checkpoint changes, from its headers and config.

    Raises
    ------
    AdapterError : the adapter contradicts itself.
    UnsupportedMethodError : a method or an option that this version cannot read; it is named.
    """
    for dialect in DIALECTS:
        if dialect.recognises(tuned):
            return dialect.plan(tuned)
    raise AssertionError("FullCheckpoint recognises everything without an adapter config")
