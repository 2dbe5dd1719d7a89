"""Base spectra kept on disk: decomposed once, used by every later audit of the same base.

    <root>/<key>/base.json                       which base this is, and where it was last seen
    <root>/<key>/<tensor>-<hash>.safetensors     one layer's singular values and vectors

The key comes from names, dtypes and shapes, and from each file's hub hash, or its size and time of
change: never from the weights, which would take longer to hash than to audit.  So a base that changed
has another key, unless it is in memory, where all of the same form have one.  What no key can see is noticed when a
spectrum is used, since it is checked against the weight first (:attr:`spectra.svd.Base.has_stored`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spectra import __version__
from spectra.errors import SpectraError
from spectra.files.checkpoint import Checkpoint
from spectra.files.configs import read_json
from spectra.files.orientation import Layout, matrix_shape
from spectra.files.places import default_root
from spectra.files.whole import PARTIAL, write_whole

if TYPE_CHECKING:
    import torch

    from spectra.svd import Spectrum

SCHEMA = "spectra.cache/1"
ABANDONED = 600.0  # seconds after which nobody is writing to a temporary file any more; a layer takes a few
IDENTITY = ("schema", "base", "tensor", "layout", "dtype", "shape")  # what a file must say before it is believed
STORED = {"float32": "F32", "float64": "F64"}


class Spectra(Protocol):
    """Where an audit finds the spectra of base weights that are known already."""

    def load(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype) -> Spectrum | None:
        """The spectrum of this tensor, or None."""
        ...

    def stale_for(self, base: Checkpoint) -> tuple[Path, ...]:
        """Folders with spectra of what lay at this base's path before it changed."""
        ...


