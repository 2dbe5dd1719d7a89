"""The base's spectra kept in memory from one audit of a training to the next."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spectra.files.orientation import as_matrix
from spectra.svd import KRYLOV_PAYS, Base, Question, short_spectrum

if TYPE_CHECKING:
    from spectra.files.checkpoint import Checkpoint
    from spectra.files.orientation import Layout
    from spectra.runs.cache import SpectrumCache
    from spectra.svd import Spectrum


@dataclass(eq=False)
class KeptSpectra:
    """Decomposes a base weight when its spectrum is first asked for, and has it ready from then on.

    Takes the place of a :class:`spectra.runs.cache.SpectrumCache` in an audit.  What the limit leaves no room for, and
    what is ``below`` no longer, has none, and is audited without.

    Attributes
    ----------
    question : what the audits ask.
    device : where decompositions are made; the spectra are kept in main memory.
    limit : bytes that the spectra may take; one of a weight with min(m, n) = p in float32 takes 4·p².
    below : only weights with min(m, n) below this are decomposed; None for all.
    disk : where spectra are looked for, and put instead of being kept in memory; from there they are mapped, not
        loaded.
    bytes : taken so far.
    seconds : that decompositions have taken so far.
    """

    question: Question
    device: str = "cpu"
    limit: float = 4e9
    below: int | None = KRYLOV_PAYS
    disk: SpectrumCache | None = None
    bytes: int = 0
    seconds: float = 0.0
    _kept: dict[tuple[str, Layout, torch.dtype], Spectrum] = field(default_factory=dict, repr=False)
    _on_disk: set[tuple[str, Layout, torch.dtype]] = field(default_factory=set, repr=False)

    def load(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype) -> Spectrum | None:
        """The spectrum of this tensor, or None where it has none here.

        Raises
        ------
        NonFiniteError, ConvergenceError, CheckpointError
        """
        key = (name, layout, dtype)
        if key in self._kept:
            return self._kept[key]
        if key in self._on_disk:
            assert self.disk is not None
            return self.disk.load(base, name, layout, dtype)
        return self._load_or_make(base, name, layout, dtype)

    def stale_for(self, base: Checkpoint) -> tuple[Path, ...]:
        """Folders with spectra of what lay at this base's path before it changed."""
        return self.disk.stale_for(base) if self.disk is not None else ()

    def clear(self) -> None:
        """Frees the memory."""
        self._kept.clear()
        self.bytes = 0

    def _load_or_make(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype) -> Spectrum | None:
        """A spectrum seen for the first time, from the disk or made."""
        W0 = as_matrix(base.load(base.weights[name]).to(device=self.device, dtype=dtype), layout)
        key, p = (name, layout, dtype), min(W0.shape)
        if self.disk is not None:
            spectrum = self.disk.load(base, name, layout, dtype)
            if spectrum is not None and Base(W0, stored=lambda: spectrum).has_stored:  # and not that of another base
                self._on_disk.add(key)
                return spectrum
        size = p * p * dtype.itemsize
        if (self.below is not None and p >= self.below) or (self.disk is None and self.bytes + size > self.limit):
            return None
        started = time.perf_counter()
        made = short_spectrum(W0)
        made = replace(made, vectors=made.vectors.cpu())
        if self.disk is not None:
            self.disk.store(base, name, layout, dtype, made)
            self._on_disk.add(key)
        else:
            self._kept[key] = made
            self.bytes += size
        self.seconds += time.perf_counter() - started
        return made
