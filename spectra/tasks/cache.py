"""Decomposing a base once, for the cache: which weights, how much room, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from spectra.adapters import Skipped
from spectra.adapters.full import FullCheckpoint
from spectra.errors import LAYER_ERRORS, CheckpointError, UsageError, in_short
from spectra.files.checkpoint import Checkpoint
from spectra.pairing.pairs import LayerPair, pair_layers
from spectra.runs.cache import SpectrumCache
from spectra.runs.neighbours import let_others_work
from spectra.runs.options import CacheOptions, patterns_of, takes_options
from spectra.runs.progress import shown
from spectra.sources.live import Source
from spectra.sources.resolve import Access, open_base

if TYPE_CHECKING:
    import torch

    from spectra.svd import Spectrum

BYTES = {"float32": 4, "float64": 8}
EIGENVECTORS = 10  # p³, in products' time: m·n·p + 10·p³ fits short_spectrum within 1.6 from 512 to 2048 (measured)


@dataclass(frozen=True)
class PlannedLayer:
    """A base weight whose spectrum is to be kept: ``shape`` as analysed, ``bytes`` of its numbers on disk."""

    pair: LayerPair
    dtype: str

    @property
    def name(self) -> str:
        return self.pair.base_key[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.pair.shape

    @property
    def bytes(self) -> int:
        p = min(self.shape)
        return p * p * BYTES[self.dtype] + 2 * 8 * p


@dataclass(frozen=True)
class CachedBase:
    """What :func:`cache` did, or on a dry run would do.

    Attributes
    ----------
    base, folder : the base's path, and where its spectra are.
    layers : every layer to be kept.
    there : those of them that were there already.  On a dry run, as far as their files say; else
        checked against the weights.
    written : those that were computed; none on a dry run.
    failed : tensors that could not be decomposed, with what is wrong.
    skipped : tensors that have no spectrum or were left out, with the reason.
    stale : folders with spectra of what the base was before it changed, no longer used.
    """

    base: Path
    folder: Path
    layers: tuple[PlannedLayer, ...]
    there: tuple[PlannedLayer, ...]
    written: tuple[PlannedLayer, ...]
    failed: tuple[Skipped, ...]
    skipped: tuple[Skipped, ...]
    stale: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Of all layers on disk, but for about a kilobyte of header each."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def stale_bytes(self) -> int:
        return sum(file.stat().st_size for folder in self.stale for file in folder.glob("*.safetensors"))


def plan_cache(
    base: Checkpoint, include: Sequence[str], exclude: Sequence[str], dtype: str
) -> tuple[list[PlannedLayer], tuple[Skipped, ...]]:
    """Which base weights audits would decompose, from headers alone; and what they would not.

    The base is matched with itself as a full fine-tune is, so that orientations are those of audits.
    """
    pairing = pair_layers(base, base, FullCheckpoint().plan(base), include=include, exclude=exclude)
    layers = {pair.base_key: PlannedLayer(pair, "float64" if pair.float64 else dtype) for pair in pairing.pairs}
    return list(layers.values()), pairing.skipped


@takes_options(CacheOptions)
def cache(
    base: Source, *, cache: str | Path | None = None, dry_run: bool = False, **options: Unpack[CacheOptions]
) -> CachedBase:
    """Decomposes the weights of a base once and keeps their spectra for later audits.

    Layers that are there already are checked against the weights and kept, so an interrupted run continues where it
    ended.

    Parameters
    ----------
    base : a checkpoint, the name of a model on the hub, or a model in memory, of which all of the same form share a
        place.
    cache : the folder to keep them in; by default the one that audits look into.
    dry_run : plan from headers, write nothing.
    {options}

    Raises
    ------
    SpectraError : bad options, unreadable files, too little room on the disk.  A weight that cannot be decomposed
        raises nothing; it is in ``failed``.
    """
    dtype, threads = options["dtype"], options["threads"]
    if dtype not in BYTES:
        raise UsageError(f"dtype = {dtype!r}; expected float32 or float64")
    if threads is not None and threads < 1:
        raise UsageError("threads are at least 1")
    include, exclude = (patterns_of(name, options[name]) for name in ("include", "exclude"))
    opened = open_base(base, Access(options["allow_pickle"], options["local_files_only"]))
    layers, skipped = plan_cache(opened, include, exclude, dtype)
    if not layers:
        reasons = sorted({item.reason for item in skipped})
        raise UsageError(f"{opened.path}: nothing to decompose ({'; '.join(reasons[:3]) or 'no tensors'})")

    import torch

    from spectra.analysis.layer import check_device
    from spectra.svd.threads import using_threads

    check_device(options["device"])
    kept = SpectrumCache(cache)
    decomposer = _Decomposer(opened, kept, options["device"])
    there = {layer.name for layer in layers if decomposer.stored(layer) is not None}
    written: set[str] = set()
    failed: list[Skipped] = []
    _check_room(kept.folder(opened), sum(layer.bytes for layer in layers if layer.name not in there))
    if not dry_run:
        kept.clean(opened)
        kept.remember(opened)
        efforts = [_effort(layer, known=layer.name in there) for layer in layers]
        done = 0.0
        let_others_work()
        with shown(options["progress"]) as progress, using_threads(threads or torch.get_num_threads()):
            for layer, effort in zip(layers, efforts, strict=True):
                try:
                    spectrum = decomposer.compute(layer)
                except LAYER_ERRORS as error:
                    failed.append(Skipped(layer.name, _explain(error, layer), "not_read"))
                else:
                    if spectrum is not None:
                        kept.store(opened, layer.name, layer.pair.layout, decomposer.dtype(layer), spectrum)
                        written.add(layer.name)
                    del spectrum
                done += effort
                if progress is not None:
                    progress(done, sum(efforts), layer.pair.name)
        there -= written | {item.name for item in failed}
    return CachedBase(
        base=opened.path,
        folder=kept.folder(opened),
        layers=tuple(layers),
        there=tuple(layer for layer in layers if layer.name in there),
        written=tuple(layer for layer in layers if layer.name in written),
        failed=tuple(failed),
        skipped=skipped,
        stale=kept.stale_for(opened),
    )


@dataclass(frozen=True)
class _Decomposer:
    """Reads and decomposes one base weight at a time."""

    base: Checkpoint
    cache: SpectrumCache
    device: str

    @staticmethod
    def dtype(layer: PlannedLayer) -> torch.dtype:
        import torch

        return torch.float64 if layer.dtype == "float64" else torch.float32

    def stored(self, layer: PlannedLayer) -> Spectrum | None:
        return self.cache.load(self.base, layer.name, layer.pair.layout, self.dtype(layer))

    def compute(self, layer: PlannedLayer) -> Spectrum | None:
        """The spectrum, or None where the one that is there belongs to the weight."""
        from spectra.svd import Base, short_spectrum

        W0 = layer.pair.read_base(self.base, self.dtype(layer), self.device)
        if Base(W0, stored=lambda: self.stored(layer)).has_stored:
            return None
        return short_spectrum(W0)


def _explain(error: Exception, layer: PlannedLayer) -> str:
    if isinstance(error, CheckpointError):  # names its file and tensor itself
        return str(error)
    return f"{layer.pair.base.file}: {layer.name}: {in_short(error)}"


def _check_room(folder: Path, wanted: int) -> None:
    existing = folder.absolute()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise UsageError(
            f"{folder}: the spectra need {readable_size(wanted)}, but only {readable_size(free)} are free there; "
            "take fewer layers (--include) or another folder (--cache)"
        )


def _effort(layer: PlannedLayer, *, known: bool) -> float:
    m, n = layer.shape
    p = float(min(m, n))
    return 100.0 * m * n if known else m * n * p + EIGENVECTORS * p**3


def readable_size(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
