"""From what a person or an adapter's config calls a model to a checkpoint: a path, a name on the hub, an address.

A model in memory is given itself (:mod:`spectra.sources.live`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectra.errors import (
    MissingFileError,
    SpectraError,
    UnsafeFileError,
    UsageError,
    WrongBaseError,
    in_short,
)
from spectra.files.checkpoint import Checkpoint, open_checkpoint
from spectra.files.configs import check_regular
from spectra.sources.hub import URL, fetch_url, find_on_hub, is_offline, without_secrets
from spectra.sources.live import ADAPTER_IN_MEMORY, LiveCheckpoint, Source, base_checkpoint_of, checkpoint_of


@dataclass(frozen=True)
class Access:
    """What may be done to read what is named: unpack pickles (nothing in them is run), download."""

    allow_pickle: bool = False
    local_files_only: bool = False


ANYWHERE, LOCAL = Access(), Access(local_files_only=True)
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf)$")
# A state of a training in a file of its own: kohya's NAME-000004, DiffSynth's epoch-3 and step-500.
EPOCH = re.compile(
    r"(?P<stem>(?!model|adapter_model|adapters|diffusion_pytorch_model|pytorch_lora_weights).*?)"
    r"(?:(?:^|[-_])(?:(?:epoch|step|e)[-_]?(?P<told>\d+)|(?P<number>\d{4,})))?\.safetensors",
    re.ASCII,
)
STEP = re.compile(r"checkpoint-(\d+)")  # as transformers names them


def find(
    name: str | Path,
    access: Access = ANYWHERE,
    *,
    revision: str | None = None,
    beside: Path | None = None,
    as_base: bool = False,
) -> Path | None:
    """The local path that ``name`` stands for, or None.

    A path comes first (from ``beside``, where given, before the working directory), then a model on the Hugging Face
    hub, fetched into its cache if need be (see :mod:`spectra.sources.hub`); ``org/name@revision`` names a branch, a tag
    or a commit of it, ``org/name/file.gguf`` one file of it.  Of a repository that holds an adapter and a model,
    ``as_base`` means the model.

    Raises
    ------
    UsageError : the name is empty, or its revision is none.
    MissingFileError : the hub has it, but does not give it.
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
    text, _, wanted = text.partition("@")
    owner, model, file = [*text.split("/", 2), "", ""][:3]
    is_file = WEIGHTS.search(file) is not None
    if (file and not is_file) or text.startswith((".", "/", "~")) or not text:
        return None
    if wanted and not is_revision(wanted):
        raise UsageError(f"{name}: {wanted!r} is no name of a revision")
    if "\\" in text or ".." in text or (not file and WEIGHTS.search(text)):
        return None  # a path that is not there
    found = find_on_hub(
        f"{owner}/{model}" if model else text,
        wanted or revision,
        as_base=as_base,
        allow_pickle=access.allow_pickle,
        local_files_only=access.local_files_only,
        file=file or None,
    )
    if found is None or not file:
        return found
    return found / file if (found / file).exists() else None


def is_revision(text: str) -> bool:
    """Whether this may be a branch, a tag or a commit: nothing that leads out of the hub's cache."""
    return ".." not in text and not re.search(r"^[/~]|[\\:\x00-\x1f]", text)


