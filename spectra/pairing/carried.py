"""What a fine-tune changes besides the weights that are paired: norms, biases, new heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectra.adapters import MethodUpdate, Plan
from spectra.adapters.peft.keys import beside_factors
from spectra.errors import UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.pairing.pairs import LayerPair, Pairing

WHOLE = ("full", "mlx-full")  # formats that hold the model's own tensors
Refuse = Callable[[str, str], UsageError]  # (the fine-tune's tensor, why) → what is raised


@dataclass(frozen=True)
class Carried:
    """A tensor of the fine-tuned model that belongs to no pair.

    Its values are, in the order in which peft merges: the fine-tune's own or else the base's, times what scales it,
    plus what is added.

    Attributes
    ----------
    name : the model's own.
    shape, is_float : of its values.
    whole : the fine-tune's tensor that is it; None: the base's stays.
    base : the base's tensor, if there is one.
    scaled : tensors that it is multiplied by, value by value (IA3).
    added : (tensor, scaling) of what is added to it, the biases of lora_B.
    """

    name: str
    shape: tuple[int, ...]
    is_float: bool
    whole: str | None
    base: str | None
    scaled: tuple[str, ...] = ()
    added: tuple[tuple[str, float], ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The fine-tune's tensors that it is made of."""
        return (*([] if self.whole is None else [self.whole]), *self.scaled, *(tensor for tensor, _ in self.added))

    def read(self, base: Checkpoint, tuned: Checkpoint) -> Tensor:
        """Its values in the fine-tuned model, in float64 where they are computed."""
        if self.whole is not None:
            value = tuned.read(self.whole)
        else:
            assert self.base is not None
            value = base.read(self.base)
        for tensor in self.scaled:
            value = value.double() * tuned.read(tensor).double().reshape(value.shape)
        for tensor, scaling in self.added:
            value = value.double() + scaling * tuned.read(tensor).double()
        return value

    def differs(self, base: Checkpoint, tuned: Checkpoint) -> bool:
        """Whether the base has it otherwise, up to what it is stored in, or not at all."""
        if self.base is None or self.scaled or self.added or base.tensors[self.base].shape != self.shape:
            return True
        value = self.read(base, tuned)
        return not torch.equal(value, base.read(self.base).to(value.dtype))


def carried_by(base: Checkpoint, tuned: Checkpoint, plan: Plan, pairing: Pairing, refuse: Refuse) -> list[Carried]:
    """All that the fine-tune changes and that is in no pair; ``pairing`` is that of all updates.

    Raises
    ------
    UsageError : the adapter's effect is that of no weights at all; or something is added to what the base has not.
    """
    if plan.facts.get("conditional"):
        raise UsageError(
            f"{tuned.path}: this adapter works on some tokens only (aLoRA), so no weights have its effect, and it "
            "cannot be merged"
        )
    if plan.sharing:
        raise UsageError(
            f"{tuned.path}: this adapter's model has more layers than its base (layer_replication), so it cannot be "
            "merged into that"
        )
    paired = {name for pair in pairing.pairs for name in pair.update.tensors}
    counterpart = pairing.counterpart if is_named_as_the_model(plan) else {name: name for name in base.tensors}.get
    carried: dict[str, Carried] = {}
    for tensor, name, scaling in _beside(tuned, plan, pairing, refuse):
        if tensor in paired:
            continue
        info, before = tuned.tensors[tensor], carried.get(name)
        added = () if scaling is None else ((tensor, scaling),)
        if before is None:
            whole = tensor if scaling is None else None
            carried[name] = Carried(name, info.shape, info.is_float, whole, counterpart(name), added=added)
        elif scaling is None and before.whole is not None:  # peft stores the bias of a saved module under two names
            if not torch.equal(tuned.read(tensor), tuned.read(before.whole)):
                raise refuse(tensor, f"both it and {before.whole!r} are {name!r}, with other values")
        else:  # a bias that is stored whole, and one of lora_B
            carried[name] = replace(before, whole=before.whole if added else tensor, added=before.added + added)
    for pair, bias in _scaled_biases(base, pairing):
        (factor,) = pair.update.tensors
        name = next((name for name, item in carried.items() if item.base == bias), f"{pair.update.module}.bias")
        info = base.tensors[bias]
        item = carried.get(name, Carried(name, info.shape, info.is_float, None, bias))
        carried[name] = replace(item, scaled=(*item.scaled, factor))
    for item in carried.values():
        if item.whole is None and item.base is None:
            raise refuse(item.tensors[0], f"the base has no {item.name!r}")
        for tensor, _ in item.added:
            mine = tuned.tensors[tensor].shape
            there = item.shape if item.base is None else base.tensors[item.base].shape
            if mine != there:
                raise refuse(tensor, f"its shape is {list(mine)}, that of {item.base or item.name!r} {list(there)}")
    return list(carried.values())


def is_named_as_the_model(plan: Plan) -> bool:
    """Whether the fine-tune has the names of the model's own tensors; other writers' are found by their updates."""
    return plan.format in WHOLE or plan.format.startswith("peft-")


def _beside(tuned: Checkpoint, plan: Plan, pairing: Pairing, refuse: Refuse) -> Iterator[tuple[str, str, float | None]]:
    """(tensor, the model's name of what it changes, scaling), as :func:`beside_factors` gives them."""
    if plan.format.startswith("peft-"):
        yield from beside_factors(tuned, plan)
        return
    known = {item.tensor for item in plan.biases}
    for item in plan.skipped:
        info = tuned.tensors.get(item.name)
        unknown = plan.format not in WHOLE or (plan.format == "mlx-full" and info is not None and len(info.shape) > 2)
        if info is not None and unknown and item.name not in known:
            raise refuse(item.name, f"it is part of the fine-tune, but is not read ({item.reason})")
    if plan.format in WHOLE:
        yield from ((name, name, None) for name in tuned.tensors)
    pairs = {name: pair for pair in pairing.pairs for name in pair.update.tensors}
    for bias in plan.biases:
        if bias.update in pairs:  # else the update itself has no place, which callers refuse
            yield bias.tensor, pairs[bias.update].base.name.removesuffix("weight") + "bias", bias.scaling


def _scaled_biases(base: Checkpoint, pairing: Pairing) -> Iterator[tuple[LayerPair, str]]:
    """(pair, the base's bias) of each module whose bias changes with its weight."""
    for pair in pairing.pairs:
        bias = pair.base.name.removesuffix("weight") + "bias"
        if isinstance(pair.update, MethodUpdate) and pair.update.scales_bias and bias in base.tensors:
            yield pair, bias
