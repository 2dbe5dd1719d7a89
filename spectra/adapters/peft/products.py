"""AdaLoRA, LoHa and LoKr: what is added to a weight is a product of small factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.lora import NEUTRAL_INIT
from spectra.adapters.peft.method import MethodUpdate, Slot, all_of, dimensions, equal, named
from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import TensorInfo
from spectra.files.orientation import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.updates.algebra import Update


@dataclass(frozen=True)
class AdaLoraUpdate(MethodUpdate):
    """lora_A (r, in), lora_E (r, 1), lora_B (out, r): dW = s·B·(A ⊙ E); r may be pruned to 0.  arXiv 2303.10512."""

    @property
    def kind(self) -> UpdateKind:
        return "low_rank"

    @property
    def formula(self) -> str:
        return "dW = s·B·(E ⊙ A)"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return "linear", "conv1d", "conv"

    @property
    def shape(self) -> tuple[int, int]:
        return self._info("lora_B").shape[0], self._info("lora_A").shape[1]

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.algebra import LowRank

        assert self.scaling is not None
        return LowRank(values["lora_B"], values["lora_A"] * values["lora_E"], self.scaling)


def adalora(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    A, E, B = all_of(module, slot, "lora_A", "lora_E", "lora_B")
    dimensions((2,), A, E, B)
    first = config.whole("init_r", 12)
    patterns = config.values.get("rank_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(config.file, "rank_pattern is not an object")
    kept = patterns.get(f"{module}.lora_E", patterns.get(f"{module}.lora_E.default"))
    rank = first
    if kept is not None:
        if not isinstance(kept, list) or len(kept) != first or not all(isinstance(one, bool) for one in kept):
            raise AdapterError(config.file, f"rank_pattern for {module[:80]!r}: expected a list of {first} booleans")
        rank = sum(kept)
    equal(A, 0, rank, f"the config gives this module r = {rank}")
    equal(E, 0, rank, f"the config gives this module r = {rank}")
    equal(E, 1, 1, "there is one value a rank")
    equal(B, 1, rank, f"the config gives this module r = {rank}")
    alpha = config.number("lora_alpha", config.values.get("lora_alpha", 8))
    # peft divides by the initial rank and a little, whatever is left of that rank.
    scaling = (alpha if alpha > 0 else first) / (first + 1e-5)
    return AdaLoraUpdate(module, named(slot, "lora_A", "lora_E", "lora_B"), rank, alpha, scaling)


def check_adalora(config: ConfigFields) -> None:
    """Refuses, by name, options that AdaLoRA does not have."""
    for option in ("use_dora", "lora_bias"):
        if config.switch(option):
            raise UnsupportedMethodError(config.file, f"the option {option} = True is not one of AdaLoRA's")
    init = config.values.get("init_lora_weights", True)
    if not any(init is value or init == value for value in NEUTRAL_INIT):
        raise UnsupportedMethodError(config.file, f"init_lora_weights = {init!r} cannot be read with AdaLoRA")


def _scaling(config: ConfigFields, module: str) -> tuple[int, float, float]:
    """(r, alpha, alpha / r) of a module."""
    rank = config.pattern("rank_pattern").lookup(module, config.number("r", config.values.get("r", 8)))
    alpha = config.pattern("alpha_pattern").lookup(module, config.number("alpha", config.values.get("alpha", 8)))
    if rank < 1 or rank != int(rank):
        raise AdapterError(config.file, f"r = {rank:g} for module {module}; expected a whole number, at least 1")
    return int(rank), alpha, alpha / rank


def product(values: Mapping[str, Tensor], core: str, a: str, b: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a factor a·b; with a core (r, r, k…), a is (r, out), b (r, in) and A's columns are in·k…."""
    import torch

    if core not in values:
        return values[a].flatten(1), values[b].flatten(1)
    return values[a].T, torch.einsum("ij...,jq->iq...", values[core], values[b]).flatten(1)


@dataclass(frozen=True)
class LoHaUpdate(MethodUpdate):
    """hada_w1_a (out, r), hada_w1_b (r, in), and hada_w2 likewise; beside cores hada_t1 and hada_t2, a is (r, out)."""

    @property
    def kind(self) -> UpdateKind:
        return "hadamard"

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self._info("hada_w1_a"), self._info("hada_w1_b")
        core = dict(self.factors).get("hada_t1")
        if core is None:
            return a.shape[0], b.shape[1]
        return a.shape[1], b.shape[1] * math.prod(core.shape[2:])

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        core = dict(self.factors).get("hada_t1")
        return shape == self.shape and (core is None or _kernel_fits(core, stored))

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.algebra import Hadamard

        assert self.scaling is not None
        first = product(values, "hada_t1", "hada_w1_a", "hada_w1_b")
        return Hadamard(*first, *product(values, "hada_t2", "hada_w2_a", "hada_w2_b"), self.scaling)


