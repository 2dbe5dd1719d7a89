"""Reading checkpoints: headers first, tensors one at a time, never anything that runs code.

A :class:`Checkpoint` is what a path on disk holds: the names, dtypes and shapes of its tensors
(read from the safetensors headers when it is opened) and its config.  A tensor's bytes are read
when :meth:`Checkpoint.read` asks for them and are not kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectra.errors import (
    AmbiguousFilesError,
    CorruptFileError,
    MissingFileError,
    SpectraError,
    UnsafeFileError,
    UsageError,
)
from spectra.headers import (
    BYTES_PER_ELEMENT,
    PICKLE_ADVICE,
    PICKLE_SUFFIXES,
    TensorInfo,
    check_within,
    leads_out,
    read_header,
    read_json,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "BYTES_PER_ELEMENT", "PARTIAL", "PICKLE_SUFFIXES", "SINGLE_FILES", "Checkpoint", "Fingerprint", "TensorInfo",
    "leads_out", "open_checkpoint", "read_header", "read_json", "write_whole",
]  # fmt: skip

SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
MLX_FILE = "adapters.safetensors"
PARTIAL = ".part"  # how a file ends that is being written


@dataclass(frozen=True)
class Checkpoint:
    """The tensors and the configuration found at a path.

    Attributes
    ----------
    path : the folder or file, as resolved.
    layout : "safetensors", "sharded safetensors", "peft folder" or "mlx folder".
    tensors : name → :class:`TensorInfo`, in the files' order.
    config : ``config.json`` beside the weights, or {}.
    adapter_config : ``adapter_config.json`` beside the weights, or None.
    """

    path: Path
    layout: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] | None = None
    _digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def read(self, name: str, *, digest: bool = False) -> torch.Tensor:
        """The tensor as stored (dtype and shape of its header), on the CPU.

        With ``digest`` its bytes also enter :meth:`fingerprint`.

        Raises
        ------
        CorruptFileError : the file changed or shrank since its header was read.
        """
        from safetensors import SafetensorError, safe_open

        info = self.tensors[name]
        try:
            # Opened for this one tensor: a map that stays open would count every page ever touched.
            with safe_open(info.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(info.file, f"could not be read: {error}", name) from None
        if tuple(tensor.shape) != info.shape:
            raise CorruptFileError(info.file, "the file changed while it was being read", name)
        if digest and name not in self._digests:
            self._digests[name] = _digest(tensor)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the system to fetch these tensors' bytes from the disk, without waiting or keeping them."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            info = self.tensors[name]
            try:
                with info.file.open("rb") as file:
                    os.posix_fadvise(file.fileno(), *info.span, os.POSIX_FADV_WILLNEED)
            except OSError:  # reading it will say what is wrong
                return

    def fingerprint(self, *, verify: bool = False) -> Fingerprint:
        """What identifies this checkpoint.

        Contents are covered when every tensor was read with ``digest``, when ``verify`` asks for
        the rest to be read now, or when the files are a hub cache's blobs, which are named by
        their hash.
        """
        if verify:
            for name in self.tensors:
                if name not in self._digests:
                    self.read(name, digest=True)
        headers = [f"{name}\t{info.dtype}\t{list(info.shape)}" for name, info in sorted(self.tensors.items())]
        blobs = sorted(file.resolve().name for file in self.files)
        if len(self._digests) == len(self.tensors):
            contents = [f"{name}\t{digest}" for name, digest in sorted(self._digests.items())]
        elif all(re.fullmatch(r"[0-9a-f]{64}", blob) for blob in blobs):
            contents = blobs
        else:
            return Fingerprint(_sha256(headers), _sha256(headers), "headers")
        return Fingerprint(_sha256(headers + contents), _sha256(headers), "contents")


@dataclass(frozen=True)
class Fingerprint:
    """``value`` is a sha256 over what ``covers`` says; ``headers`` one over names, dtypes, shapes."""

    value: str
    headers: str
    covers: Literal["headers", "contents"]


def _sha256(lines: Iterable[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    import torch

    flat = tensor.contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def open_checkpoint(path: str | Path, *, as_base: bool = False) -> Checkpoint:
    """Opens a safetensors file, a folder with one, a sharded folder, or a PEFT adapter folder.

    Only headers and small JSON files are read.  Where a folder holds both an adapter's config and
    a whole model, ``as_base`` means the model.

    Raises
    ------
    MissingFileError, CorruptFileError, UnsafeFileError, AmbiguousFilesError
    """
    path = Path(path)
    try:
        return _open_folder(path, as_base) if path.is_dir() else _open_file(path)
    except SpectraError:
        raise
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None


def _open_file(path: Path) -> Checkpoint:
    if not path.exists():
        raise MissingFileError(path, "no such file or folder")
    if not path.is_file():
        raise MissingFileError(path, "neither a file nor a folder")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".json":
        raise CorruptFileError(path, "this is a configuration, not weights; give the folder it is in")
    tensors = read_header(path)
    is_adapter = path.name not in SINGLE_FILES and (path.parent / "adapter_config.json").exists()
    return Checkpoint(
        path,
        "peft folder" if is_adapter else "safetensors",
        tensors,
        _config(path.parent),
        read_json(check_within(path.parent / "adapter_config.json", path.parent), unique=True) if is_adapter else None,
    )


def _open_folder(folder: Path, as_base: bool) -> Checkpoint:
    whole = any((folder / name).exists() for name in SINGLE_FILES) or any(folder.glob("*.safetensors.index.json"))
    adapter = (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists()
    if adapter and not (as_base and whole):
        return _open_adapter(folder)
    config = _config(folder)
    for name in SINGLE_FILES:
        if os.path.lexists(folder / name):
            return Checkpoint(folder, "safetensors", read_header(check_within(folder / name, folder)), config)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        if len(indices) > 1:
            raise AmbiguousFilesError(folder, f"several indices: {_names(indices)}; name one of them")
        return _open_sharded(check_within(indices[0], folder))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Checkpoint(folder, "safetensors", read_header(check_within(files[0], folder)), config)
    if files:
        raise AmbiguousFilesError(folder, f"several weight files and no index: {_names(files)}; name one of them")
    adapters = sorted(child.parent for child in folder.glob("*/adapter_config.json"))
    if len(adapters) == 1:
        return _open_adapter(check_within(adapters[0], folder))
    if adapters:
        raise AmbiguousFilesError(folder, f"several adapters: {_names(adapters)}; name one of them")
    pickles = sorted(child for child in folder.iterdir() if child.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsafeFileError(pickles[0], PICKLE_ADVICE)
    raise MissingFileError(
        folder,
        "no safetensors weights here (expected model.safetensors, an index with shards, or adapter_model.safetensors)",
    )


def _open_adapter(folder: Path) -> Checkpoint:
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        if (folder / "adapter_model.bin").exists():
            raise UnsafeFileError(folder / "adapter_model.bin", PICKLE_ADVICE)
        if (folder / MLX_FILE).exists():
            config = read_json(check_within(folder / "adapter_config.json", folder), unique=True)
            return Checkpoint(folder, "mlx folder", read_header(check_within(folder / MLX_FILE, folder)), {}, config)
        raise MissingFileError(weights, "the adapter's weights are missing")
    config_file = folder / "adapter_config.json"
    if not config_file.exists():
        raise MissingFileError(
            config_file, "the adapter's configuration is missing; without it r, alpha and the method are unknown"
        )
    check_within(config_file, folder)
    return Checkpoint(
        folder, "peft folder", read_header(check_within(weights, folder)), {}, read_json(config_file, unique=True)
    )


def _open_sharded(index: Path) -> Checkpoint:
    folder = index.parent
    weight_map = read_json(index, unique=True, index=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(index, "no weight_map in this index")
    suffix = ".safetensors"
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or re.search(r"[/\\:\x00]", shard)
            or not shard.endswith(suffix)
            or shard.startswith(".")
        ):
            raise UnsafeFileError(index, f"shard name {shard!r} is not a plain {suffix} file name", tensor)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = folder / shard
        if not file.exists():
            raise MissingFileError(file, f"the index {index.name} names this shard, but it is not there")
        headers[shard] = read_header(check_within(file, folder))
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CorruptFileError(folder / shard, f"{index.name} says it is in this shard, but it is not", tensor)
    for shard, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != shard:
                raise CorruptFileError(folder / shard, f"it is in this shard, but {index.name} says otherwise", tensor)
    tensors = {tensor: headers[shard][tensor] for tensor, shard in weight_map.items()}
    return Checkpoint(folder, "sharded safetensors", tensors, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    return read_json(check_within(folder / "config.json", folder))


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, in a folder that is made if need be.

    Raises
    ------
    UsageError : it could not be written.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())  # or a power cut could leave the name without the content
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{file}: could not be written: {error.strerror or error}") from None


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
