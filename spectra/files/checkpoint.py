"""Reading checkpoints: headers first, tensors one at a time, never anything that runs code.

A :class:`Checkpoint` is what a path on disk holds: the names, dtypes and shapes of its tensors (read from the headers
when it is opened) and its config.  A tensor's bytes are read when :meth:`Checkpoint.read` asks, and are not kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import (
    AmbiguousFilesError,
    CorruptFileError,
    MissingFileError,
    SpectraError,
    UnsafeFileError,
)
from spectra.files.configs import read_json
from spectra.files.derived import Alternative, Derived, Unreadable, Weight, in_component, read_rows
from spectra.files.fingerprints import Fingerprint, digest_of, digest_of_file, fingerprint_of
from spectra.files.gguf.names import model_of
from spectra.files.gguf.parts import first_parts, read_parts
from spectra.files.headers import (
    BYTES_PER_ELEMENT,
    PICKLE_ADVICE,
    PICKLE_SUFFIXES,
    Renamed,
    TensorInfo,
    check_within,
    leads_out,
    read_header,
    stored_value,
)
from spectra.files.pickles import read_pickle
from spectra.files.pipelines import INDEX, components_of
from spectra.files.shards import shards_in
from spectra.files.stored import derive, other_forms, weights_of
from spectra.files.wrapped import by_own_names

if TYPE_CHECKING:
    import torch

__all__ = [
    "BYTES_PER_ELEMENT", "PICKLE_SUFFIXES", "SINGLE_FILES", "Checkpoint", "Fingerprint", "TensorInfo",
    "leads_out", "open_checkpoint", "read_header",
]  # fmt: skip

SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLED_FILES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
# What trainers pickle beside the weights.
TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
SHARD = re.compile(r"-\d+-of-\d+\.")
STEP = re.compile(r"checkpoint-\d+")  # a folder of a training run
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MLX_FILE = "adapters.safetensors"
NO_ADAPTER_HERE = "adapter_config.json lies here without an adapter's weights; the whole model beside it was read"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors and the configuration found at a path.

    Attributes
    ----------
    path : the folder or file, as resolved.
    layout : "safetensors", "sharded safetensors", "pickle", "sharded pickle", "gguf", "gguf adapter",
        "diffusers pipeline", "peft folder" or "mlx folder".
    tensors : name → :class:`TensorInfo`, in the files' order.
    derived : the weights that some tensors are made into, by name.
    config : ``config.json`` beside the weights, or {}; of a GGUF file what its metadata say.
    adapter_config : ``adapter_config.json`` beside the weights, or None.
    aside : what the files hold beside tensors, each with a reason why it is not read.
    split_fused : whether projections that share a matrix are weights of their own.
    components : a pipeline's models, as each is by itself.
    rescaled : module → by what a running model multiplies its update, beyond what the adapter's config says.
    """

    path: Path
    layout: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] | None = None
    aside: Mapping[str, str] = field(default_factory=dict)
    split_fused: bool = False
    components: Mapping[str, Checkpoint] = field(default_factory=dict, repr=False, compare=False)
    rescaled: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    _digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def derived(self) -> Mapping[str, Derived | Unreadable]:
        if self.components:  # each by its own config
            parts = {name: replace(part, split_fused=self.split_fused) for name, part in self.components.items()}
            made = [in_component(info, name) for name, part in parts.items() for info in part.derived.values()]
            return {info.name: info for info in made}
        return derive(self.tensors, self.config, split=self.split_fused)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """What can be analysed and is matched: the tensors that nothing is made of, and what the others make."""
        return weights_of(self.tensors, self.derived)

    @cached_property
    def alternatives(self) -> Mapping[str, Alternative | Unreadable]:
        """Weights in the forms that other writers use, for names that no weight has."""
        return other_forms(self.weights, self.config)

    @property
    def in_memory(self) -> bool:
        """Whether this is a model in memory (:mod:`spectra.sources.live`)."""
        return False

    @property
    def place(self) -> Hashable:
        """What tells this checkpoint from any other."""
        return self.path.resolve()

    @property
    def adapter_config_file(self) -> Path:
        return (self.path if self.path.is_dir() else self.path.parent) / "adapter_config.json"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def load(self, weight: str | Weight, *, rows: slice | int | None = None, digest: bool = False) -> torch.Tensor:
        """A weight, stored or derived, or its leading ``rows``; raises as :meth:`read` does."""

        def source(name: str, part: slice | None = None) -> torch.Tensor:
            return self.read(name, rows=part, digest=digest)

        info = self.weights[weight] if isinstance(weight, str) else weight
        wanted = slice(rows) if isinstance(rows, int) else rows
        made = read_rows(info, source, wanted)
        count = len(range(*wanted.indices(info.shape[0]))) if wanted is not None else None
        if tuple(made.shape) != (info.shape if count is None else (count, *info.shape[1:])):
            raise CorruptFileError(info.file, f"expected shape {list(info.shape)}, found {list(made.shape)}", info.name)
        return made

    def read(self, name: str, *, rows: slice | None = None, digest: bool = False) -> torch.Tensor:
        """The tensor as stored (dtype and shape of its header), or some of its leading rows, on the CPU.

        Of one in blocks of quantised values it is their bytes.

        With ``digest`` its bytes also enter :meth:`fingerprint`, once they are read as a whole.

        Raises
        ------
        CorruptFileError : the file changed or shrank since its header was read.
        """
        info = self.tensors[name]
        tensor = stored_value(info, rows)
        expected = info.shape_as_read
        if tuple(tensor.shape[1:]) != expected[1:] or (rows is None and tuple(tensor.shape) != expected):
            raise CorruptFileError(info.file, "the file changed while it was being read", name)
        if digest and rows is None and name not in self._digests:
            self._digests[name] = digest_of(tensor)
        return tensor

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 of the bytes of those of the named tensors that were read with ``digest``."""
        return {name: self._digests[name] for name in names if name in self._digests}

    def remember(self, name: str, digest: str) -> None:
        """Takes a tensor for read whose digest an earlier or another process found."""
        self._digests[name] = digest

    def prefetch(self, weights: Iterable[str | Weight]) -> None:
        """Asks the system to fetch these weights' bytes from the disk, without waiting or keeping them."""
        for item in weights if hasattr(os, "posix_fadvise") else ():
            for info in self._read_for(self.tensors[item] if isinstance(item, str) else item):
                try:
                    with info.file.open("rb") as file:
                        os.posix_fadvise(file.fileno(), *info.span, os.POSIX_FADV_WILLNEED)
                except OSError:  # reading it will say what is wrong
                    return

    def _read_for(self, info: Weight) -> list[TensorInfo]:
        """What reading a weight reads: tensors, or parts of them by their spans; [] where that is not known."""
        if not isinstance(info, Derived):
            return [info]
        if isinstance(info, Alternative):
            return [stored for name in info.uses for stored in self._read_for(self.weights[name])]
        if info.part_of is None:
            return [self.tensors[name] for name in info.sources]
        if info.part_of in self.tensors and info.sources == (info.part_of,) and info.part_of not in self.derived:
            return [info]  # a part of one tensor knows its own place
        whole = self.derived.get(info.part_of)
        return self._read_for(whole) if whole is not None and len(whole.shape) == 2 else []  # of a stack, some of each

    def fingerprint(self, *, hash_contents: bool = False) -> Fingerprint:
        """What identifies this checkpoint.

        Contents are covered when every tensor was read with ``digest``, when ``hash_contents`` asks for the rest to be
        hashed now, or when the files are a hub cache's blobs.

        Raises
        ------
        CorruptFileError : with ``hash_contents``, a file changed or shrank since it was opened.
        """
        if hash_contents:
            for name, info in self.tensors.items():
                if name not in self._digests and info.as_stored:
                    self._digests[name] = digest_of_file(info)
                elif name not in self._digests:  # in another order than the file has it in
                    self.read(name, digest=True)
        return fingerprint_of(self.tensors, self._digests, self.files)


