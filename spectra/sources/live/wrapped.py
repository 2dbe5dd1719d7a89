"""Models that peft has put adapters into: the adapter as it would be saved, and the model as it was without.

Imported only where peft is loaded already.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import UnsupportedMethodError, UsageError, in_short
from spectra.files.wrapped import own_name
from spectra.sources.live.memory import ADAPTER_IN_MEMORY, LiveCheckpoint, model_in_memory, tensors_of

if TYPE_CHECKING:
    import torch

INITIALISED = ("pissa", "olora", "corda", "lora_ga", "loftq")
PREFIX = "base_model.model."  # of names in an adapter's file


def is_wrapped(model: torch.nn.Module) -> bool:
    """Whether adapters of peft are in a model."""
    from peft import PeftModel

    return isinstance(model, PeftModel) or any(True for _ in _wrappers(model))


def adapter_of(model: torch.nn.Module, name: str | None) -> LiveCheckpoint:
    """One of a model's adapters, with the names and the config that peft would save it with.

    Raises
    ------
    UsageError : no such adapter, or several that are active and none named.
    """
    configs = _configs(model)
    name = _chosen(model, configs, name)
    path = Path(f"{_title(model)}, adapter {name}")
    config = _as_saved(model, configs[name])
    if getattr(configs[name], "is_prompt_learning", False):
        state = {key: value for key, value in model.state_dict().items() if "prompt_encoder" in key}
    else:
        state = _adapter_state(model, name, path)
    tensors, aside = tensors_of(path, state, once=False)  # as peft saves them
    around = None if changes_base(config) else lambda: base_of(model)
    return LiveCheckpoint(
        path, ADAPTER_IN_MEMORY, tensors, {}, config, aside, source=inner_model(model), around=around,
        rescaled=dict(_rescaled(model, name, configs[name])),
    )  # fmt: skip


def base_of(model: torch.nn.Module) -> LiveCheckpoint:
    """The model as it is without its adapters.

    Raises
    ------
    UsageError : an adapter is merged into its weights, or its initialisation took something out of them.
    """
    inner = inner_model(model)
    title = _title(model)
    for name, config in _configs(model).items():
        if changes_base(config.to_dict()):
            raise UsageError(
                f"{title}: the initialisation of adapter {name} ({_initialisation(config)}) took a part out of the "
                "base weights, which are no longer there; name the base (base=…)"
            )
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefixes = []
    for name, module in [(own_name(name), module) for name, module in inner.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise UsageError(
                    f"{title}: the adapter {', '.join(module.merged_adapters)} is merged into {name}, so the base "
                    "weight is no longer there; call unmerge_adapter() first, or name the base"
                )
            prefixes.append((f"{name}." if name else "", "base_layer."))
        elif isinstance(module, _training_wrapper()):
            kept = "original_module." if module._modules.get("original_module") is not None else "token_adapter."
            prefixes.append((f"{name}." if name else "", kept))

    def rename(name: str) -> str | None:
        for outer, kept in reversed(prefixes):  # the innermost first, whose names are the longest
            if name.startswith(outer):
                if not name.startswith(outer + kept):
                    return None
                name = outer + name[len(outer + kept) :]
        return name

    return model_in_memory(inner, rename)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's initialisation took a part out of the base weights, which are then not in memory."""
    how = config.get("init_lora_weights")
    if config.get("kasa_config"):  # which truncates the base
        return True
    return isinstance(how, str) and how.lower().startswith(INITIALISED)


def _initialisation(config: Any) -> str:
    return "KaSA" if getattr(config, "kasa_config", None) else str(config.init_lora_weights)


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model that the adapters are in."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _training_wrapper() -> Any:
    from peft.utils import other

    return getattr(other, "AuxiliaryTrainingWrapper", None) or other.ModulesToSaveWrapper


def _wrappers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = (BaseTunerLayer, _training_wrapper())
    return (module for module in model.modules() if isinstance(module, kinds))


def _title(model: torch.nn.Module) -> str:
    from peft import PeftModel

    inner = type(inner_model(model)).__name__
    return f"PeftModel ({inner})" if isinstance(model, PeftModel) else inner