class SpectrumCache:
    """The spectra under one root folder; nothing is created before the first :meth:`store`."""

    def __init__(self, root: str | Path | None = None):
        self.root = default_root() if root is None else Path(root)
        self._keys: dict[int, tuple[Checkpoint, str]] = {}  # by identity; holding it keeps the id its own

    def folder(self, base: Checkpoint) -> Path:
        """Where this base's spectra are, or would be."""
        if id(base) not in self._keys:
            self._keys[id(base)] = base, _key(base)
        return self.root / self._keys[id(base)][1]

    def file(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype) -> Path:
        """Where the spectrum of one tensor is, or would be."""
        # The hash tells names apart that a file system would not; the rest is for people.
        digest = hashlib.sha256("\n".join((name, layout, _plain(dtype))).encode()).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60]
        return self.folder(base) / f"{readable}-{digest}.safetensors"

    def load(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype) -> Spectrum | None:
        """The spectrum kept of this tensor, or None where there is none that makes sense.

        The vectors are a map of the file, read when they are used; whether they belong to the
        weight is for :class:`spectra.svd.Base` to say.
        """
        from safetensors import SafetensorError, safe_open

        from spectra.svd import Spectrum

        try:
            shape = matrix_shape(base.weights[name].shape, layout)
            p = min(shape)
            with safe_open(self.file(base, name, layout, dtype), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["spectra"])
                if {key: facts[key] for key in IDENTITY} != self._identity(base, name, layout, dtype, shape):
                    return None
                wanted = {"s": ([p], "F64"), "residuals": ([p], "F64"), "vectors": ([p, p], STORED[_plain(dtype)])}
                for key, form in wanted.items():
                    part = file.get_slice(key)
                    if (part.get_shape(), part.get_dtype()) != form:
                        return None
                rows, s, residuals = (file.get_tensor(key) for key in ("vectors", "s", "residuals"))
            spectrum = Spectrum(
                s=s.numpy().copy(),
                vectors=rows.T,
                side=facts["side"],
                residuals=residuals.numpy().copy(),
                orthogonality=float(facts["orthogonality"]),
                shape=shape,
                method=str(facts["method"]),
                rounding=float(facts["rounding"]),
            )
            return spectrum if _makes_sense(spectrum) else None
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
            return None  # whatever is in that file, it is no spectrum of ours

    def store(self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype, spectrum: Spectrum) -> None:
        """Keeps what :func:`spectra.svd.short_spectrum` gave for this tensor in ``dtype``; whole or not at all.

        Raises
        ------
        UsageError : it could not be written.
        """
        import torch
        from safetensors.torch import save

        facts = {
            **self._identity(base, name, layout, dtype, spectrum.shape),
            "side": spectrum.side,
            "method": spectrum.method,
            "orthogonality": spectrum.orthogonality,
            "rounding": float(spectrum.rounding),
            "fingerprint_headers": base.fingerprint().headers,
            "spectra_version": __version__,
        }
        # As rows, so that the transpose that products need is contiguous when it is read again.
        tensors = {
            "vectors": spectrum.vectors.T.contiguous().to("cpu", dtype),
            "s": torch.from_numpy(spectrum.s),
            "residuals": torch.from_numpy(spectrum.residuals),
        }
        write_whole(self.file(base, name, layout, dtype), save(tensors, {"spectra": json.dumps(facts)}))

    def remember(self, base: Checkpoint) -> None:
        """Notes where this base lies, so that :meth:`stale_for` can tell when it changes."""
        folder, here = self.folder(base), [] if base.in_memory else [str(base.path.resolve())]
        paths = _paths(folder)
        if not (folder / "base.json").exists() or not set(here) <= set(paths):
            facts = {"schema": SCHEMA, "paths": [*paths, *here], "fingerprint_headers": base.fingerprint().headers}
            write_whole(folder / "base.json", (json.dumps(facts, indent=1) + "\n").encode())

    def stale_for(self, base: Checkpoint) -> tuple[Path, ...]:
        """Folders with spectra of what lay at this base's path before it changed."""
        if base.in_memory:
            return ()
        try:
            here, current = str(base.path.resolve()), self.folder(base)
            folders = sorted(file.parent for file in self.root.glob("*/base.json"))
            others = [folder for folder in folders if folder != current and here in _paths(folder)]
            return tuple(folder for folder in others if any(folder.glob("*.safetensors")))
        except OSError:
            return ()

    def clean(self, base: Checkpoint) -> None:
        """Removes what a run that was killed left half written."""
        for file in self.folder(base).glob(f".*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()

    def _identity(
        self, base: Checkpoint, name: str, layout: Layout, dtype: torch.dtype, shape: tuple[int, int]
    ) -> dict[str, object]:
        values = (SCHEMA, self.folder(base).name, name, layout, _plain(dtype), list(shape))
        return dict(zip(IDENTITY, values, strict=True))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(base: Checkpoint) -> str:
    """What the spectra of this base are filed under, from its headers and from what the system says of its files."""
    lines = [base.fingerprint().headers, *(["in memory"] if base.in_memory else [])]
    for file in sorted(base.files, key=lambda file: file.name):
        blob = file.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # a hub cache's, named by its hash
            lines.append(blob.name)
        else:
            facts = blob.stat()
            lines.append(f"{file.name}\t{facts.st_size}\t{facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _paths(folder: Path) -> list[str]:
    """Where the base whose spectra these are was seen."""
    try:
        facts = read_json(folder / "base.json")
    except SpectraError:
        return []
    paths = facts.get("paths")
    return paths if facts.get("schema") == SCHEMA and isinstance(paths, list) else []


def _makes_sense(spectrum: Spectrum) -> bool:
    """Whether numbers from a file could be a spectrum at all."""
    import numpy as np

    m, n = spectrum.shape
    s, residuals = spectrum.s, spectrum.residuals
    bounds = (spectrum.orthogonality, float(spectrum.rounding))
    return (
        spectrum.side in (("left",) if m < n else ("right",) if m > n else ("left", "right"))
        and bool(np.isfinite(s).all() and np.isfinite(residuals).all())
        and bool((s[:-1] >= s[1:]).all() and s[-1] >= 0 and (residuals >= 0).all())
        and all(math.isfinite(bound) and bound >= 0 for bound in bounds)
    )
