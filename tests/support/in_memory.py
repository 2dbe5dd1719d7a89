"""Models in memory: what reading must leave as it is, and their reports without where inputs lay."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.peft_models import randomise

peft = pytest.importorskip("peft")

WHERE = (
    "path",
    "in_memory",
    "format",
    "fingerprint",
    "fingerprint_covers",
    "fingerprint_headers",
    "changed_since_cached",
)


def but_for_where(report: Any) -> dict[str, Any]:
    """A report without where its inputs lay, how they were stored, and how long it took."""
    found: dict[str, Any] = json.loads(report.to_json())
    del found["seconds"]
    for side in ("base", "tuned"):
        found[side] = {key: value for key, value in found[side].items() if key not in WHERE}
    for layer in found["layers"]:
        del layer["seconds"]
    return found


class Unchanged:
    """All that reading must leave as it is: values and their places, dtypes, gradients, modes and hooks."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before, self.seen = self._facts(), self._values()

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return dict(named)

    def _facts(self) -> Any:
        # peft's attention makes its parameters anew whenever its modules are listed, on the same values.
        anew = any("MultiheadAttention" in str(type(module)) for module in self.model.modules())
        tensors = {
            name: (value.data_ptr(), value.dtype, value.device, value.requires_grad,
                   None if anew else (id(value), value._version))
            for name, value in self._tensors().items()
        }  # fmt: skip
        gradients = {name: None if value.grad is None else id(value.grad) for name, value in self._tensors().items()}
        modules = {
            name: (type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
                   len(module._backward_hooks), len(module._state_dict_hooks), sorted(vars(module)))
            for name, module in self.model.named_modules()
        }  # fmt: skip
        return tensors, gradients, modules

    def check(self) -> None:
        assert self._facts() == self.before
        for name, value in self._values().items():
            same = value.view(torch.uint8) if value.ndim else value
            was = self.seen[name].view(torch.uint8) if value.ndim else self.seen[name]
            assert torch.equal(same, was), name


def assert_same(found: Any, expected: Any) -> None:
    """Of a base that the adapter's config does not name."""
    one, other = but_for_where(found), but_for_where(expected)
    for side in (one, other):
        del side["base"]["named_by_adapter"]
    nearly(one, other)


def nearly(one: Any, other: Any, place: str = "") -> None:
    """Equal but for rounding: where a tensor begins in memory decides in which order BLAS adds."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-6), place
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other), place
        for key, value in one.items():
            nearly(value, other[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), place
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            nearly(mine, theirs, f"{place}.{number}")
    else:
        assert one == other, place


def adapted(model: nn.Module, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    found = peft.get_peft_model(model, config)
    if getattr(config, "init_lora_weights", None) in ("pissa", "olora"):  # from where training would begin
        with torch.no_grad():
            for name, value in found.named_parameters():
                if "lora_" in name:
                    value.mul_(1 + 0.1 * torch.rand_like(value))
    else:
        randomise(found, seed)
    return found
