"""Weights of a fine-tune put into a model in memory, or kept by name, to be evaluated there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from spectra.adapters import MethodUpdate
from spectra.errors import UsageError
from spectra.files.derived import Derived
from spectra.pairing.carried import Carried, carried_by
from spectra.pairing.names import WRAPPERS
from spectra.pairing.pairs import LayerPair, Pairing
from spectra.runs.run import SingleRun

# Name → shape, and whether it holds floats.
Forms: TypeAlias = Mapping[str, tuple[tuple[int, ...], bool]]


def carried_beside(run: SingleRun, pairing: Pairing) -> list[Carried]:
    """All that the fine-tune changes and that is in no pair; ``pairing`` is that of all updates.

    Raises
    ------
    UsageError : something that cannot be told as values of the model's tensors; it is named.
    """

    def refuse(tensor: str, why: str) -> UsageError:
        return UsageError(f"{run.tuned.path}: tensor {tensor!r}: {why}, so the fine-tuned weights cannot be built")

    carried = carried_by(run.base, run.tuned, run.plan, pairing, refuse)
    paired = {name for pair in pairing.pairs for name in pair.update.tensors}
    reasons = {item.name: item.reason for item in pairing.skipped}
    for update in run.plan.updates:
        if update.kind != "dense" and update.tensors[0] not in paired:
            raise refuse(update.tensors[0], reasons.get(update.module, "the base has no such weight"))
    for pair in pairing.pairs:
        why = pair.update.why_not_merged(pair.stored_shape) if isinstance(pair.update, MethodUpdate) else None
        if isinstance(pair.base, Derived):
            why = f"the base has {pair.base.name!r} as {pair.base.how}"
        elif pair.rows is not None and pair.update.kind != "dense":
            why = "its vocabulary was resized"
        if why is not None:
            raise refuse(pair.update.tensors[0], why)
    return [item for item in carried if item.differs(run.base, run.tuned)]


def name_in_model(pair: LayerPair) -> str:
    """The model's name of a pair's weight; attentions may call it in_proj_weight."""
    ending = pair.base.name.split(".")[-1]
    return next((name for name in pair.update.targets if name.split(".")[-1] == ending), pair.update.targets[0])


def working(value: Tensor) -> Tensor:
    """As the analysis has it: half precision in float32."""
    return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value


def forms_of(run: SingleRun, pairing: Pairing, carried: Iterable[Carried]) -> Forms:
    """The tensors that a model must have for the fine-tune to be put into it."""
    forms = {item.name: (item.shape, item.is_float) for item in carried}
    for pair in pairing.pairs:
        own = run.tuned.tensors[pair.update.tensors[0]].shape if pair.update.kind == "dense" else pair.stored_shape
        forms[name_in_model(pair)] = (own, True)
    return forms


class Target(Protocol):
    """Where weights are put to be evaluated."""

    @property
    def subject(self) -> Any:
        """What ``evaluate`` is called with."""
        ...

    def dtype_of(self, name: str) -> torch.dtype | None: ...
    def put(self, name: str, value: Tensor, rows: int | None = None) -> None: ...


class ByName:
    """The changed weights by name."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self.subject = MappingProxyType(self._values)

    def dtype_of(self, name: str) -> torch.dtype | None:
        return None

    def put(self, name: str, value: Tensor, rows: int | None = None) -> None:
        if rows is not None:
            whole = self._values[name].to(dtype=value.dtype, device=value.device, copy=True)
            whole[:rows] = value
            value = whole
        self._values[name] = value.contiguous()


def borrow_model(model: torch.nn.Module, wanted: Forms, run: SingleRun) -> InModel:
    """The model as a place for weights; its own values of them are copied, so that they can be put back.

    Raises
    ------
    UsageError : it is no model, or has no place of its own for one of the weights.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model is of {type(model).__name__}; expected a torch.nn.Module")
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    there = {name: value.detach() for name, value in held}
    tensors = {name: there[place] for name, place in _places(wanted, there, run).items()}
    return InModel(model, tensors, {name: tensor.clone() for name, tensor in tensors.items()})


class InModel:
    """A model in memory, into whose own tensors the changed weights are put (:func:`borrow_model`)."""

    def __init__(self, subject: torch.nn.Module, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]):
        self.subject, self._tensors, self._own = subject, tensors, own

    def dtype_of(self, name: str) -> torch.dtype | None:
        return self._tensors[name].dtype

    def put(self, name: str, value: Tensor, rows: int | None = None) -> None:
        whole = self._tensors[name]
        (whole if rows is None else whole[:rows]).copy_(value)

    def restore(self) -> None:
        for name, value in self._own.items():
            self.put(name, value)


def _places(wanted: Forms, there: Mapping[str, Tensor], run: SingleRun) -> dict[str, str]:
    """The model's tensor for each name, one to one, whatever model classes put before the names."""

    def refuse(name: str, why: str) -> UsageError:
        return UsageError(f"{run.tuned.path}: tensor {name!r}: {why}")

    bare: dict[str, list[str]] = defaultdict(list)
    memory: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
    for place, value in there.items():
        bare[_bare(place)].append(place)
        if value.numel() and not value.is_meta:
            memory[value.data_ptr(), value.shape].append(place)
    places: dict[str, str] = {}
    for name, (shape, is_float) in wanted.items():
        candidates = (
            [name]
            if name in there
            else bare.get(_bare(name), []) or [p for p in there if _is_end(_bare(p), _bare(name))]
        )
        if not candidates:
            raise refuse(name, "not in the model; expected the base's architecture with what the fine-tune adds to it")
        if len(candidates) > 1:
            raise refuse(name, f"could be any of the model's {', '.join(map(repr, candidates))}")
        value = there[candidates[0]]
        if tuple(value.shape) != shape:
            raise refuse(name, f"its shape is {list(shape)}, that of the model's {candidates[0]!r} {list(value.shape)}")
        if value.is_meta or value.is_floating_point() != is_float:
            raise refuse(name, f"the model's {candidates[0]!r} holds {'nothing' if value.is_meta else value.dtype}")
        if candidates[0] in places.values():
            raise refuse(name, f"the model's {candidates[0]!r} is that of another tensor, too")
        shared = [place for place in memory.get((value.data_ptr(), value.shape), []) if place != candidates[0]]
        # A whole model's tied tensor stands for both; an adapter changes one of the two.
        if shared and (run.plan.format != "full" or not set(shared).isdisjoint(places.values())):
            raise refuse(name, f"the model's {candidates[0]!r} and {shared[0]!r} share their values; give each its own")
        places[name] = candidates[0]
    return places


def _bare(name: str) -> str:
    """The name without what model classes put before it."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _is_end(one: str, other: str) -> bool:
    """Whether one of two names, of a module and its parameter at least, is the end of the other."""
    short, long = sorted((one, other), key=len)
    return "." in short and long.endswith(f".{short}")
