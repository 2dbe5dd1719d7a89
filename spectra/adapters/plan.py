"""What a dialect hands on: which update belongs to which module, known from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spectra.files.checkpoint import Checkpoint
from spectra.files.orientation import Layout

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Update

# low_rank: B·A; row_scaled and column_scaled: DoRA by either side; hadamard: LoHa; kronecker: LoKr; scaled: IA3's rows
# or columns; rotated: OFT, BOFT; mixed: GLoRA; replaced_rows: trainable tokens; added: dW stored whole; by_peft: what
# peft itself merges; dense: a tensor stored whole
UpdateKind = Literal[
    "low_rank",
    "row_scaled",
    "column_scaled",
    "hadamard",
    "kronecker",
    "scaled",
    "rotated",
    "mixed",
    "replaced_rows",
    "added",
    "by_peft",
    "dense",
]

# How dW = W1 - W0 follows from what is stored; s is the update's scaling.  See formula_of.
FORMULAS: dict[UpdateKind, str] = {
    "low_rank": "dW = s·B·A",
    "row_scaled": "W1 = m/‖W0 + s·B·A‖ ⊙ (W0 + s·B·A), norms by row",
    "column_scaled": "W1 = (W0 + s·B·A) ⊙ m/‖W0 + s·B·A‖, norms by column",
    "hadamard": "dW = s·(B₁·A₁) ⊙ (B₂·A₂)",
    "kronecker": "dW = s·(C ⊗ D)",
    "scaled": "W1 = l ⊙ W0, by row or column",
    "rotated": "W1 = W0 with its input or output rotated by R",
    "replaced_rows": "W1 = W0 with the rows of some tokens replaced",
    "mixed": "dW = s·(W0·A₁·A₂ + B₁·B₂)",
    "added": "dW, stored whole",
    "by_peft": "W1 as peft merges it into W0",
    "dense": "dW = W1 - W0, both stored whole",
}


class PlannedUpdate(Protocol):
    """One update that a checkpoint holds, not yet read.

    Attributes
    ----------
    module : the module's name as the fine-tune calls it.
    targets : names the base's tensor may have, most likely first.
    tensors : the names of all tensors this update consumes.
    layout : the layout the base must have, or None where the base decides.
    shape : (out, in) as analysed, or None where the base decides.
    """

    @property
    def module(self) -> str: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def tensors(self) -> tuple[str, ...]: ...
    @property
    def kind(self) -> UpdateKind: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def shape(self) -> tuple[int, int] | None: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def scaling(self) -> float | None: ...
    @property
    def parameters(self) -> int: ...
    @property
    def may_be_new(self) -> bool: ...  # a module the base need not have
    @property
    def kernel(self) -> tuple[int, ...]: ...  # of a convolution's update, else ()
    @property
    def notes(self) -> tuple[str, ...]: ...  # what a reader of the report should know
    @property
    def base_copy(self) -> str | None: ...  # a copy of the base weight stored beside the update
    def read(
        self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> Update: ...


def formula_of(update: PlannedUpdate) -> str:
    """How dW, or W1, follows from what is stored: the update's own ``formula`` where it has one, else its kind's."""
    own: str | None = getattr(update, "formula", None)
    return own if own is not None else FORMULAS[update.kind]


def rescales_base(update: PlannedUpdate) -> bool:
    """Whether an update is DoRA, of whatever change, so that dW also holds the rescaling of W0."""
    whole = getattr(update, "whole", update)  # of which it may be some rows
    return whole.kind in ("row_scaled", "column_scaled") or getattr(whole, "dora", None) is not None


# What is not analysed: the user left it out; it has no spectrum; the base has nothing that it could change; it is no
# update at all (a copy, a trainer's record); its base weight was not found; it could not be read.
Kind = Literal["left_out", "without_spectrum", "new", "no_update", "not_placed", "not_read"]
VECTOR = "not a matrix: a vector or scalar has no spectrum"


@dataclass(frozen=True)
class Skipped:
    """A tensor or module that is not analysed, and why; ``parameters`` is its number of values, where it is known."""

    name: str
    reason: str
    kind: Kind
    parameters: int | None = None


@dataclass(frozen=True)
class AddedToBias:
    """A vector that is added, times ``scaling``, to the bias of a module whose weight has an update.

    ``update`` is that update's first tensor, by which it is known whatever the base calls the module.
    """

    tensor: str
    update: str
    scaling: float


@dataclass(frozen=True)
class Plan:
    """Everything a fine-tuned checkpoint holds: each tensor is in an update or skipped.

    ``facts`` describes the fine-tune for the report (rank, alpha and so on); ``complete`` says
    that the checkpoint is a whole model, so that what only the base has is worth naming.  Modules named in ``sharing``
    may have one weight of the base in common.  ``biases`` says what some skipped tensors change; what PEFT keeps beside
    its factors is found by its own names, and what else other adapters hold changes what is not known.
    """

    format: str
    updates: tuple[PlannedUpdate, ...]
    skipped: tuple[Skipped, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    sharing: frozenset[str] = frozenset()
    biases: tuple[AddedToBias, ...] = ()


class Dialect(Protocol):
    """How one kind of writer names and stores its updates; one file each, one registry line.

    ``reads`` is what it reads, for the documentation: what is written, and how the tuned weight follows.
    """

    name: str

    @property
    def reads(self) -> tuple[tuple[str, str], ...]: ...
    def recognises(self, tuned: Checkpoint) -> bool: ...
    def plan(self, tuned: Checkpoint) -> Plan: ...
