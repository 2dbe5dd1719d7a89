"""LoRA of PEFT whose initialisation changed the base: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ.

Such an adapter belongs to what was left of the base, which nobody keeps.  What was taken out is computed from the base
again where it follows from that, and else read from the adapter as it was before training.  As peft 0.21 has it,
embeddings are left as they were; so are convolutions by LoRA-GA, and the others have no form for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.adapters.peft.lora import NEUTRAL_INIT, LoraUpdate, PeftAdapter
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived, Weight
from spectra.files.orientation import TIED, Layout
from spectra.files.values import HALVES, half_precision

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import LowRank, RowScaled
    from spectra.updates.initialisation import Reinitialised, Taken

FROM_BASE = ("pissa", "olora")
WITH_INITIAL = ("pissa_niter_", "corda", "lora_ga")

LEFT = (
    'if --base is what was left of the model (a "residual" one), set "init_lora_weights": true in a copy of the '
    "adapter's config"
)


@dataclass(frozen=True)
class InitialisedUpdate(LoraUpdate):
    """A LoRA of what its initialisation, ``how``, left of the base.

    ``initial`` is its update before training, in an adapter of its own; ``stored`` the base weight's dtype, once known.
    """

    how: str = ""
    initial: tuple[Checkpoint, LoraUpdate] | None = None
    stored: str | None = None

    @property
    def formula(self) -> str:
        own = "W0 − s·B₀·A₀ + s·B·A"
        if self.magnitude is None:
            return f"W1 = {own}, with B₀·A₀ from before training"
        return f"W1 = m/‖X‖ ⊙ X, norms by row, X = {own}, with B₀·A₀ from before training"

    def on(self, base: Weight) -> PlannedUpdate | Skipped:
        """The update for a base weight; :class:`Skipped` where the initialisation cannot be computed for it."""
        if isinstance(base, Derived) and base.quantised:
            return Skipped(
                self.module,
                f"{self.how} took something out of its base weight, which was quantised ({base.quantised}) after that: "
                f"what was left is not known; {LEFT}",
                "not_read",
                self.parameters,
            )
        if base.name.endswith(TIED):
            raise UnsupportedMethodError(
                self.A.file,
                f"{self.how} took something out of a head that shares its weight with the embedding, which then "
                "changed as well: this version cannot read that",
                self.A.name,
            )
        if base.name.endswith("in_proj_weight") or self.layout == "conv":
            raise UnsupportedMethodError(self.A.file, f"peft has no {self.how} for this kind of module", self.A.name)
        # The copy that may lie beside the factors is of what was left of the weight.
        notes = self.notes
        if base.dtype in HALVES:
            notes += (f"what was left of the base weight is rounded to {base.dtype}, as it is stored",)
            if self.initial is not None and self.how in FROM_BASE:
                notes += ("what was taken out is computed where the adapter before training holds it less exactly",)
        return replace(self, stored=base.dtype, base_copy=None, notes=notes)

    def read(  # type: ignore[override]
        self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> LowRank | RowScaled | Reinitialised:
        from spectra.updates.initialisation import Reinitialised

        update = super().read(checkpoint, layout, rows, dtype, device)
        return Reinitialised(
            update,
            self._taken(layout, rows, dtype, device),
            lambda reason: AdapterError(self.A.file, reason, self.A.name),
            half_precision(self.stored),
            # peft takes the weight as it is stored, which is the other way round for Conv1D.
            turned=self.how == "olora" and layout == "conv1d",
            from_base=self.initial is None,
        )

    def _taken(
        self, layout: Layout, rows: int | None, dtype: torch.dtype, device: str
    ) -> Callable[[torch.Tensor], Taken]:
        from spectra.updates.initialisation import Taken, as_saved, surer

        if self.initial is None:
            return self._computed()
        checkpoint, before = self.initial
        first = replace(before, magnitude=None).read(checkpoint, layout, rows, dtype, device)
        if self.how == "lora_ga":  # which rounds its factors before their product is taken out
            return lambda W: Taken(first.B * first.scaling, first.A)
        saved = as_saved(first.B, first.A, first.scaling)
        if not saved.error or self.how not in FROM_BASE:
            return lambda W: saved
        compute = self._computed()
        return lambda W: surer(compute(W), saved)

    def _computed(self) -> Callable[[torch.Tensor], Taken]:
        from spectra.updates.initialisation import leading, of_first_columns

        if self.how == "pissa":
            return lambda W: leading(W, self.rank)

        def olora(W: torch.Tensor) -> Taken:
            taken = of_first_columns(W, self.rank)
            return replace(taken, B=taken.B * self.scaling, error=taken.error * abs(self.scaling))

        return olora


def with_initial(plan: Plan, tuned: Checkpoint, initial: Checkpoint | None) -> Plan:
    """The plan of a PEFT LoRA with what its initialisation took out of the base.

    ``initial`` is the adapter as it was before training.

    Raises
    ------
    UnsupportedMethodError : an initialisation that is not known, or that cannot be computed from the base alone.
    AdapterError : ``initial`` has other modules, shapes or scalings.
    """
    config = tuned.adapter_config_file
    how = initialisation_of(config, tuned)
    if how is None:
        return plan
    changed = {
        item.module: item
        for item in plan.updates
        if isinstance(item, LoraUpdate) and item.layout != "embedding" and (item.layout != "conv" or how != "lora_ga")
    }
    if how not in FROM_BASE and initial is None and changed:
        raise UnsupportedMethodError(
            config,
            f"init_lora_weights = {how!r} took something out of the base that cannot be computed from it; give the "
            "adapter as it was saved before training (audit, compare, plot, ranks and inspect take it as "
            f"--initial-adapter), or {LEFT}",
        )
    if plan.sharing:
        raise UnsupportedMethodError(config, f"layer_replication with init_lora_weights = {how!r} cannot be read")
    earlier: dict[str, LoraUpdate] = {}
    if initial is not None:
        if initial.adapter_config is None:
            raise UsageError(f"{initial.path}: this is no PEFT adapter, which the initial one has to be")
        if initial.place == tuned.place:
            raise UsageError(f"{tuned.path}: the initial adapter is this adapter itself, not as it was before training")
        earlier = {item.module: item for item in PeftAdapter().plan(initial).updates if isinstance(item, LoraUpdate)}
    initialised: dict[str, PlannedUpdate] = {}
    for module, item in changed.items():
        if how == "pissa" and initial is None and item.scaling <= 0:
            raise AdapterError(config, f"PiSSA with a scaling of {item.scaling:g}; expected more than 0")
        before = None if initial is None else (initial, _before(item, earlier, initial.path))
        own = {field.name: getattr(item, field.name) for field in fields(LoraUpdate)}
        source = "computed from it" if initial is None else "read from the adapter before training"
        note = f"{how} took a part out of the base weight before training: {source}"
        initialised[module] = InitialisedUpdate(**{**own, "notes": (*item.notes, note)}, how=how, initial=before)
    updates = tuple(
        initialised.get(item.module, item) if isinstance(item, LoraUpdate) else item for item in plan.updates
    )
    return replace(plan, updates=updates)


def _before(item: LoraUpdate, earlier: dict[str, LoraUpdate], path: Path) -> LoraUpdate:
    before = earlier.get(item.module)
    if before is None:
        raise AdapterError(path, f"the initial adapter has no LoRA of {item.module!r}, which {item.A.file} has")
    for mine, theirs in ((item.A, before.A), (item.B, before.B)):
        if mine.shape != theirs.shape:
            raise AdapterError(
                theirs.file,
                f"its shape is {list(theirs.shape)}, that of the trained one {list(mine.shape)}",
                theirs.name,
            )
    if before.scaling != item.scaling:
        raise AdapterError(
            path, f"the initial adapter's scaling of {item.module!r} is {before.scaling:g}, the trained one's "
            f"{item.scaling:g}",
        )  # fmt: skip
    return before


def initialisation_of(config: Path, tuned: Checkpoint) -> str | None:
    """How a PEFT LoRA's initialisation changed the base, by its config; None where it did not.

    Raises
    ------
    UnsupportedMethodError : it is not known, or what it left of the base cannot be computed.
    """
    values = tuned.adapter_config or {}
    if values.get("peft_type") != "LORA":
        return None
    init = values.get("init_lora_weights", True)
    if any(init is value or init == value for value in NEUTRAL_INIT):
        return None
    name = init.lower() if isinstance(init, str) and init.lower() == "olora" else init
    if isinstance(name, str) and (name in FROM_BASE or name.startswith(WITH_INITIAL)):
        return name
    if name == "loftq":
        raise UnsupportedMethodError(
            config,
            "init_lora_weights = 'loftq': LoftQ quantised the base as well, so that the weights this adapter belongs "
            "to follow neither from the base nor from the initial adapter; give the model that LoftQ saved, with the "
            'quantised values, as --base, and set "init_lora_weights": true in a copy of the adapter\'s config',
        )
    raise UnsupportedMethodError(
        config,
        f"init_lora_weights = {str(init)[:80]!r} is none that this version knows; if it left the base as it was, or "
        f"{LEFT.removeprefix('if ')}",
    )


def uses_initial(plan: Plan) -> bool:
    """Whether something of a plan is read from an initial adapter."""
    return any(isinstance(item, InitialisedUpdate) and item.initial is not None for item in plan.updates)