def _kernel_fits(core: TensorInfo, stored: tuple[int, ...]) -> bool:
    """Whether a core (r, r, k, l) is of a stored convolution's kernel; l is 1 in one dimension."""
    return len(stored) > 2 and core.shape[2:] == (*stored[2:], 1)[: max(len(stored) - 2, 2)]


def loha(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2")
    infos = all_of(module, slot, *names)
    rank, alpha, scaling = _scaling(config, module)
    because = f"the config gives this module r = {rank}"
    convolution = any(core in slot for core in cores)
    if convolution:
        _check_cores(all_of(module, slot, *cores), rank, because)
    dimensions((2,), *infos)
    for a, b in (infos[:2], infos[2:]):
        equal(a, 0 if convolution else 1, rank, because)
        equal(b, 0, rank, because)
    out = 1 if convolution else 0
    equal(infos[2], out, infos[0].shape[out], f"{infos[0].name!r} has as many")
    equal(infos[3], 1, infos[1].shape[1], f"{infos[1].name!r} has as many")
    return LoHaUpdate(module, named(slot, *names, *cores), rank, alpha, scaling)


def _check_cores(cores: list[TensorInfo], rank: int, because: str) -> None:
    for core in cores:
        dimensions((4,), core)
        equal(core, 0, rank, because)
        equal(core, 1, rank, because)
        if core.shape != cores[0].shape:
            raise AdapterError(core.file, f"its shape is {list(core.shape)}, {cores[0].name!r} differs", core.name)


@dataclass(frozen=True)
class LoKrUpdate(MethodUpdate):
    """lokr_w1 (p, q) and lokr_w2 (s, t…), each whole or as a·b, with a core lokr_t2: dW = scaling · kron(w1, w2)."""

    @property
    def kind(self) -> UpdateKind:
        return "kronecker"

    @property
    def shape(self) -> tuple[int, int]:
        factors = dict(self.factors)
        (p, q), (s, t) = _sides(factors, "lokr_w1"), _sides(factors, "lokr_w2")
        return p * s, q * t

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        factors = dict(self.factors)
        core, whole = factors.get("lokr_t2"), factors.get("lokr_w2")
        if core is not None and not _kernel_fits(core, stored):
            return False
        if whole is not None and whole.shape[2:] != stored[2:]:
            return False
        return shape == self.shape

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        import torch

        from spectra.updates.algebra import Added, Kronecker

        assert self.scaling is not None
        first = whole_or_product(values, "lokr_w1", "")
        whole = values.get("lokr_w2")
        if whole is not None and whole.ndim == 3:
            # peft takes torch.kron of two and three dimensions and reshapes that: no Kronecker product of matrices.
            left = values["lokr_w1"] if "lokr_w1" in values else first[0] @ first[1]
            return Added(self.scaling * torch.kron(left, whole.contiguous()).reshape(self.shape))
        return Kronecker(*first, *whole_or_product(values, "lokr_w2", "lokr_t2"), self.scaling)


def _sides(factors: Mapping[str, TensorInfo], name: str) -> tuple[int, int]:
    if name in factors:
        return factors[name].shape[0], math.prod(factors[name].shape[1:])
    a, b, core = factors[f"{name}_a"].shape, factors[f"{name}_b"].shape, factors.get("lokr_t2")
    if name == "lokr_w2" and core is not None:
        return a[1], b[1] * math.prod(core.shape[2:])
    return a[0], b[1]


def whole_or_product(values: Mapping[str, Tensor], name: str, core: str) -> tuple[Tensor, Tensor]:
    """A factor that is stored whole or as a·b, as (B, A) whose inner side is as short as its form allows."""
    import torch

    if name not in values:
        return product(values, core, f"{name}_a", f"{name}_b")
    whole = values[name].flatten(1)
    one = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (one, whole) if whole.shape[0] <= whole.shape[1] else (whole, one)


def lokr(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    rank, alpha, scaling = _scaling(config, module)
    because = f"the config gives this module r = {rank}"
    names: list[str] = []
    for name, core in (("lokr_w1", None), ("lokr_w2", "lokr_t2")):
        parts = [f"{name}_a", f"{name}_b"] + ([core] if core in slot and core is not None else [])
        if name in slot:
            extra = [part for part in parts if part in slot]
            if extra:
                raise AdapterError(slot[name].file, f"there are both {name} and {extra[0]}", slot[name].name)
            dimensions((2,) if core is None else (2, 3, 4), slot[name])
            names.append(name)
            continue
        a, b, *cores = all_of(module, slot, *parts)
        dimensions((2,), a, b)
        _check_cores(cores, rank, because)
        equal(a, 0 if cores else 1, rank, because)
        equal(b, 0, rank, because)
        names += parts
    for name in names:
        if slot[name].size == 0:
            raise AdapterError(slot[name].file, "it is empty", slot[name].name)
    return LoKrUpdate(module, named(slot, *names), rank, alpha, scaling)
