"""Folders that appear whole or not at all, and what goes along from the folder that they are made from."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from spectra.errors import CheckpointError, SpectraError, UsageError
from spectra.files.checkpoint import PICKLE_SUFFIXES, Checkpoint, leads_out
from spectra.files.configs import read_json
from spectra.files.whole import PARTIAL
from spectra.files.wrapped import own_name

RECORD = "spectra-repair.json"  # what a repaired folder says of how it was made
CARD = "README.md"
# What an audit says of a model, in its card; ``spectra.render.card`` writes it.
_SECTION = re.compile(
    rb"^(?:\xef\xbb\xbf)?[ \t]*<!--[ \t]*spectra:begin[ \t]*-->[ \t]*\r?$.*?"
    rb"^[ \t]*<!--[ \t]*spectra:end[ \t]*-->[ \t]*\r?\n?",
    re.MULTILINE | re.DOTALL,
)

# Why a folder that is there may not be replaced, or None.
Ours = Callable[[Path], str | None]

WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml",
    ".ot", ".npz", ".npy", ".tflite", ".pb", ".mlmodel", ".nemo",
)  # fmt: skip
# What transformers and PEFT look for beside weights; of a folder in which one file was named, nothing else is taken.
_TOKENIZER = re.compile(
    r"tokenizer[\w.\-]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|[\w\-]+\.model"
    r"|chat_template[\w.\-]*"
)
_CONFIGS = re.compile(r"(adapter_|generation_|preprocessor_|processor_|image_processor_)?config\.json")
_READ = ("config.json", "adapter_config.json")  # when the checkpoint was opened, be they links or not
_INDEX = re.compile(r".*\.(safetensors|bin|h5|msgpack)\.index\.json")


def check_folder(folder: str | Path, *, force: bool = False, ours: Ours) -> None:
    """Raises UsageError where :func:`whole_folder` would not write; to be asked before any work."""
    folder = Path(folder)
    if folder.name in ("", ".."):
        raise UsageError(f"{folder}: names no folder to write")
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        why = "exists and is no folder" if folder.is_symlink() or not folder.is_dir() else ours(folder)
        if why is None and not force:
            raise UsageError(f"{folder}: exists already; name another folder, or replace this one with force")
    except OSError as error:  # no permission, a name too long
        raise UsageError(f"{folder}: could not be written: {error.strerror or error}") from None
    if why is not None:
        raise UsageError(f"{folder}: {why}, so it is not overwritten; name another folder")


def recorded_files(folder: Path) -> frozenset[str] | None:
    """The files that a repaired folder's record lists under ``output.files``; None without such a record."""
    try:
        output = read_json(folder / RECORD).get("output")
    except SpectraError:
        return None
    files = output.get("files") if isinstance(output, dict) else None
    return frozenset(map(str, files)) if isinstance(files, list) else None


@contextlib.contextmanager
def whole_folder(folder: str | Path, *, force: bool = False, ours: Ours) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which takes its name once everything in it is written.

    Parameters
    ----------
    folder : the name it takes on success; on any exception, an interrupt too, nothing is left of it.
    force : replace a folder that is there already, if ``ours`` has nothing against it.
    ours : why an existing folder may not be replaced, or None.  It is moved aside first and put back on failure.

    Raises
    ------
    UsageError : the folder is there already, or could not be written.
    """
    folder = Path(folder)
    check_folder(folder, force=force, ours=ours)
    token = secrets.token_hex(4)
    start = os.fsencode(folder.name)[:100].decode(errors="ignore")  # names are limited in length
    temporary = folder.with_name(f".{start}.{token}{PARTIAL}")
    old = folder.with_name(f".{start}.{token}.old")
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _to_disk(temporary)
        check_folder(folder, force=force, ours=ours)  # which may have come or changed in the meantime
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException as error:
        aside = old.exists()
        if aside and not temporary.exists():  # interrupted, but the new one is in its place
            shutil.rmtree(old, ignore_errors=True)
            raise
        if aside and not folder.exists():
            with contextlib.suppress(OSError):
                old.rename(folder)
                aside = False
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may have come to use them
            for parent in missing:
                parent.rmdir()
        problem = _problem(error, temporary)
        if problem is None:
            raise
        where = f"; what was there lies in {old.name} now" if aside else ""
        raise UsageError(f"{folder}: could not be written: {problem}{where}") from None
    try:
        shutil.rmtree(old, ignore_errors=True)  # a remnant of the old one does no harm
    except KeyboardInterrupt:
        shutil.rmtree(old, ignore_errors=True)
        raise


def _problem(error: BaseException, temporary: Path) -> str | None:
    """What went wrong in writing, with the file if it is another than those being written; None for any other error."""
    if isinstance(error, CheckpointError):
        within = temporary in (error.path, *error.path.parents)
        return str(error).replace(f"{temporary}{os.sep}", "") if within else None
    if not isinstance(error, OSError | SafetensorError):
        return None
    where = getattr(error, "filename", None)
    full = getattr(error, "errno", None) in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    )  # in which copying names the source
    foreign = isinstance(where, str) and not full and temporary not in (Path(where), *Path(where).parents)
    return f"{getattr(error, 'strerror', None) or error}" + (f" ({where})" if foreign else "")


def _to_disk(folder: Path) -> None:
    """Has the system write a folder's files, or a power cut could leave the names without the contents."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_apart(folder: str | Path, *read: Checkpoint) -> None:
    """Raises UsageError where writing ``folder`` could touch what is being read."""
    place = Path(folder).resolve()
    for checkpoint in read:
        homes = [checkpoint.path.resolve()] if checkpoint.path.is_dir() else []
        if any(home in (place, *place.parents) for home in homes):
            raise UsageError(f"{folder}: lies in what is being read, {checkpoint.path}")
        for file in (*homes, *checkpoint.files):
            if place in file.resolve().parents or place in file.absolute().parents:
                raise UsageError(f"{folder}: what is being read lies in it, {file}")


