"""Updates of projections that share a matrix, split as the base's matrix is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.adapters import InitialisedUpdate, Plan, PlannedUpdate, against_base, formula_of, plan_updates
from spectra.adapters.peft.vera import VeraUpdate
from spectra.adapters.plan import UpdateKind
from spectra.errors import UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived, Weight
from spectra.files.orientation import Layout
from spectra.files.stored.rows import Part, Rows
from spectra.pairing.names import NameMatcher

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Update

# Updates of which some rows of W1 follow from the same rows of W0.
BY_ROWS: frozenset[UpdateKind] = frozenset({"low_rank", "row_scaled", "hadamard", "scaled", "added", "dense"})
NO_ROWS = "--split-fused cannot split the update of"


@dataclass(frozen=True)
class SplitUpdate:
    """The rows of an update that belong to one of several projections; A·x is shared, B has its own rows.

    ``whole`` is the update of the fused matrix, stored as ``stored_as`` says.
    """

    module: str
    targets: tuple[str, ...]
    whole: PlannedUpdate
    rows: Rows
    shape: tuple[int, int]
    stored_as: Layout
    layout: Layout | None = "linear"
    kernel: tuple[int, ...] = ()
    base_copy: str | None = None  # the copy of the base that may lie beside it is of the fused matrix
    may_be_new: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.whole.tensors

    @property
    def kind(self) -> UpdateKind:
        return self.whole.kind

    @property
    def formula(self) -> str:
        return formula_of(self.whole)

    @property
    def rank(self) -> int | None:
        return self.whole.rank

    @property
    def alpha(self) -> float | None:
        return self.whole.alpha

    @property
    def scaling(self) -> float | None:
        return self.whole.scaling

    @property
    def parameters(self) -> int:
        """Its share of the values, by its rows."""
        return round(self.whole.parameters * self.rows.count / self.rows.total)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.whole.notes, f"its update is {self.rows} of that of {self.whole.module}")

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Update:
        update = _rows_of(self.whole.read(checkpoint, self.stored_as, None, dtype, device), self.rows)
        if update is None:
            raise UnsupportedMethodError(checkpoint.path, f"{NO_ROWS} {self.whole.module!r}", self.tensors[0])
        return update


def _rows_of(update: Update, rows: Rows) -> Update | None:
    from spectra.updates.algebra import Added, Dense, Hadamard, LowRank, RowScaled, Scaled, SharedLowRank
    from spectra.updates.multiplied import Normed

    if isinstance(update, Normed):
        change = None if update.columns else _rows_of(update.change, rows)
        return None if change is None else replace(update, change=change, magnitude=rows.of(update.magnitude))
    if isinstance(update, RowScaled):
        return replace(update, B=rows.of(update.B), magnitude=rows.of(update.magnitude))
    if isinstance(update, LowRank | SharedLowRank):
        return replace(update, B=rows.of(update.B))
    if isinstance(update, Hadamard):
        return replace(update, B1=rows.of(update.B1), B2=rows.of(update.B2))
    if isinstance(update, Scaled):
        return update if update.rows is None else replace(update, rows=rows.of(update.rows))
    if isinstance(update, Dense):
        return replace(update, W1=rows.of(update.W1))
    return replace(update, dW=rows.of(update.dW)) if isinstance(update, Added) else None


def split_apart(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both with projections that share a matrix split: a whole model by its own config, or else by the base's.

    What an adapter holds is split once its base is known, by :func:`against_split`.
    """
    if tuned.adapter_config is None and plan_updates(tuned).complete:
        tuned = replace(tuned, split_fused=True, config=tuned.config or base.config)
    return replace(base, split_fused=True), tuned


def against_split(plan: Plan, base: Checkpoint) -> Plan:
    """The plan found among a base's names, its updates split where the base's projections are.

    Raises
    ------
    WrongBaseError : as :func:`spectra.adapters.against_base` does.
    UnsupportedMethodError : an update of which no rows can be taken.
    """
    if not base.split_fused or plan.complete:  # whole models are split themselves
        return against_base(plan, base)
    fused = replace(base, split_fused=False)
    parts: dict[str, list[Derived]] = defaultdict(list)
    for info in base.derived.values():
        if isinstance(info, Derived) and info.part_of is not None and info.part_of in fused.weights:
            parts[info.part_of].append(info)
    plan = against_base(plan, fused, base.weights)
    matcher = NameMatcher(fused, plan.updates)
    updates: list[PlannedUpdate] = []
    sharing = set(plan.sharing)
    for update in plan.updates:
        weight = matcher.find(update)[0]
        made = _split(update, parts, weight) if weight is not None and weight.name in parts else [update]
        if update.module in plan.sharing:
            sharing |= {item.module for item in made}
        updates += made
    return replace(plan, updates=tuple(updates), sharing=frozenset(sharing))


def _split(update: PlannedUpdate, parts: Mapping[str, list[Derived]], fused: Weight) -> list[PlannedUpdate]:
    by_column = getattr(update, "dora", None) == "columns"  # whose norms are those of all rows together
    if update.kind not in BY_ROWS or by_column or isinstance(update, InitialisedUpdate | VeraUpdate):
        raise UnsupportedMethodError(
            fused.file,
            f"{NO_ROWS} {update.module!r} ({update.kind.replace('_', ' ')}{', DoRA by column' * by_column}): of its "
            "method, or its initialisation, rows cannot be taken",
            fused.name,
        )
    home = update.module.rpartition(".")[0] if "." in update.module else ""
    if fused.name.endswith("in_proj_weight"):  # its update stands under the name of the attention itself
        home = update.module
    made: list[PlannedUpdate] = []
    for info in parts[fused.name]:
        assert isinstance(info.make, Part)
        name = info.name.removesuffix(".weight").rpartition(".")[2]
        made.append(
            SplitUpdate(
                f"{home}.{name}" if home else name, (info.name,), update, info.make.rows,
                (info.shape[0], info.shape[1]), "conv1d" if info.make.turned else "linear",
            )
        )  # fmt: skip
    return made
