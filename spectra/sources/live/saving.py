"""What transformers and diffusers would write of a model: its config, its tensors' names, which of them are tied."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    """A model's config as its ``config.json`` would have it; {} where it has none."""
    config = getattr(model, "config", None)
    writer: Any = config if hasattr(config, "to_json_string") else model if isinstance(config, Mapping) else None
    if not hasattr(writer, "to_json_string"):
        return {}
    try:
        values = json.loads(writer.to_json_string())
    except (TypeError, ValueError, AttributeError):  # not as transformers or diffusers write them
        return {}
    if not isinstance(values, dict):
        return {}
    return values if isinstance(config, Mapping) else {**values, "architectures": [type(model).__name__]}


def tied_names(model: torch.nn.Module) -> set[str]:
    """The names that transformers says stand for another one's tensor."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        tied = getattr(model, "_tied_weights_keys", None)
    return {name for name in tied or () if isinstance(name, str)}


def saved_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each name → the one it is saved under; where transformers would also cut or join tensors, they stay as they are.

    From transformers 5 on a model may have other names in memory than in its files.
    """
    names = list(names)
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not hasattr(model, "config"):
        return {name: name for name in names}
    try:
        transforms = [item.reverse_transform() for item in reversed(_transforms(model))]
        renamings = [item for item in transforms if isinstance(item, loading.WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, loading.WeightConverter)]
        saved = {}
        for name in sorted(names, key=loading.dot_natural_key):
            converted = loading.apply_converters(name, converters)[1] is not None
            saved[name] = name if converted else loading.apply_renamings(name, renamings)
    except (AttributeError, TypeError, ValueError, KeyError, ImportError):  # of another release than is known here
        return {name: name for name in names}
    unique = len(set(saved.values())) == len(saved)
    return {name: saved[name] if unique else name for name in names}


def _transforms(model: torch.nn.Module) -> list[Any]:
    """How the model's tensors were converted when it was loaded, or would be if it were."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        return list(known)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    made: Any = model
    return [item for item in get_model_conversion_mapping(made, add_legacy=False) if not isinstance(item, PrefixChange)]
