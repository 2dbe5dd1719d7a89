"""Models that lie elsewhere: on the Hugging Face hub, or wherever fsspec reaches.  Only what would be read is fetched.

What a repository or a remote folder holds is listed first; of it the configurations are fetched, then the weights that
:func:`spectra.files.checkpoint.open_checkpoint` would open in a folder with these files.  The hub's client keeps them
in its cache (``HF_HUB_CACHE``, ``HF_HOME``), asks the hub that ``HF_ENDPOINT`` names, with the token that ``HF_TOKEN``
or a login gave it, and stays offline where ``HF_HUB_OFFLINE`` says so.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath

from spectra.errors import AmbiguousFilesError, MissingFileError, SpectraError, UnsafeFileError, UsageError, in_short
from spectra.files.checkpoint import PICKLED_FILES, SINGLE_FILES
from spectra.files.configs import read_json
from spectra.files.gguf.parts import first_parts, is_same_model
from spectra.files.headers import PICKLE_ADVICE
from spectra.files.pipelines import INDEX, weights_among

CONFIGS = ("config.json", "adapter_config.json", INDEX)
INDICES = (".safetensors.index.json", ".bin.index.json")
URL = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)

Get = Callable[[Sequence[str]], Path]  # fetches files by their names; returns the folder they then lie in


def is_offline() -> bool:
    """Whether the hub's client was told to stay offline."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def find_on_hub(
    name: str,
    revision: str | None,
    *,
    as_base: bool,
    allow_pickle: bool,
    local_files_only: bool,
    file: str | None = None,
) -> Path | None:
    """The folder of the hub's cache that holds a model, fetched if need be; None where there is no such model.

    ``file`` is the one that is wanted of several models in one repository.  Without a connection, what the cache holds
    is taken.

    Raises
    ------
    MissingFileError : the hub has it, but does not give it, or what it gives could not be stored; why is said.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    def cached() -> Path | None:
        with contextlib.suppress(HFValidationError, OSError):  # the client's own errors are OSErrors
            return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
        return None

    if local_files_only or is_offline():
        return cached()

    def get(names: Sequence[str]) -> Path:
        kept = [try_to_load_from_cache(name, item, revision=commit) for item in names]
        if not all(isinstance(item, str) for item in kept):  # else the client would draw a bar for nothing
            exactly = [glob.escape(item) for item in names]
            folder = snapshot_download(name, revision=revision, allow_patterns=exactly)  # which notes what a branch is
            if Path(folder).name != commit:  # it has moved on since it was listed
                snapshot_download(name, revision=commit, allow_patterns=exactly)
        return Path(snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=[]))

    what = (name if file is None else f"{name}/{file}") + ("" if revision is None else f"@{revision}")
    try:
        info = HfApi().model_info(name, revision=revision)
    except HFValidationError:
        return None
    except Exception as error:  # of whatever HTTP library the client uses, by its version
        kept = cached()
        if kept is not None or (
            isinstance(error, RepositoryNotFoundError | RevisionNotFoundError) and not isinstance(error, GatedRepoError)
        ):
            return kept
        raise MissingFileError(what, _why(error)) from None
    commit, names = str(info.sha), [item.rfilename for item in info.siblings or ()]
    try:
        return fetched(what, names, get, as_base=as_base, allow_pickle=allow_pickle, file=file)
    except SpectraError:
        raise
    except Exception as error:
        raise MissingFileError(what, _why(error)) from None


def _why(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return "this model is gated: accept its terms on its page and log in (`hf auth login`, or HF_TOKEN)"
    return f"no such file or folder, and it could not be fetched from the hub: {in_short(error)}"


def fetch_url(url: str, *, as_base: bool, allow_pickle: bool) -> Path:
    """The local copy of a file or folder that fsspec reaches (``s3://``, ``gs://``, ``https://``, …), for reading.

    Copies lie beside the kept spectra (:func:`spectra.cache`), those of a folder by its address and the names in
    it, and are fetched anew where the original changed.  Of a folder the top is read alone.

    Raises
    ------
    UsageError : what reads such addresses is not installed.
    MissingFileError : nothing is there, or it could not be fetched.
    """
    import fsspec

    from spectra.files.places import default_root

    shown = without_secrets(url)

    def local(addresses: Sequence[str], *identity: str) -> list[Path]:
        home = default_root() / "remote" / sha256("\n".join(identity).encode()).hexdigest()[:32]
        options = {"cache_storage": str(home), "same_names": True, "check_files": True}
        copies = fsspec.open_local([f"filecache::{item}" for item in addresses], mode="rb", filecache=options)
        return [Path(item) for item in copies]

    try:
        files, place = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # s3fs, gcsfs … are packages of their own; no such protocol
        raise UsageError(f"{shown}: cannot be read: {in_short(error).replace(url, shown)}") from None
    try:
        if not files.isdir(place):
            return local([url], url)[0]
        # Names of the top folder alone: same_names keeps a file's name, not its folder.
        names = sorted(
            PurePosixPath(item["name"]).name for item in files.ls(place, detail=True) if item["type"] == "file"
        )

        def get(wanted: Sequence[str]) -> Path:
            return local([f"{url.rstrip('/')}/{item}" for item in wanted], url, *names)[0].parent

        return fetched(shown, names, get, as_base=as_base, allow_pickle=allow_pickle)
    except SpectraError:
        raise
    except FileNotFoundError:
        raise MissingFileError(shown, "nothing is there") from None
    except Exception as error:  # of whatever library speaks that protocol; its words may repeat the address
        raise MissingFileError(shown, f"could not be fetched ({type(error).__name__})") from None


def without_secrets(url: str) -> str:
    """An address without the name and password, and without the signature, that may be in it."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]


def fetched(
    what: str, names: Iterable[str], get: Get, *, as_base: bool, allow_pickle: bool, file: str | None = None
) -> Path:
    """Fetches what would be read of a folder with these files, or of one ``file`` in it; returns where it lies.

    Raises
    ------
    MissingFileError, AmbiguousFilesError : it holds nothing that is read, or several that could be meant.
    UnsafeFileError : its weights are pickled, and ``allow_pickle`` is not given.
    """
    listed = [name for name in names if _is_plain(name)]
    if file is None:
        wanted = set(chosen(listed, as_base=as_base, allow_pickle=allow_pickle))
    else:
        wanted = {name for name in listed if name == file or is_same_model(Path(name), Path(file))}
        if not wanted:
            raise MissingFileError(what, f"no such file there; of weights it holds {_some(_weights(listed))}")
    if not wanted:
        if chosen(listed, as_base=as_base, allow_pickle=True):
            raise UnsafeFileError(what, PICKLE_ADVICE)
        weights = _weights(listed)
        if not weights:
            raise MissingFileError(what, "it holds no weights that are read, as far as its listing shows")
        raise AmbiguousFilesError(
            what,
            f"several could be meant ({_some(weights)}); name one with the file: {what.partition('@')[0]}/{weights[0]}",
        )
    folders = {PurePosixPath(), *(PurePosixPath(name).parent for name in wanted)}
    if INDEX in listed:  # a scheduler, too, is told apart from a model by its config
        folders |= {PurePosixPath(name).parent for name in listed if name.count("/") == 1}
    small = {name for name in listed if PurePosixPath(name).name in CONFIGS and PurePosixPath(name).parent in folders}
    folder = get(sorted({*small, *(name for name in wanted if name.endswith(".json"))}) or sorted(wanted))
    for index in [name for name in wanted if name.endswith(INDICES)]:
        shards = read_json(folder / index, index=True).get("weight_map")
        within = PurePosixPath(index).parent
        ending = ".safetensors" if index.endswith(INDICES[0]) else ".bin"
        if isinstance(shards, dict):
            named = {item for item in shards.values() if isinstance(item, str) and item.endswith(ending)}
            wanted |= {str(within / item) for item in named} & {*listed}
    return get(sorted(wanted))


def _weights(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith((".safetensors", ".gguf")))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"


def _is_plain(name: str) -> bool:
    """Whether a name in a listing leads nowhere else."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def chosen(names: Sequence[str], *, as_base: bool, allow_pickle: bool) -> list[str]:
    """Which of a folder's files hold the weights (or are the index of their shards) that opening it would read."""
    top = sorted(name for name in names if "/" not in name)
    whole = [name for name in SINGLE_FILES if name in top]
    indices = [name for name in top if name.endswith(INDICES[0])]
    pickled = [name for name in PICKLED_FILES if name in top] + [name for name in top if name.endswith(INDICES[1])]
    if not allow_pickle:
        pickled = []
    if "adapter_config.json" in top or "adapter_model.safetensors" in top:
        kinds = ("adapter_model.safetensors", *(("adapter_model.bin",) if allow_pickle else ()), "adapters.safetensors")
        adapter = [name for name in kinds if name in top]
        if adapter and not (as_base and (whole or indices or pickled)):
            return adapter[:1]
    if whole:
        return whole[:1]
    if INDEX in top:
        return _of_pipeline(names, allow_pickle)
    for candidates in (indices, [name for name in top if name.endswith(".safetensors")]):
        if candidates:
            return candidates if len(candidates) == 1 else []
    inner = [
        name.rpartition("/")[0] for name in names if name.count("/") == 1 and name.endswith("/adapter_config.json")
    ]
    if len(inner) == 1:
        return [name for name in names if name == f"{inner[0]}/adapter_model.safetensors"]
    if inner:
        return []
    ggufs = [name for name in top if name.endswith(".gguf")]
    if ggufs:  # one model, perhaps in parts
        return ggufs if len(first_parts([Path(name) for name in ggufs])) == 1 else []
    return pickled[:1]


def _of_pipeline(names: Sequence[str], allow_pickle: bool) -> list[str]:
    weights = []
    for component in sorted(name.partition("/")[0] for name in names if re.fullmatch(r"\w+/config\.json", name)):
        files = sorted(Path(name) for name in names if name.count("/") == 1 and name.startswith(f"{component}/"))
        with contextlib.suppress(SpectraError):  # opening the folder says what is wrong with it
            weights.append(weights_among(files, Path(component), allow_pickle).as_posix())
    return weights
