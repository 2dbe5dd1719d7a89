"""A GGUF model that is split into parts, as llama.cpp's ``gguf-split`` and its converter write them.

Parts are named ``NAME-00001-of-00003.gguf``.  The first has the model's metadata; each says which it is (``split.no``,
from 0 on), of how many (``split.count``), and how many tensors they all have together (``split.tensors.count``).
"""

from __future__ import annotations

import re
from pathlib import Path

from spectra.errors import CorruptFileError, MissingFileError
from spectra.files.gguf.headers import GgufFile, read_gguf
from spectra.files.headers import TensorInfo, check_within

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
MAX_PARTS = 1000  # the largest models have some dozens


def first_parts(files: list[Path]) -> list[Path]:
    """One file for each model: those that are no part, and of the parts of one model the first that is there."""
    models: dict[str, Path] = {}
    for file in sorted(files):
        match = _PART.fullmatch(file.name)
        models.setdefault(file.name if match is None else f"{match[1]}-of-{match[3]}", file)
    return list(models.values())


def is_same_model(one: Path, other: Path) -> bool:
    """Whether two files are parts of one model, by their names."""
    first, second = _PART.fullmatch(one.name), _PART.fullmatch(other.name)
    return (
        first is not None
        and second is not None
        and one.parent == other.parent
        and (first[1], first[3]) == (second[1], second[3])
    )


def read_parts(path: Path) -> GgufFile:
    """What the file, or the parts of the model that it is one of, say they hold, as one.

    Raises
    ------
    MissingFileError : a part is not there.
    CorruptFileError : the parts do not fit together.
    UnsafeFileError : a part is a link that leads out of the folder.
    """
    whole = read_gguf(path)
    count = whole.fields.get("split.count", 0)
    if count in (0, 1):
        return whole
    match = _PART.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= MAX_PARTS:
        raise CorruptFileError(path, f"malformed: split.count = {str(count)[:40]}")
    if match is None or int(match[3]) != count:
        raise CorruptFileError(
            path, f"one of {count} parts of a model, whose names end in -00001-of-{count:05}.gguf and so on: rename it"
        )
    files = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise MissingFileError(
            path.with_name(missing[0]), f"this part of the model is missing, {len(missing)} of {count} are; fetch it"
        )
    parts = [whole if file == path else read_gguf(check_within(file, path.parent)) for file in files]
    return GgufFile(parts[0].fields, _together(files, parts, count))


def _together(files: list[Path], parts: list[GgufFile], count: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        said = part.fields.get("split.no"), part.fields.get("split.count")
        if said != (number, count):
            raise CorruptFileError(
                file, f"it says that it is part {said[0]} (from 0 on) of {said[1]}; expected {number} of {count}"
            )
        for name, info in part.tensors.items():
            if name in tensors:
                raise CorruptFileError(file, f"this name is in {tensors[name].file.name} as well", name)
            tensors[name] = info
    total = parts[0].fields.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CorruptFileError(files[0], f"its parts hold {len(tensors):,} tensors; split.tensors.count is {total}")
    if not tensors:
        raise CorruptFileError(files[0], "no part holds tensors")
    return tensors
