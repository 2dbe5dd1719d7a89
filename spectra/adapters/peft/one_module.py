"""One module of a model, wrapped, loaded and merged by peft.  Imported only where an adapter needs it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from spectra.adapters.peft.keys import PREFIX
from spectra.errors import in_short
from spectra.files.orientation import Layout

# What the config says of the whole model, and what only training needs.
OF_THE_MODEL = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "target_parameters",
)  # fmt: skip
SMALL = 1 << 16  # of a number in the config: learning-rate steps, alphas, seeds are no sizes
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotLoadedError(Exception):
    """Why peft does not take a module's tensors."""


def prefix_of(method: str) -> str:
    """What the names of a method's parameters begin with."""
    prefix: str = PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(method)]
    return prefix


@dataclass(frozen=True)
class Module:
    """What an adapter holds of one module.

    ``config`` are the values of its config that peft is given, ``values`` the module's tensors by their names within
    it, ``kernel`` the sides of a convolution's, else ().
    """

    config: Mapping[str, Any]
    name: str
    values: Mapping[str, Tensor]
    layout: Layout
    kernel: tuple[int, ...]

    def merged(self, W0: Tensor, factor: float = 1.0) -> Tensor:
        """W1 (m, n), float64: what peft makes of W0 (m, n); ``factor`` multiplies the scaling that peft gives it.

        Raises
        ------
        NotLoadedError : peft refuses the config or the tensors for such a module.
        """
        self._check_sizes(W0)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wrapped: Any = self._wrapped(W0)
                state = {f"{PREFIX}{self.name}.{name}": value for name, value in self.values.items()}
                found: Any = set_peft_model_state_dict(wrapped, state)
                if found.unexpected_keys:  # some methods have parts for a bias: their values are no matter here
                    wrapped = self._wrapped(W0, bias=True)
                    found = set_peft_model_state_dict(wrapped, state)
                _check(found, prefix_of(self.config["peft_type"]))
                if factor != 1:
                    wrapped.base_model.model.get_submodule(self.name).scaling["default"] *= factor
                merged_model = wrapped.double().merge_and_unload()
            except NotLoadedError:
                raise
            except Exception as error:  # whatever peft raises for what it does not take
                raise NotLoadedError(in_short(error)) from None
        weight: Tensor = merged_model.get_submodule(self.name).weight.detach()
        if self.layout in ("conv1d", "embedding"):
            return weight.T
        return weight.flatten(1)

    def _wrapped(self, W0: Tensor, *, bias: bool = False) -> peft.PeftModel:
        torch.manual_seed(0)  # what a method draws, it draws by a seed in its config; the rest is overwritten
        layer = _layer(self.layout, self.kernel, W0)
        if bias and self.layout != "embedding":
            layer.bias = _zeros(W0.shape[0], W0)
        model: peft.PeftModel = peft.get_peft_model(_within(self.name, layer), config_of(self.config, self.name))
        return model

    def _check_sizes(self, W0: Tensor) -> None:
        """Holds what peft would make of the config's sizes against what is stored, before any of it takes memory.

        Where a method looks at values to make its parameters, it makes no more of them than the weight has.
        """
        largest = max(W0.numel(), SMALL)
        for key, value in self.config.items():
            for number in value.values() if isinstance(value, Mapping) else (value,):
                if "seed" not in key and isinstance(number, int | float) and not -largest <= number <= largest:
                    raise NotLoadedError(f"{key} = {number} in the config is more than the weight has entries")
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = get_peft_model_state_dict(self._wrapped(W0.to("meta")))
        except NotLoadedError:
            raise
        except Exception:  # it looks at values, or refuses the config, which it says again with them
            return
        for name, made in state.items():
            stored = self.values.get(name.removeprefix(f"{PREFIX}{self.name}."))
            if stored is not None and stored.shape != made.shape:
                raise NotLoadedError(
                    f"size mismatch for {name.removeprefix(PREFIX)}: stored as {list(stored.shape)}, by the config and "
                    f"the base weight {list(made.shape)}; is this the wrong base?"
                )


def _layer(layout: Layout, kernel: tuple[int, ...], W0: Tensor) -> nn.Module:
    """A layer without a bias that holds W0."""
    m, n = W0.shape
    layer: nn.Module
    if layout == "conv1d":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(m, n)  # type: ignore[no-untyped-call]
        layer.bias = _zeros(m, W0)  # which it always has
        return _holding(layer, W0.T)
    if layout == "embedding":
        return _holding(nn.Embedding(n, m, device="meta"), W0.T)
    if layout == "conv":
        channels = n // int(torch.Size(kernel).numel())
        kind: Any = CONVOLUTIONS[len(kernel) - 1]
        layer = kind(channels, m, kernel, bias=False, device="meta")
        return _holding(layer, W0.reshape(m, channels, *kernel))
    return _holding(nn.Linear(n, m, bias=False, device="meta"), W0)


def _zeros(size: int, W0: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=W0.dtype, device=W0.device), requires_grad=False)


def _holding(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    return layer


def _within(module: str, layer: nn.Module) -> nn.Module:
    """A model that has the layer, and nothing else, under that name."""
    *outer, last = module.split(".")
    root = inner = nn.Module()
    for name in outer:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(last, layer)
    return root


def config_of(values: Mapping[str, Any], module: str) -> peft.PeftConfig:
    """The config of an adapter that has this module alone; raises NotLoadedError where peft takes none of these."""
    own = {name: value for name, value in values.items() if name not in OF_THE_MODEL}
    own |= {"target_modules": [module], "inference_mode": True}
    if "bias" in own:
        own["bias"] = "none"  # biases are stored whole
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: peft.PeftConfig = peft.PeftConfig.from_peft_type(**own)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a config's own checks raise
        raise NotLoadedError(in_short(error)) from None
    return config


def _check(found: Any, prefix: str) -> None:
    """Everything that was stored has its place, and nothing of the adapter was left as it was made."""
    if found.unexpected_keys:
        raise NotLoadedError(f"it has no place for {found.unexpected_keys[0].removeprefix(PREFIX)}")
    missing = [name for name in found.missing_keys if f".{prefix}" in name]
    if missing:
        raise NotLoadedError(f"its partner {missing[0].removeprefix(PREFIX)} is missing")