def open_checkpoint(path: str | Path, *, as_base: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Opens a safetensors file, a folder with one, a sharded folder, or a PEFT adapter folder.

    Only headers and small JSON files are read.  Where a folder holds both an adapter's config and
    a whole model, ``as_base`` means the model.  With ``allow_pickle`` the weights may be pickled, where there are none
    in safetensors; nothing that a pickle would run is run.

    Raises
    ------
    MissingFileError, CorruptFileError, UnsafeFileError, AmbiguousFilesError
    """
    path = Path(path)
    try:
        opened = _open_folder(path, as_base, allow_pickle) if path.is_dir() else _open_file(path, allow_pickle)
        return replace(opened, tensors=by_own_names(opened.tensors.values()))
    except SpectraError:
        raise
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise MissingFileError(path, f"could not be opened: {error.strerror or error}") from None


def _open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    if not path.exists():
        raise MissingFileError(path, "no such file or folder")
    if not path.is_file():
        raise MissingFileError(path, "neither a file nor a folder")
    if path.name.endswith(".index.json"):
        return _open_sharded(path, allow_pickle)
    if path.suffix == ".json":
        raise CorruptFileError(path, "this is a configuration, not weights; give the folder it is in")
    if path.suffix == ".gguf":
        return _open_gguf(path, path)
    whole = path.name in (*SINGLE_FILES, *PICKLED_FILES)
    is_adapter = not whole and (path.parent / "adapter_config.json").exists()
    own = read_json(check_within(path.parent / "adapter_config.json", path.parent), unique=True) if is_adapter else None
    return _of_file(path, path, _config(path.parent), own, allow_pickle=allow_pickle)


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    gguf = read_parts(file)
    if gguf.fields.get("general.type") == "adapter":
        return Checkpoint(path, "gguf adapter", gguf.tensors, gguf.fields)
    tensors, config = model_of(file, gguf)
    return Checkpoint(path, "gguf", tensors, config)


def _of_file(
    path: Path, file: Path, config: Mapping[str, Any], adapter_config: Mapping[str, Any] | None = None,
    *, allow_pickle: bool = False,
) -> Checkpoint:  # fmt: skip
    """The checkpoint at a path whose weights are all in one file."""
    pickled = allow_pickle and file.suffix in PICKLE_SUFFIXES
    tensors, aside = read_pickle(file) if pickled else (read_header(file), {})
    layout = "pickle" if pickled else "safetensors"
    return Checkpoint(path, layout if adapter_config is None else "peft folder", tensors, config, adapter_config, aside)


def _open_folder(folder: Path, as_base: bool, allow_pickle: bool) -> Checkpoint:
    names = (*SINGLE_FILES, *PICKLED_FILES) if allow_pickle else SINGLE_FILES
    kinds = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    whole = any((folder / name).exists() for name in names)
    whole |= any(any(folder.glob(f"*.{kind}.index.json")) for kind in kinds)
    configured = (folder / "adapter_config.json").exists()
    stale = configured and whole and not any((folder / name).exists() for name in (*ADAPTER_FILES, MLX_FILE))
    if (configured or (folder / ADAPTER_FILES[0]).exists()) and not stale and not (as_base and whole):
        return _open_adapter(folder, allow_pickle)
    opened = _open_model(folder, allow_pickle)
    return replace(opened, aside={**opened.aside, "adapter_config.json": NO_ADAPTER_HERE}) if stale else opened


def _open_model(folder: Path, allow_pickle: bool) -> Checkpoint:
    """A folder that is no adapter's own."""
    config = _config(folder)
    for name in SINGLE_FILES:
        if os.path.lexists(folder / name):
            return Checkpoint(folder, "safetensors", read_header(check_within(folder / name, folder)), config)
    if (folder / INDEX).exists():
        return _open_pipeline(folder, allow_pickle)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        if len(indices) > 1:
            raise AmbiguousFilesError(folder, f"several indices: {_names(indices)}; name one of them")
        return _open_sharded(check_within(indices[0], folder), allow_pickle)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Checkpoint(folder, "safetensors", read_header(check_within(files[0], folder)), config)
    if files:
        _check_shards(folder, files, "model.safetensors.index.json")
        raise AmbiguousFilesError(folder, f"several weight files and no index: {_names(files)}; name one of them")
    adapters = sorted(child.parent for child in folder.glob("*/adapter_config.json"))
    steps = sorted((child for child in folder.iterdir() if STEP.fullmatch(child.name) and child.is_dir()), key=_step)
    if steps and (len(adapters) != 1 or len(steps) > 1):
        raise AmbiguousFilesError(
            folder,
            f"a training run: name one of its checkpoints ({_names(steps)}), or compare them with spectra compare",
        )
    if len(adapters) == 1:
        return _open_adapter(check_within(adapters[0], folder), allow_pickle)
    if adapters:
        raise AmbiguousFilesError(folder, f"several adapters: {_names(adapters)}; name one of them")
    ggufs = first_parts(list(folder.glob("*.gguf")))
    if len(ggufs) > 1:
        raise AmbiguousFilesError(folder, f"several GGUF files: {_names(ggufs)}; name one of them")
    if ggufs:
        return _open_gguf(folder, check_within(ggufs[0], folder))
    if not any((folder / name).exists() for name in PICKLED_FILES) and not any(folder.glob("*.bin.index.json")):
        shards = shards_in(folder)
        if shards is not None:
            raise MissingFileError(folder, shards)
    pickles = sorted(child for child in folder.iterdir() if child.suffix in PICKLE_SUFFIXES)
    if pickles and not allow_pickle:
        raise UnsafeFileError(pickles[0], PICKLE_ADVICE)
    if pickles:
        return _open_pickled(folder, pickles, config)
    raise MissingFileError(
        folder,
        "no safetensors weights here (expected model.safetensors, an index with shards, or adapter_model.safetensors)",
    )


def _open_pipeline(folder: Path, allow_pickle: bool) -> Checkpoint:
    """All models of a pipeline, the names of each one's tensors begun with the component's."""
    files, config = components_of(folder, allow_pickle)
    tensors: dict[str, TensorInfo] = {}
    aside: dict[str, str] = {}
    models: dict[str, Checkpoint] = {}
    for component, file in files.items():
        sharded = file.suffix == ".json"
        own = config["components"][component]
        opened = _open_sharded(file, allow_pickle) if sharded else _of_file(file, file, own, allow_pickle=allow_pickle)
        models[component] = opened
        for name, info in opened.tensors.items():
            tensors[f"{component}.{name}"] = Renamed(
                f"{component}.{name}", info.dtype, info.shape, info.file, info.span, info
            )
        aside |= {f"{component}.{name}": reason for name, reason in opened.aside.items()}
    return Checkpoint(folder, "diffusers pipeline", tensors, config, aside=aside, components=models)


def _open_pickled(folder: Path, pickles: list[Path], config: Mapping[str, Any]) -> Checkpoint:
    """A folder with pickles and nothing else that holds weights."""
    indices = sorted(folder.glob("*.bin.index.json"))
    named = [path for path in pickles if path.name in PICKLED_FILES]
    weights = [path for path in pickles if not TRAINING_STATE.match(path.name)]
    for files, what in ((named, "weight files"), (indices, "indices"), (weights, "weight files and no index")):
        if len(files) > 1:
            _check_shards(folder, files, "pytorch_model.bin.index.json")
            raise AmbiguousFilesError(folder, f"several {what}: {_names(files)}; name one of them")
        if files:
            file = check_within(files[0], folder)
            return _open_sharded(file, True) if what == "indices" else _of_file(folder, file, config, allow_pickle=True)
    raise MissingFileError(folder, f"no weights here, only a trainer's state: {_names(pickles)}")


def _check_shards(folder: Path, files: Iterable[Path], index: str) -> None:
    """Raises MissingFileError where files without an index are the shards of one model."""
    if any(SHARD.search(file.name) for file in files):
        raise MissingFileError(
            folder / index,
            f"the index of these shards is missing ({_names(files)}); fetch it from where they came from",
        )


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _open_adapter(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    weights, pickled = (folder / name for name in ADAPTER_FILES)
    if not weights.exists() and pickled.exists():
        weights = pickled
        if not allow_pickle:
            raise UnsafeFileError(weights, PICKLE_ADVICE)
    if not weights.exists():
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
    adapter_config = read_json(config_file, unique=True)
    return _of_file(folder, check_within(weights, folder), {}, adapter_config, allow_pickle=allow_pickle)


def _open_sharded(index: Path, allow_pickle: bool = False) -> Checkpoint:
    folder = index.parent
    weight_map = read_json(index, unique=True, index=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(index, "no weight_map in this index")
    pickled = index.name.endswith(".bin.index.json")
    if pickled and not allow_pickle:
        raise UnsafeFileError(index, f"its shards are pickles; of each, {PICKLE_ADVICE}")
    suffix = ".bin" if pickled else ".safetensors"
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or re.search(r"[/\\:\x00]", shard)
            or not shard.endswith(suffix)
            or shard.startswith(".")
        ):
            raise UnsafeFileError(index, f"shard name {shard!r} is not a plain {suffix} file name", tensor)
    headers: dict[str, dict[str, TensorInfo]] = {}
    aside: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = folder / shard
        if not file.exists():
            raise MissingFileError(file, f"the index {index.name} names this shard, but it is not there")
        check_within(file, folder)
        headers[shard], others = read_pickle(file) if pickled else (read_header(file), {})
        aside |= others
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CorruptFileError(folder / shard, f"{index.name} says it is in this shard, but it is not", tensor)
    for shard, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != shard:
                raise CorruptFileError(folder / shard, f"it is in this shard, but {index.name} says otherwise", tensor)
    tensors = {tensor: headers[shard][tensor] for tensor, shard in weight_map.items()}
    layout = "sharded pickle" if pickled else "sharded safetensors"
    return Checkpoint(folder, layout, tensors, _config(folder), aside=aside)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(check_within(folder / "config.json", folder))


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
