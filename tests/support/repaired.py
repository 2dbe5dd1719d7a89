"""Repaired weights as read from disk, against others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers
from tests.support.paths import FIXTURES

peft = pytest.importorskip("peft")

BASE = FIXTURES / "base"


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tuned_weights(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """Base tensor's name → W1 in float64, as read from disk."""
    one, other = open_checkpoint(base, as_base=True), open_checkpoint(tuned)
    found = {}
    for pair in pair_layers(one, other, plan_updates(other)).pairs:
        W0 = pair.read_base(one, torch.float64, "cpu")
        found[pair.base.name] = pair.read_update(other, torch.float64, "cpu").tuned(W0).dense().numpy()
    return found


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def merged(net, adapter):
    """The state of a fresh net with an adapter merged in by peft, in float64."""
    return peft.PeftModel.from_pretrained(net, adapter).double().merge_and_unload().state_dict()


def edit_record(folder, change):
    path = folder / "spectra-repair.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
