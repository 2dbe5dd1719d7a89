"""VeRA: small vectors of each module's own scale two random projections that all modules share.  arXiv 2310.11454."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.method import MethodUpdate, Slot, all_of, dimensions, equal, named
from spectra.adapters.plan import Plan, PlannedUpdate, UpdateKind
from spectra.errors import AdapterError
from spectra.files.derived import Weight
from spectra.files.orientation import Layout, Orientation
from spectra.files.values import half_precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import Update

LARGEST_SIDE = 1 << 24  # of a projection that is made anew


@dataclass(frozen=True)
class Projections:
    """The shared projections where they were not stored: what they are made of anew.

    ``sides`` are the largest (out, in) of all modules, known once the base is; ``dtypes`` those of the modules'
    weights, to which peft rounds what all share.
    """

    key: int
    sides: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ()

    def make(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(A (rank, in), B (out, rank)): uniform in ±√(6/fan), from torch's generator on the CPU."""
        import torch

        assert self.sides is not None
        generator = torch.Generator(device="cpu").manual_seed(self.key)
        made = []
        for shape in ((rank, self.sides[1]), (self.sides[0], rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            for dtype in self.dtypes:
                values = values.to(half_precision(dtype) or values.dtype).float()
            made.append(values.double().to(device))
        return made[0], made[1]


@dataclass(frozen=True)
class VeraUpdate(MethodUpdate):
    """vera_lambda_b (out,) and vera_lambda_d (r,) of the module, vera_A (r, …) and vera_B (…, r) of all modules."""

    made: Projections | None = None

    @property
    def kind(self) -> UpdateKind:
        return "low_rank"

    @property
    def formula(self) -> str:
        return "dW = (b ⊙ B)·(d ⊙ A), with A and B random and shared"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return "linear", "conv1d"

    @property
    def parameters(self) -> int:
        return self._info("vera_lambda_b").size + self._info("vera_lambda_d").size

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        A = dict(self.factors).get("vera_A")
        return shape[0] == self._info("vera_lambda_b").size and (A is None or shape[1] <= A.shape[1])

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.algebra import SharedLowRank

        b, d = values["vera_lambda_b"], values["vera_lambda_d"]
        A, B = (values["vera_A"], values["vera_B"]) if self.made is None else self.made.make(d.numel(), d.device)
        return SharedLowRank(b[:, None] * B[: b.numel()], d[:, None] * A)


def vera(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    vectors, projections = ("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B")
    b, d = all_of(module, slot, *vectors)
    dimensions((1,), b, d)
    rank = config.whole("r", 256)
    if not any(name in slot for name in projections) and config.values.get("save_projection", True) is False:
        equal(d, 0, rank, f"the config gives r = {rank}")
        key = config.whole("projection_prng_key", 0)
        if key >= 1 << 63 or b.size > LARGEST_SIDE:
            raise AdapterError(config.file, f"projection_prng_key = {key}; expected a seed of torch's generator")
        note = "VeRA's projections were not stored, and are made anew from projection_prng_key, by torch's generator"
        return VeraUpdate(module, named(slot, *vectors), rank, None, 1.0, notes=(note,), made=Projections(key))
    A, B = all_of(module, slot, *projections)
    dimensions((2,), A, B)
    for info, dimension in ((d, 0), (A, 0), (B, 1)):
        equal(info, dimension, rank, f"the config gives r = {rank}")
    if B.shape[0] < b.size:
        raise AdapterError(B.file, f"it has {B.shape[0]} rows, but {b.name!r} has {b.size}", B.name)
    return VeraUpdate(module, named(slot, *vectors, *projections), rank, None, 1.0)


def with_projections(plan: Plan, find: Callable[[PlannedUpdate], Weight | None], orientation: Orientation) -> Plan:
    """The plan with the sides of projections that were not stored: the largest of all modules that the adapter has.

    ``find`` gives the base's weight of an update.
    """
    lacking = [update for update in plan.updates if isinstance(update, VeraUpdate) and update.made is not None]
    shapes, dtypes = [], set()
    for update in lacking:
        info = find(update)
        layout = update.layout_in(info.shape, orientation) if info is not None else None
        if info is not None and layout is not None:
            shapes.append(info.shape if layout == "linear" else info.shape[::-1])
            dtypes.add(info.dtype)
    if not shapes:
        return plan
    sides = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    changed = {
        update.module: replace(update, made=Projections(update.made.key, sides, tuple(sorted(dtypes))))
        for update in lacking
        if update.made is not None
    }
    return replace(plan, updates=tuple(changed.get(update.module, update) for update in plan.updates))
