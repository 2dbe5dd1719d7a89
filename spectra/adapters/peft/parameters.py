"""LoRA of PEFT on parameters that are no module's ``weight``: ``target_parameters``, for stacks of experts above all.

The keys name the module alone.  Several parameters of one module are wrapped one around the other in the order in which
the module registers them (``X.experts.base_layer.lora_A`` is the first, ``X.experts.lora_A`` the last), which no file
says: shapes decide, with the base.

Of E experts, lora_A is (E·r, in), experts slowest, and lora_B (out, r·E), experts fastest: ΔW_e = scaling · B_e · A_e,
or its transpose where peft takes the stored dimensions the other way round.  A matrix counts as one expert.  As peft
0.21 has it, and earlier versions, which differ in what they take for in and out.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.keys import unwrapped
from spectra.adapters.peft.method import MethodUpdate, Slot
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped, UpdateKind
from spectra.errors import AdapterError, UnsupportedMethodError, WrongBaseError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.derived import Unreadable
from spectra.files.orientation import Layout, Orientation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectra.updates.algebra import LowRank

KEPT = 4  # tensors that stay in memory while one expert after the other is read from them
DEEPEST = 16  # parts of a name that are compared; a crafted file could have any number
MANY = 6  # parameters of one module, beyond which their orders are not gone through

_EXPERT = re.compile(r"(?P<home>.+)\.(?P<index>\d+)\.(?P<parameter>[^.]+)\.weight")


class Options(Protocol):
    """The config, as far as it gives ranks."""

    def scaling_of(self, module: str) -> tuple[int, float, float]: ...


class Kept:
    """The tensors that were read last; factors of all experts are one tensor, read once and not once an expert."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[int, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        key = id(checkpoint), name
        with self._lock:
            if key not in self._values:
                self._values[key] = checkpoint.read(name, digest=True)
            self._values.move_to_end(key)
            while len(self._values) > KEPT:
                self._values.popitem(last=False)
            return self._values[key]


@dataclass(frozen=True)
class Candidate:
    """A parameter that factors may belong to: its name, and what the config gives it."""

    parameter: str
    rank: int
    alpha: float
    scaling: float
    experts: int


