"""What identifies a checkpoint: hashes of names, dtypes and shapes, and of every tensor's bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spectra.errors import CorruptFileError
from spectra.files.headers import TensorInfo
from spectra.files.values import stamp_of

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20  # bytes that are hashed at a time


@dataclass(frozen=True)
class Fingerprint:
    """``value`` is a sha256 over what ``covers`` says; ``headers`` one over names, dtypes, shapes."""

    value: str
    headers: str
    covers: Literal["headers", "contents"]


def sha256_of(lines: Iterable[str]) -> str:
    """As it stands in reports."""
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of(tensor: Tensor) -> str:
    """A sha256 of a tensor's bytes, in its own order."""
    import torch

    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def digest_of_file(info: TensorInfo) -> str:
    """The same of a tensor as its file holds it, whether or not it can be read as one; raises CorruptFileError."""
    digest, (place, left) = hashlib.sha256(), info.span
    try:
        with info.file.open("rb") as file:
            file.seek(place)
            while left and (piece := file.read(min(left, PIECE))):
                digest.update(piece)
                left -= len(piece)
            changed = info.stamp not in (None, stamp_of(os.fstat(file.fileno())))
    except OSError as error:
        raise CorruptFileError(info.file, f"could not be read: {error.strerror or error}", info.name) from None
    if left or changed:
        raise CorruptFileError(info.file, "the file changed while it was being read", info.name)
    return digest.hexdigest()


def fingerprint_of(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str], files: Iterable[Path]) -> Fingerprint:
    """Of tensors by name, with the digests of those that were read, and the files they lie in."""
    headers = [f"{name}\t{info.dtype}\t{list(info.shape)}" for name, info in sorted(tensors.items())]
    blobs = sorted(file.resolve().name for file in files)
    if len(digests) == len(tensors):
        contents = [f"{name}\t{digest}" for name, digest in sorted(digests.items())]
    elif blobs and all(re.fullmatch(r"[0-9a-f]{64}", blob) for blob in blobs):
        contents = blobs
    else:
        return Fingerprint(sha256_of(headers), sha256_of(headers), "headers")
    return Fingerprint(sha256_of(headers + contents), sha256_of(headers), "contents")
