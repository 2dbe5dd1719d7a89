"""Folders of diffusers pipelines: which models ``model_index.json`` names, and which files hold the weights of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spectra.errors import AmbiguousFilesError, CorruptFileError, MissingFileError, UnsafeFileError
from spectra.files.configs import read_json
from spectra.files.headers import PICKLE_ADVICE, PICKLE_SUFFIXES, check_within

INDEX = "model_index.json"
# Weights of a component, or their index: of diffusers' models and of transformers', with a variant or without.
_SAFE = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<a>[\w\-]+))?\.safetensors(?:\.index(?:\.(?P<b>[\w\-]+))?\.json)?"
)
_PICKLED = re.compile(r"(?:diffusion_)?pytorch_model(?:\.(?P<a>[\w\-]+))?\.bin(?:\.index(?:\.(?P<b>[\w\-]+))?\.json)?")
_PART = re.compile(r".*-[0-9]+-of-[0-9]+")  # a shard's "variant"
_WITHOUT_WEIGHTS = re.compile(r".*(Scheduler|Tokenizer|FeatureExtractor|Processor)(Fast)?")  # classes that store none


def components_of(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, Path], dict[str, Any]]:
    """(component → its one file of weights, or the index of its shards; the pipeline's and the components' configs).

    Of several variants the one without a name is meant, or the only one there is.

    Raises
    ------
    MissingFileError, AmbiguousFilesError
    CorruptFileError : no pipeline of diffusers.
    UnsafeFileError : a component that lies elsewhere, or whose weights are pickled and ``allow_pickle`` is not given.
    """
    index = check_within(folder / INDEX, folder)
    weights: dict[str, Path] = {}
    configs: dict[str, Any] = {}
    values = read_json(index, unique=True)
    for name, value in values.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or None in value:
            continue  # an option of the pipeline, or a component that was left out
        if not re.fullmatch(r"\w{1,80}", name, re.ASCII):
            raise UnsafeFileError(index, f"the component {name[:80]!r} is no plain folder name")
        place = folder / name
        if not place.is_dir():
            if _WITHOUT_WEIGHTS.fullmatch(str(value[1])):
                continue
            raise MissingFileError(place, f"{INDEX} names this component, but it is not there")
        check_within(place, folder)
        if not (place / "config.json").exists():
            continue  # a scheduler, a tokenizer: no model
        configs[name] = read_json(check_within(place / "config.json", folder))
        files = sorted(path for path in place.iterdir() if path.is_file())
        weights[name] = check_within(weights_among(files, place, allow_pickle), folder)
    if not weights:
        raise CorruptFileError(index, "names no model that lies in this folder")
    return weights, {"_class_name": str(values.get("_class_name"))[:80], "components": configs}


def weights_among(files: Sequence[Path], place: Path, allow_pickle: bool) -> Path:
    """Which of a component's files holds its weights, or is the index of their shards; raises as above."""
    named = _by_variant(_SAFE, files)
    if not named:
        pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES]
        if pickles and not allow_pickle:
            raise UnsafeFileError(pickles[0], PICKLE_ADVICE)
        named = _by_variant(_PICKLED, files)
    if not named:
        raise MissingFileError(place, "there is a config.json, but no weights (expected model.safetensors, "
                               "diffusion_pytorch_model.safetensors, or an index with shards)")  # fmt: skip
    variant = "" if "" in named else next(iter(named))
    if (variant and len(named) > 1) or len(named[variant]) > 1:
        candidates = (
            named[variant] if len(named) == 1 or not variant else [file for one in named.values() for file in one]
        )
        listed = ", ".join(file.name for file in candidates)
        raise AmbiguousFilesError(place, f"several weights: {listed}; keep the ones that are meant, or name them")
    return named[variant][0]


def _by_variant(pattern: re.Pattern[str], files: Iterable[Path]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    for file in files:
        match = pattern.fullmatch(file.name)
        if match is not None:
            variant = match["a"] or match["b"] or ""
            if not _PART.fullmatch(variant) and not _PART.fullmatch(file.name.partition(".")[0]):
                named.setdefault(variant, []).append(file)
    return named