@dataclass(frozen=True)
class StackUpdate(MethodUpdate):
    """lora_A and lora_B of a parameter of the module ``home``, before it is known of which.

    ``copies`` has the tensor of each parameter of which a copy of the base's lies beside them.
    """

    home: str = ""
    candidates: tuple[Candidate, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> UpdateKind:
        return "low_rank"

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(f"{self.home}.{item.parameter}" for item in self.candidates)

    @property
    def sides(self) -> tuple[int, int]:
        """(rows of B, columns of A)."""
        return self._info("lora_B").shape[0], self._info("lora_A").shape[1]


@dataclass(frozen=True)
class ParameterUpdate(MethodUpdate):
    """The part of lora_A and lora_B that belongs to one expert, or all of a matrix.

    ``turned`` : ΔW (out, in) is the transpose of B·A; None where it is (B·A) as the matrix is stored.
    """

    target: str = ""
    expert: int = 0
    experts: int = 1
    turned: bool | None = False
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    @property
    def kind(self) -> UpdateKind:
        return "low_rank"

    @property
    def formula(self) -> str:
        return "dW = s·(B·A)ᵀ" if self.turned else "dW = s·B·A"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return ("linear",)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def parameters(self) -> int:
        return super().parameters // self.experts

    @property
    def shape(self) -> tuple[int, int] | None:
        rows, columns = self._info("lora_B").shape[0], self._info("lora_A").shape[1]
        if self.turned is None:
            return None
        return (columns, rows) if self.turned else (rows, columns)

    def layout_in(self, stored: tuple[int, ...], orientation: Orientation) -> Layout | None:
        if self.turned is not None:
            return super().layout_in(stored, orientation)
        sides = self._info("lora_B").shape[0], self._info("lora_A").shape[1]
        return orientation.layout_of(self.module, stored) if stored == sides else None

    def read(
        self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> LowRank:
        from spectra.updates.algebra import LowRank

        assert self.rank is not None
        assert self.scaling is not None
        A, B = (self.kept.read(checkpoint, self._info(name).name) for name in ("lora_A", "lora_B"))
        A = A.reshape(self.experts, self.rank, -1)[self.expert].to(device=device).double()
        B = B.reshape(-1, self.rank, self.experts)[:, :, self.expert].to(device=device).double()
        if self.turned or (self.turned is None and layout in ("conv1d", "embedding")):
            A, B = B.T, A.T
        return LowRank(B, A, self.scaling)


def parameter_updates(
    config: ConfigFields, options: Options, modules: dict[str, dict[str, TensorInfo]]
) -> list[StackUpdate]:
    """The updates of ``target_parameters``, whose slots are taken out of ``modules``.

    Raises
    ------
    AdapterError : factors that contradict each other or the config.
    UnsupportedMethodError : an initialisation or option that peft does not have for parameters.
    """
    wanted = config.values.get("target_parameters") or []
    if not isinstance(wanted, Sequence) or isinstance(wanted, str) or not all(isinstance(item, str) for item in wanted):
        raise AdapterError(config.file, "target_parameters is no list of names")
    named: dict[str, set[str]] = defaultdict(set)  # end of a module's name → parameters
    for item in wanted:
        head, _, parameter = item.rpartition(".")
        named[head].add(parameter)
    stacks: list[StackUpdate] = []
    for module in list(modules):
        home, A = unwrapped(module), modules[module].get("lora_A")
        own = {parameter for ending in _endings(home) for parameter in named.get(ending, ())}
        if "" in named and A is not None and A.shape[:1] != (options.scaling_of(home)[0],):
            own |= named[""]
        if not own:
            continue
        slot = modules.pop(module)
        stacks.append(_stack(config, options, module, slot, sorted(own)))
    if stacks and config.values.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        init = str(config.values["init_lora_weights"])[:80]
        raise UnsupportedMethodError(config.file, f"target_parameters with init_lora_weights = {init!r} cannot be read")
    return stacks


def _stack(config: ConfigFields, options: Options, module: str, slot: Slot, names: list[str]) -> StackUpdate:
    home = unwrapped(module)
    present = next(iter(slot.values()))
    for factor in ("lora_A", "lora_B"):
        if factor not in slot:
            raise AdapterError(present.file, f"its partner {module}.{factor} is missing", present.name)
    extra = slot.keys() - {"lora_A", "lora_B"}
    if extra:
        info = slot[min(extra)]
        raise UnsupportedMethodError(info.file, "not understood for a parameter (target_parameters)", info.name)
    A, B = slot["lora_A"], slot["lora_B"]
    for info in (A, B):
        if len(info.shape) != 2 or not info.is_float or info.size == 0:
            raise AdapterError(
                info.file, f"expected a matrix of floats, found {info.dtype} {list(info.shape)}", info.name
            )
    if A.shape[0] != B.shape[1]:
        reason = f"its first dimension is {A.shape[0]}, but {B.name!r} has {B.shape[1]} columns"
        raise AdapterError(A.file, reason, A.name)
    candidates = []
    for name in names:
        rank, alpha, scaling = options.scaling_of(f"{home}.{name}")
        if A.shape[0] % rank == 0:
            candidates.append(Candidate(name, rank, alpha, scaling, A.shape[0] // rank))
    if not candidates:
        raise AdapterError(
            A.file, f"its first dimension is {A.shape[0]}, no multiple of the rank that the config gives "
            f"{' or '.join(names)}", A.name,
        )  # fmt: skip
    stack = StackUpdate(module, (("lora_A", A), ("lora_B", B)), home=home, candidates=tuple(candidates))
    if len(candidates) > 1:
        return stack
    (only,) = candidates
    return replace(stack, rank=only.rank, alpha=only.alpha, scaling=only.scaling)


@dataclass(frozen=True)
class _Place:
    """A parameter of the base: (out, in) of each of so many experts, or of a matrix as it is stored."""

    shape: tuple[int, int]
    experts: int | None

    def fits(self, stack: StackUpdate, candidate: Candidate) -> frozenset[bool]:
        """Whether turned or not, of the ways in which factors fit."""
        if (self.experts or 1) != candidate.experts:
            return frozenset()
        straight, turned = stack.sides == self.shape, stack.sides == self.shape[::-1] and self.experts is not None
        return frozenset(way for way, fits in ((False, straight), (True, turned)) if fits)


def against_parameters(plan: Plan, base: Checkpoint) -> Plan:
    """The plan with factors of stacks told apart and cut into experts.

    Raises
    ------
    WrongBaseError : the base has no such parameters, or of other shapes.
    AdapterError : several parameters could be meant, or it cannot be told whether a square one is turned.
    """
    groups: dict[str, list[StackUpdate]] = defaultdict(list)
    for update in plan.updates:
        if isinstance(update, StackUpdate):
            groups[update.home].append(update)
    if not groups:
        return plan
    places = _Places(base)
    skipped: list[Skipped] = []
    chosen: dict[str, tuple[Candidate, _Place, frozenset[bool]]] = {}
    for home, group in groups.items():
        reason = places.why_not(group)
        if reason is not None:
            skipped += [Skipped(update.module, reason, "not_read", update.parameters) for update in group]
        else:
            chosen |= dict(
                zip((update.module for update in group), _told_apart(base, places, home, group), strict=True)
            )
    ways = {next(iter(ways)) for _, place, ways in chosen.values() if place.experts is not None and len(ways) == 1}
    kept, updates = Kept(), []
    for update in plan.updates:
        if not isinstance(update, StackUpdate):
            updates.append(update)
        elif update.module in chosen:
            updates += _members(update, *chosen[update.module], ways, kept)
    return replace(plan, updates=tuple(updates), skipped=(*plan.skipped, *skipped))


def _told_apart(
    base: Checkpoint, places: _Places, home: str, group: list[StackUpdate]
) -> list[tuple[Candidate, _Place, frozenset[bool]]]:
    """What each of the factors of one module belongs to."""
    first = group[0].factors[0][1]
    names = sorted({candidate.parameter for update in group for candidate in update.candidates})
    if len(group) > len(names) or len(names) > MANY:
        raise AdapterError(
            first.file, f"{len(group)} updates of {home!r} for {len(names)} of its parameters", first.name
        )
    located = {name: places.find(home, name) for name in names}
    possible = []
    for order in itertools.permutations(names, len(group)):
        taken = []
        for update, name in zip(group, order, strict=True):
            candidate = next((item for item in update.candidates if item.parameter == name), None)
            place = located[name]
            ways = place.fits(update, candidate) if candidate is not None and place is not None else frozenset()
            if candidate is not None and place is not None and ways:
                taken.append((candidate, place, ways))
        if len(taken) == len(group):
            possible.append(taken)
    if len(possible) == 1:
        return possible[0]
    if possible:
        orders = "; or ".join(", ".join(item[0].parameter for item in order) for order in possible)
        raise AdapterError(
            first.file,
            f"it cannot be told to which parameters of {home!r} its factors belong, since several are of one shape: "
            f"{orders}",
            first.name,
        )
    known = ", ".join(f"{name} {_describe(place)}" for name, place in located.items())
    raise WrongBaseError(
        first.file,
        f"factors of {' and '.join(str(list(update.sides)) for update in group)} fit no parameters of {home!r} in "
        f"{base.path} ({known}): is this the wrong base?",
        first.name,
    )


def _describe(place: _Place | None) -> str:
    if place is None:
        return "is not there"
    return f"is {list(place.shape)}" + (f" for each of {place.experts} experts" if place.experts else "")


def _members(
    stack: StackUpdate, candidate: Candidate, place: _Place, own: frozenset[bool], ways: set[bool], kept: Kept
) -> list[PlannedUpdate]:
    A = stack.factors[0][1]
    name = f"{stack.home}.{candidate.parameter}"
    whole = ParameterUpdate(
        stack.home if candidate.parameter == "weight" else name, stack.factors, candidate.rank, candidate.alpha,
        candidate.scaling, target=name, turned=None, kept=kept,
    )  # fmt: skip
    if place.experts is None:
        return [replace(whole, base_copy=dict(stack.copies).get(candidate.parameter))]
    if len(own) > 1 and len(ways) != 1:
        raise AdapterError(
            A.file,
            f"{name!r} is square, so that it cannot be told whether its update is turned; nothing else in the adapter "
            "shows how its writer took the dimensions",
            A.name,
        )
    (turned,) = own if len(own) == 1 else ways
    members: list[PlannedUpdate] = []
    for index in range(candidate.experts):
        module = f"{stack.home}.{index}.{candidate.parameter}"
        own_part = replace(whole, module=module, target=f"{module}.weight", expert=index, experts=candidate.experts)
        members.append(replace(own_part, turned=turned))
    return members


class _Places:
    """Where the base has parameters: stacks cut into experts, and matrices."""

    def __init__(self, base: Checkpoint):
        self._unreadable: dict[str, str] = {}  # ends of names → reason
        self._matrices: dict[str, _ByEnding] = defaultdict(_ByEnding)
        self._experts: dict[str, _ByEnding] = defaultdict(_ByEnding)
        experts: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
        for name, info in {**base.alternatives, **base.weights}.items():
            if isinstance(info, Unreadable):
                self._unreadable |= dict.fromkeys(_endings(name), info.reason)
            elif len(info.shape) == 2:
                match = _EXPERT.fullmatch(name)
                if match is not None and len(match["index"]) < 6:
                    experts[match["home"], match["parameter"]][int(match["index"])] = info.shape
                home, _, parameter = name.rpartition(".")
                self._matrices[parameter].add(home, _Place((info.shape[0], info.shape[1]), None))
        for (home, parameter), members in experts.items():
            shapes = set(members.values())
            if len(shapes) == 1 and members.keys() == set(range(len(members))):
                rows, columns = shapes.pop()
                self._experts[parameter].add(home, _Place((rows, columns), len(members)))

    def find(self, home: str, parameter: str) -> _Place | None:
        """The parameter of a module, which may stand under another prefix."""
        for places in (self._experts, self._matrices):
            place = places[parameter].nearest(home) if parameter in places else None
            if place is not None:
                return place
        return None

    def why_not(self, group: list[StackUpdate]) -> str | None:
        """Why the base's form of one of the parameters is not read, where that is so."""
        for name in (target for update in group for target in update.targets):
            for ending in _endings(name):
                if ending.count(".") >= 2 and ending in self._unreadable:
                    return self._unreadable[ending]
        return None


class _ByEnding:
    """Parameters of one name by what their modules' names end in."""

    def __init__(self) -> None:
        self._places: dict[str, set[_Place]] = defaultdict(set)

    def add(self, home: str, place: _Place) -> None:
        for ending in _endings(home):
            if len(self._places[ending]) < 2:
                self._places[ending].add(place)

    def nearest(self, home: str) -> _Place | None:
        """That of the module whose name shares most with this one, from the end; None where several do that differ."""
        for ending in _endings(home):
            places = self._places.get(ending)
            if places:
                return next(iter(places)) if len(places) == 1 else None
        return None


def _endings(name: str) -> list[str]:
    """The name, and what is left of it as its first parts are taken off one by one, up to so many."""
    parts = name.split(".")[-DEEPEST:]
    return [".".join(parts[at:]) for at in range(len(parts))]