def _configs(model: torch.nn.Module) -> Mapping[str, Any]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise UsageError(
            f"{_title(model)}: it has layers of peft, but not their config; give the model that they were added to"
        )
    if type(model).__name__ == "PeftMixedModel":
        raise UsageError(f"{_title(model)}: a PeftMixedModel, whose adapters of several methods are not read")
    return configs


def _chosen(model: torch.nn.Module, configs: Mapping[str, Any], name: str | None) -> str:
    listed = ", ".join(configs)
    if name is not None:
        if name not in configs:
            raise UsageError(f"{_title(model)}: no adapter {name!r}; it has {listed}")
        return name
    active = [item for item in _active(model) if item in configs]
    if len(active) > 1:
        raise UsageError(
            f"{_title(model)}: several adapters are active ({', '.join(active)}), and their sum is not one of them; "
            "name one: spectra.checkpoint_of(model, adapter=…)"
        )
    if not active and len(configs) > 1:
        raise UsageError(f"{_title(model)}: none of its adapters ({listed}) is active; name one with adapter=…")
    return active[0] if active else next(iter(configs))


def _active(model: torch.nn.Module) -> list[str]:
    from peft import PeftModel

    if isinstance(model, PeftModel):
        active = model.active_adapters if not model.active_peft_config.is_prompt_learning else model.active_adapter
        return [active] if isinstance(active, str) else list(active)
    adapters: dict[str, None] = {}
    for layer in _wrappers(model):
        names: Any = layer.active_adapters
        adapters |= dict.fromkeys(names)
    return list(adapters)


def _as_saved(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """The config as ``adapter_config.json`` has it."""

    def plain(value: object) -> object:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain))
    if values.get("base_model_name_or_path") is None:
        values["base_model_name_or_path"] = getattr(inner_model(model), "name_or_path", None) or None
    return {**values, "inference_mode": True}


def _rescaled(model: torch.nn.Module, adapter: str, config: Any) -> Iterator[tuple[str, float]]:
    """(module, factor) where ``set_scale`` or ``scale_layer`` changed what an adapter's config says."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in inner_model(model).named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(layer, BaseTunerLayer) or not isinstance(scaling, Mapping) or adapter not in scaling:
            continue
        nominal = _nominal_scaling(layer, adapter, config)
        if nominal and abs(scaling[adapter] / nominal - 1) > 1e-9:
            yield own_name(name).replace(".base_layer", ""), float(scaling[adapter] / nominal)


def _nominal_scaling(layer: Any, adapter: str, config: Any) -> float | None:
    """The scaling that a layer was made with; None where it has none, or one that cannot be changed."""
    if config.peft_type == "SHIRA":
        return 1.0
    if config.peft_type not in ("LORA", "ADALORA", "LOHA", "LOKR"):
        return None
    alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", None)
    ranks = getattr(layer, "r", None)
    if not isinstance(alphas, Mapping) or not isinstance(ranks, Mapping) or adapter not in alphas:
        return None
    alpha, rank = float(alphas[adapter]), float(ranks[adapter])
    if config.peft_type == "ADALORA":
        return alpha if alpha > 0 else rank
    return alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def _adapter_state(model: torch.nn.Module, name: str, path: Path) -> dict[str, Any]:
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what would be saved
        try:
            # Whether the vocabulary was resized is not asked, for which peft would look for the base on the hub.
            copies = _with_embeddings(model, _configs(model)[name])
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=copies)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UnsupportedMethodError(path, f"peft cannot tell what it would save: {in_short(error)}") from None
    before = "" if isinstance(model, PeftModel) else PREFIX
    return {before + own_name(key): value for key, value in state.items()}


def _with_embeddings(model: torch.nn.Module, config: Any) -> bool:
    """Whether peft saves the embeddings' own weights beside an adapter of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import other

    tokens = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None
    targets = getattr(config, "target_modules", None)
    if tokens or not targets or targets == "all-linear":
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in other.EMBEDDING_LAYER_NAMES)
    layers = [name for name, module in inner_model(model).named_modules() if isinstance(module, BaseTunerLayer)]
    return any(name.rpartition(".")[2] in other.EMBEDDING_LAYER_NAMES for name in layers)
