"""From what a person or an adapter's config calls a model to a checkpoint on this disk."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from spectra.checkpoint import Checkpoint, open_checkpoint
from spectra.errors import (
    MissingFileError,
    SpectraError,
    UnsafeFileError,
    UnsupportedMethodError,
    UsageError,
    WrongBaseError,
)
from spectra.gguf import BLOCKS, BLOCKS_NOT_READ

STEP = re.compile(r"checkpoint-(\d+)")  # as transformers names them


def find(name: str | Path, *, revision: str | None = None, beside: Path | None = None) -> Path | None:
    """The local path that ``name`` stands for, or None.

    A path comes first (from ``beside``, where given, before the working directory), then the
    Hugging Face hub's cache on this machine (``HF_HUB_CACHE``, ``HF_HOME``).  Nothing is
    downloaded.
    """
    text = str(name)
    if not text:
        raise UsageError("an empty path names no model")
    for folder in [beside, Path()] if beside else [Path()]:
        candidate = folder / text
        with contextlib.suppress(OSError):  # a name too long, a folder that may not be entered
            if candidate.exists():
                plain = Path(os.path.normpath(candidate))  # no "adapter/../base", unless a link is in the way
                return plain if plain.exists() and plain.samefile(candidate) else candidate
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def checkpoints_of(name: str | Path, *, within: bool = False) -> list[str | Path]:
    """A training run's ``checkpoint-N`` folders by their step, where ``name`` is a folder of these alone; else itself.

    ``within`` looks for them beside a model that lies in the same folder, too.
    """
    folder = Path(name)
    try:
        if not folder.is_dir() or (not within and any(folder.glob("*.safetensors"))):
            return [name]
        steps = ((STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
        found = sorted((int(match[1]), path) for match, path in steps if match)
    except OSError:  # a name too long, a folder that may not be read: opening it will say so
        return [name]
    return [path for _, path in found] or [name]


def open_tuned(name: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens what was fine-tuned: a path, or a model in the hub's cache on this machine."""
    return open_checkpoint(_found(name), allow_pickle=allow_pickle)


def _found(name: str | Path) -> Path:
    found = find(name)
    if found is None:
        hint = "; Spectra downloads nothing" if str(name).count("/") == 1 else ""
        raise MissingFileError(name, f"no such file or folder, nor a model in this machine's hub cache{hint}")
    return found


def open_base(name: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens the base that is named.

    Raises
    ------
    MissingFileError : it is not on this machine.
    WrongBaseError : it is itself an adapter.
    UnsupportedMethodError : all its matrices are stored in GGUF's quantised types.
    """
    return _open_base(_found(name), allow_pickle)


def open_base_of(tuned: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens the base that an adapter's config names; raises as :func:`open_base` does.

    Raises
    ------
    UsageError : ``tuned`` names no base.
    """
    return _open_base(_base_of_adapter(tuned), allow_pickle)


def _open_base(found: Path, allow_pickle: bool) -> Checkpoint:
    base = open_checkpoint(found, as_base=True, allow_pickle=allow_pickle)
    if base.layout in ("peft folder", "mlx folder", "gguf adapter"):
        raise WrongBaseError(base.path, "this is an adapter; a base is the model it was trained on")
    matrices = [info for info in base.tensors.values() if len(info.shape) > 1]
    types = sorted({info.dtype for info in matrices} & BLOCKS)
    if base.layout == "gguf" and types and not any(info.is_float for info in matrices):
        raise UnsupportedMethodError(base.path, f"its matrices are stored as {', '.join(types)}: {BLOCKS_NOT_READ}")
    return base


def _base_of_adapter(tuned: Checkpoint) -> Path:
    if tuned.adapter_config is None:
        raise UsageError(f"{tuned.path}: this format does not record its base; name it with --base")
    wanted = tuned.adapter_config.get("base_model_name_or_path")
    if not wanted and "peft_type" not in tuned.adapter_config:  # MLX's own config
        wanted = tuned.adapter_config.get("model")
    if not wanted or not isinstance(wanted, str):
        raise UsageError(f"{tuned.path}: adapter_config.json names no base model; name it with --base")
    revision = tuned.adapter_config.get("revision")
    home = tuned.path if tuned.path.is_dir() else tuned.path.parent
    # Whoever made the adapter chose these: no other host is asked, no revision leads out of the hub's cache.
    if wanted.startswith(("\\\\", "//")):
        raise UnsafeFileError(home / "adapter_config.json", f"its base model {wanted!r} is on another host")
    if isinstance(revision, str) and (".." in revision or re.search(r"^[/~]|[\\:\x00-\x1f]", revision)):
        raise UnsafeFileError(home / "adapter_config.json", f"its revision {revision!r} is no name of one")
    found = find(wanted, revision=revision if isinstance(revision, str) else None, beside=home)
    if found is None:
        raise MissingFileError(
            home / "adapter_config.json",
            f"its base model {wanted!r} is neither a path (seen from {home} or the working directory) nor in "
            "this machine's hub cache; name it with --base",
        )
    return found


def named_base(tuned: Checkpoint, base: Checkpoint) -> bool | None:
    """Whether ``base`` is the one that the adapter's config names; None where that cannot be told."""
    try:
        return _base_of_adapter(tuned).samefile(base.path)
    except (SpectraError, OSError):
        return None
