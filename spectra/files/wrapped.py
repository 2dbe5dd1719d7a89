"""Names of tensors without what wraps modules in training, wherever in a name it stands.

FSDP, ``torch.compile`` and activation checkpointing put each layer into a module of their own, whose one child has a
name that no model gives a module; state dicts saved from the wrapped model have it in every key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from spectra.errors import CorruptFileError
from spectra.files.headers import Renamed, TensorInfo
from spectra.files.values import DTYPES

_WRAPPED = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def own_name(name: str) -> str:
    """A tensor's name as the model has it without its wrappers."""
    return _WRAPPED.sub("", name) if "_wrapped_module." in name or "_orig_mod." in name else name


def by_own_names(tensors: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by their names without wrappers.

    Raises
    ------
    CorruptFileError : two have one name then.
    """
    found: dict[str, TensorInfo] = {}
    for info in tensors:
        name = own_name(info.name)
        if name in found:
            raise CorruptFileError(
                info.file, f"without what wraps modules in training it has the name of {found[name].name!r}", info.name
            )
        found[name] = info if name == info.name else _renamed(info, name)
    return found


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    if type(info) is not TensorInfo or info.dtype in DTYPES:  # read by its place in the file
        return replace(info, name=name)
    return Renamed(name, info.dtype, info.shape, info.file, info.span, info)