def checkpoints_of(name: str | Path, *, within: bool = False) -> list[str | Path]:
    """A training run's ``checkpoint-N`` folders by their step, where ``name`` is a folder of these alone; else itself.

    ``within`` looks for them beside a model that lies in the same folder, too.
    """
    folder = Path(name)
    try:
        if not folder.is_dir() or (not within and any(folder.glob("*.safetensors"))):
            return [name]
        steps = ((STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
        checkpoints = sorted((int(match[1]), path) for match, path in steps if match)
    except OSError:  # a name too long, a folder that may not be read: opening it will say so
        return [name]
    return [path for _, path in checkpoints] or [name]


def fine_tunes_of(names: Iterable[str | Path], tell: Callable[[str], None] | None = None) -> list[str | Path]:
    """What is named, with ``@FILE`` replaced by that file's lines and a folder of fine-tunes by these.

    A folder of several adapters, or of several checkpoints, that holds no weights itself stands for them, by name (a
    training run's by their step), and so does one with a file for each epoch of a training.  Empty lines and those that
    begin with # are left out.  ``tell`` is called with a sentence on what else lies in a folder of adapters.

    Raises
    ------
    MissingFileError, UsageError : the list cannot be read, or there is nothing in it.
    """
    fine_tunes: list[str | Path] = []
    for name in names:
        if not str(name).startswith("@"):
            fine_tunes += _within(name, tell)
            continue
        file = Path(str(name)[1:])
        try:
            check_regular(file)
            with file.open(encoding="utf-8") as lines:
                listed = [line.strip() for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise MissingFileError(file, f"this list could not be read: {in_short(error)}") from None
        listed = [line for line in listed if line and not line.startswith("#")]
        if not listed:
            raise UsageError(f"{file}: this list names nothing")
        fine_tunes += [item for line in listed for item in _within(line, tell)]
    return fine_tunes


def epochs_among(files: Sequence[Path]) -> list[str | Path]:
    """The states of one training that lie in one folder as a file each, by their number; [] where these are none.

    Trainers of image models number them by epochs or steps and leave the number out of the last one's name.
    """
    named: list[tuple[str, str, Path]] = []
    for file in files:
        match = EPOCH.fullmatch(file.name)
        if match is None:
            return []
        named.append((match["stem"], match["told"] or match["number"] or "", file))
    if len(files) < 2 or len({stem for stem, _, _ in named}) > 1 or sum(not number for _, number, _ in named) > 1:
        return []
    return [file for _, number, file in sorted(named, key=lambda item: (not item[1], int(item[1] or 0)))]


def _within(name: str | Path, tell: Callable[[str], None] | None) -> list[str | Path]:
    folder = Path(name)
    try:
        if not folder.is_dir() or (folder / "adapter_config.json").exists() or (folder / "model_index.json").exists():
            return [name]
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
        files = [child for child in children if WEIGHTS.search(child.name) and not child.is_dir()]
        if files:
            return epochs_among(files) or [name]
        run = checkpoints_of(name)
        if len(run) > 1:
            return run
        folders = [child for child in children if child.is_dir()]
        adapters: list[str | Path] = [child for child in folders if (child / "adapter_config.json").exists()]
        models: list[str | Path] = [child for child in folders if any(child.glob("*.safetensors"))]
    except OSError:  # a name too long, a folder that may not be read: opening it will say so
        return [name]
    if len(adapters) > 1:
        others = [
            child.name
            for child in folders
            if child not in adapters and (child in models or len(checkpoints_of(child)) > 1)
        ]
        if others and tell is not None:
            tell(f"{name}: not audited, as no adapters: {', '.join(others)}; name them to audit them")
        return adapters
    return models if len(models) > 1 and not adapters else [name]


def open_tuned(name: Source, access: Access = ANYWHERE) -> Checkpoint:
    """Opens what was fine-tuned: a path, an address that fsspec reaches, a model on the hub, or one in memory."""
    if not isinstance(name, str | Path):
        return checkpoint_of(name)
    return open_checkpoint(located(name, access), allow_pickle=access.allow_pickle)


def located(name: str | Path, access: Access, *, as_base: bool = False) -> Path:
    """The local path that a person means by ``name``; raises MissingFileError where there is none."""
    if isinstance(name, str) and URL.match(name):
        if access.local_files_only:
            raise UsageError(f"{without_secrets(name)}: not fetched, since local files alone are wanted")
        return fetch_url(name, as_base=as_base, allow_pickle=access.allow_pickle)
    path = find(name, access, as_base=as_base)
    if path is None:
        raise MissingFileError(name, f"no such file or folder, nor a model {_where(access)}")
    return path


def _where(access: Access) -> str:
    if is_offline() or access.local_files_only:
        return "in this machine's hub cache; nothing is downloaded"
    return "on the hub that is readable without a login (`hf auth login`, or HF_TOKEN)"


def open_base(name: Source, access: Access = ANYWHERE) -> Checkpoint:
    """Opens the base that is named.

    Raises
    ------
    MissingFileError : it is not there.
    WrongBaseError : it is itself an adapter.
    """
    if not isinstance(name, str | Path):
        return _checked_base(as_loaded(base_checkpoint_of(name), access))
    return open_base_at(located(name, access, as_base=True), access)


def open_base_of(tuned: Checkpoint, access: Access = ANYWHERE) -> Checkpoint:
    """Opens the model that an adapter sits in, or that its config names; raises as :func:`open_base` does.

    Raises
    ------
    UsageError : ``tuned`` names no base.
    """
    if isinstance(tuned, LiveCheckpoint) and tuned.around is not None:
        return as_loaded(tuned.around(), access)
    return open_base_at(base_of(tuned, access), access)


def open_base_at(path: Path, access: Access) -> Checkpoint:
    """Opens the base at a local path; raises as :func:`open_base` does."""
    return _checked_base(open_checkpoint(path, as_base=True, allow_pickle=access.allow_pickle))


def _checked_base(base: Checkpoint) -> Checkpoint:
    if base.layout in ("peft folder", "mlx folder", "gguf adapter", ADAPTER_IN_MEMORY):
        raise WrongBaseError(base.path, "this is an adapter; a base is the model it was trained on")
    return base


def as_loaded(base: Checkpoint, access: Access = ANYWHERE) -> Checkpoint:
    """A base in memory without what it was not loaded with: a new head, which holds random values until it is trained.

    That is told by the names of the checkpoint that the model says it was loaded from, where this machine has it.
    """
    if not isinstance(base, LiveCheckpoint) or base.origin is None:
        return base
    try:
        path = find(base.origin, replace(access, local_files_only=True), as_base=True)
        there = None if path is None else open_checkpoint(path, as_base=True, allow_pickle=access.allow_pickle)
    except (SpectraError, OSError):
        return base
    if there is None or there.adapter_config is not None:
        return base
    names = {".".join(parts[at:]) for name in there.tensors for parts in [name.split(".")] for at in range(len(parts))}
    modules = {part for name in there.tensors for part in name.split(".")[:-1]}

    def is_new(name: str) -> bool:
        parts = name.split(".")
        return parts[0] not in modules and not any(".".join(parts[at:]) in names for at in range(len(parts) - 1))

    kept = {name: info for name, info in base.tensors.items() if not is_new(name)}
    return replace(base, tensors=kept) if kept and len(kept) < len(base.tensors) else base


def base_of(tuned: Checkpoint, access: Access) -> Path:
    """The local path of the base that an adapter's config names; raises as :func:`open_base_of` does."""
    if tuned.adapter_config is None:
        raise UsageError(f"{tuned.path}: this format does not record its base; name it with --base")
    wanted = tuned.adapter_config.get("base_model_name_or_path")
    if not wanted and "peft_type" not in tuned.adapter_config:  # MLX's own config
        wanted = tuned.adapter_config.get("model")
    if not wanted or not isinstance(wanted, str):
        if tuned.in_memory:
            why = "its initialisation took a part out of the base weights in memory, and its config names no base"
            raise UsageError(f"{tuned.path}: {why}; name it (base=…)")
        raise UsageError(f"{tuned.path}: adapter_config.json names no base model; name it with --base")
    revision = tuned.adapter_config.get("revision")
    config = tuned.adapter_config_file
    home = config.parent
    # Whoever made the adapter chose these: no other host is asked, no revision leads out of the hub's cache.
    if wanted.replace("\\", "/").startswith("//") or URL.match(wanted):
        raise UnsafeFileError(config, f"its base model {wanted!r} is on another host")
    if isinstance(revision, str) and not is_revision(revision):
        raise UnsafeFileError(config, f"its revision {revision!r} is no name of one")
    beside, revision = None if tuned.in_memory else home, revision if isinstance(revision, str) else None
    path = find(wanted, access, revision=revision, beside=beside, as_base=True)
    if path is None:
        raise MissingFileError(
            config,
            f"its base model {wanted!r} is neither a path (seen from {home} or the working directory) nor a model "
            f"{_where(access)}; name it with --base",
        )
    return path


def named_base(tuned: Checkpoint, base: Checkpoint) -> bool | None:
    """Whether ``base`` is the one that the adapter sits in or its config names; None where that cannot be told."""
    if isinstance(tuned, LiveCheckpoint) and isinstance(base, LiveCheckpoint):
        return True if tuned.source is base.source else None
    try:
        return base_of(tuned, LOCAL).samefile(base.path)
    except (SpectraError, OSError):
        return None


class Bases:
    """The bases of a run's fine-tunes, each opened once."""

    def __init__(self, access: Access):
        self._access, self._paths, self._opened = access, dict[str, Path](), dict[Hashable, Checkpoint]()

    def of(self, tuned: Checkpoint, named: Source | None) -> Checkpoint:
        """The base that was named, or that the fine-tune sits in or names; raises as :func:`open_base` does."""
        sits = named is None and isinstance(tuned, LiveCheckpoint) and tuned.around is not None
        if sits or not isinstance(named, str | Path | None):  # in memory: opening it costs nothing
            opened = open_base_of(tuned, self._access) if named is None else open_base(named, self._access)
            return self._opened.setdefault(opened.place, opened)
        if named is None:
            place = base_of(tuned, self._access)
        else:
            place = self._paths.get(str(named)) or located(named, self._access, as_base=True)
            self._paths[str(named)] = place
        if place not in self._opened:
            self._opened[place] = open_base_at(place, self._access)
        return self._opened[place]