@dataclass(frozen=True)
class Companions:
    """What lies beside the weights of a checkpoint.

    Attributes
    ----------
    files : what goes along byte for byte: configs, tokenizer, chat template, model card….
    left_behind : name → why it does not.
    """

    files: tuple[Path, ...]
    left_behind: Mapping[str, str]


def companions(source: Checkpoint) -> Companions:
    """The files beside a checkpoint's weights that go along with an edited copy of it, and those that do not.

    Of a checkpoint that was named by a file, only what models and tokenizers are loaded from goes along.  An index
    of the checkpoint's own shards goes along; any other weights, which would stay unedited, do not, nor do
    sub-folders, hidden files, links that lead out of the folder, and the record of an earlier repair.
    """
    if source.in_memory:
        return Companions((), {})
    named_by_file = not source.path.is_dir()
    folder = source.path.parent if named_by_file else source.path
    own = {file.name for file in source.files}
    index = _own_index(folder, source)
    files: list[Path] = []
    left_behind: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name in own:
            continue
        if named_by_file and path.name != index and not (_CONFIGS.fullmatch(path.name) or is_tokenizer(path)):
            continue
        why = None if path.name in (index, *_READ) else _why_left(path, folder)
        if why is None:
            files.append(path)
        else:
            left_behind[path.name] = why
    return Companions(tuple(files), left_behind)


def is_tokenizer(path: Path) -> bool:
    """Whether a file is named as a tokenizer's files, or a chat template's, are."""
    return _TOKENIZER.fullmatch(path.name) is not None


def _why_left(path: Path, folder: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.name == RECORD:
        return "the record of an earlier repair"
    if path.is_symlink():
        outside = leads_out(path, folder)
        if outside is not None:
            return "a link that leads out of the folder"
        if not path.exists():
            return "a link to nothing"
    if path.is_dir():
        return "a sub-folder"
    if not path.is_file():
        return "no regular file"
    if path.suffix.lower() in WEIGHT_SUFFIXES or _INDEX.fullmatch(path.name.lower()):
        return "weights or a state of training other than those edited: it may hold the old values"
    return None


def _own_index(folder: Path, source: Checkpoint) -> str | None:
    """The name of the index that a sharded checkpoint was opened by."""
    if source.layout != "sharded safetensors":
        return None
    shards = {name: info.file.name for name, info in source.tensors.items()}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        with contextlib.suppress(SpectraError):
            named = read_json(path).get("weight_map")
            if isinstance(named, dict) and {own_name(name): shard for name, shard in named.items()} == shards:
                return path.name
    return None


def check_room(folder: Path, files: Collection[Path]) -> None:
    """Raises UsageError where a disk has no room for copies; a sparse file may claim any size."""
    wanted, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if wanted > free:
        raise UsageError(
            f"{folder.parent}: copies of {', '.join(map(str, files))} need {wanted / 1e9:,.1f} GB, "
            f"but only {free / 1e9:,.1f} GB are free there"
        )


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content; links are followed."""
    shutil.copyfile(source, target)


def write_card(home: Path, before: Path | None, remarks: Sequence[str], front: Sequence[str]) -> None:
    """Writes the model card: the source's with ``remarks`` appended, else a new one with them alone.

    What an audit said of the source is no part of it any more.

    Parameters
    ----------
    before : the source's card; without it, or where it is not there, ``front`` are the lines of the new one's front
        matter.
    remarks : paragraphs, a heading first; where there are none, the card stays as it is.
    """
    if not remarks:
        return
    kept = _SECTION.sub(b"", before.read_bytes()) if before is not None and before.is_file() else b""
    text = kept.rstrip() + b"\n\n" if kept.strip() else b""
    if not text.strip():
        text = "\n".join(["---", *front, "---", "", ""]).encode()
    (home / CARD).write_bytes(text + "\n\n".join(remarks).encode() + b"\n")


def write_record(home: Path, record: str) -> None:
    """Writes the record, JSON text, into the folder."""
    (home / RECORD).write_text(record if record.endswith("\n") else record + "\n", encoding="utf-8")


def files_in(home: Path) -> list[str]:
    """The names of what a folder that was written holds, with its record's: what the record lists as its files."""
    return sorted({RECORD, *(path.name for path in home.iterdir())})
