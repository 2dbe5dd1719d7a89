"""Models that are in memory: a ``torch.nn.Module``, a ``peft.PeftModel`` or a state dict as a :class:`Checkpoint`.

Nothing is copied but the weight that is being worked on, where its dtype or device is another, and the model stays as
it is.  Tensors have the names that ``save_pretrained`` gives them, so what is found of a folder is found of the
model that was loaded from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from spectra.errors import UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.sources.live.memory import ADAPTER_IN_MEMORY, IN_MEMORY, LiveCheckpoint, model_in_memory, tensors_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "ADAPTER_IN_MEMORY", "IN_MEMORY", "LiveCheckpoint", "Source", "base_checkpoint_of", "checkpoint_of", "said_of",
]  # fmt: skip

Source: TypeAlias = Union[str, Path, "torch.nn.Module", Mapping[str, "Tensor"], Checkpoint]
"""What may be given wherever a model is asked for.

- a path, or a name on the hub;
- a ``torch.nn.Module``, whatever its class; one that runs it on several devices or compiled (``DataParallel``,
  ``torch.compile``) stands for the model in it;
- a ``peft.PeftModel``, or a model that peft has put adapters into: as a fine-tune its active adapter, with all else in
  it as the base where none is named; as a base the model without its adapters;
- a state dict, {name: tensor};
- what :func:`checkpoint_of` makes of these, which names one adapter of several.

A base in memory is read without the weights that the checkpoint it says it was loaded from does not have: a head that
was made when it was loaded holds random values.  Values are those at the time of reading.
"""

# What runs a model on several devices, and where it keeps it; torch.compile says "_orig_mod".
_INSIDE = {"DistributedDataParallel": "module", "DataParallel": "module"}


def checkpoint_of(source: Source, *, adapter: str | None = None) -> Checkpoint:
    """What is in memory, as what a path stands for.

    Of a ``peft.PeftModel``, and of a model that peft has put adapters into, this is the adapter; its base is the rest
    of the model.  Everything that takes a model takes this, too.

    Parameters
    ----------
    source : a ``torch.nn.Module``, or {name: tensor}.
    adapter : the name of one of its adapters; None the active one.

    Raises
    ------
    UsageError : no such thing; no adapter of that name, or several that are active.
    MissingFileError : a tensor without values (on the meta device, or on other machines alone).
    UnsupportedMethodError : a tensor of a class that is not read.
    """
    if isinstance(source, Checkpoint):
        if adapter is not None:
            raise UsageError(f"{source.path}: name the adapter {adapter!r} where the model is given")
        return source
    model = _module(source)
    if model is None:
        if adapter is not None:
            raise UsageError(f"a state dict has no adapter {adapter!r}; give the PeftModel")
        return _of_state_dict(source)
    wrappers = _wrappers_in(model)
    if wrappers is not None:
        checkpoint: Checkpoint = wrappers.adapter_of(model, adapter)
        return checkpoint
    if adapter is not None:
        raise UsageError(f"{type(model).__name__}: holds no adapter of peft, so none that is called {adapter!r}")
    return model_in_memory(model)


def base_checkpoint_of(source: Source) -> Checkpoint:
    """The same where a base is asked for: of a model with adapters in it, the model without them.

    Raises
    ------
    UsageError : as :func:`checkpoint_of` does; also where an adapter is merged into the weights.
    """
    model = _module(source)
    wrappers = None if model is None else _wrappers_in(model)
    return checkpoint_of(source) if model is None or wrappers is None else wrappers.base_of(model)


def several(sources: Source | Iterable[Source]) -> list[Source]:
    """What was named, as a list: one path, model or state dict is one, never its parts.

    Raises
    ------
    UsageError : nothing that models could be named by.
    """
    if isinstance(sources, str | Path | Mapping | Checkpoint) or _module(sources) is not None:
        return [sources]  # type: ignore[list-item]  # the check of a module needs torch to be loaded
    if not isinstance(sources, Iterable):
        raise UsageError(f"{type(sources).__name__} is no model; expected a path, a model in memory, or a list of them")
    return list(sources)


def said_of(source: Source) -> str:
    """What messages call it: the path, or what is in memory."""
    return str(source) if isinstance(source, str | Path) else str(checkpoint_of(source).path)


def _of_state_dict(state: object) -> LiveCheckpoint:
    if not isinstance(state, Mapping):
        raise UsageError(
            f"{type(state).__name__} is no model; expected a path, a torch.nn.Module, a peft.PeftModel or a state dict"
        )
    wrong = next((name for name in state if not isinstance(name, str)), None)
    if wrong is not None or not state:
        what = "nothing in it" if not state else f"{wrong!r:.80} in it, which is no name"
        raise UsageError(f"a state dict with {what}; expected {{name: tensor}}")
    path = Path(f"state dict of {len(state)} tensors")
    tensors, aside = tensors_of(path, state)
    return LiveCheckpoint(path, IN_MEMORY, tensors, aside=aside, source=state)


def _module(source: object) -> torch.nn.Module | None:
    """The model that is meant, out of what wraps it to run on several devices or compiled; None where it is none."""
    if "torch" not in sys.modules:
        return None
    from torch.nn import Module

    model = source
    while isinstance(inside := getattr(model, _INSIDE.get(type(model).__name__, "_orig_mod"), None), Module):
        model = inside
    return model if isinstance(model, Module) else None


def _wrappers_in(model: torch.nn.Module) -> Any:
    """What undoes peft's wrappers, where there are any in a model; peft is loaded already where there are."""
    if "peft" not in sys.modules:
        return None
    from spectra.sources.live import wrapped

    return wrapped if wrapped.is_wrapped(model) else None
