"""Dialects: how each kind of writer names and stores its updates.

To add one: a file here with a class that follows :class:`~spectra.adapters.plan.Dialect`, and a
line in ``DIALECTS``.  The tests over the registry then run on it by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from spectra.adapters.diffusers import DiffusersLora
from spectra.adapters.factors import StoredFactors, placed_in
from spectra.adapters.full import FullCheckpoint, WholeTensor
from spectra.adapters.gguf import GgufLora, with_heads
from spectra.adapters.kohya import KohyaLora
from spectra.adapters.mlx import MlxAdapter
from spectra.adapters.peft.fields import common
from spectra.adapters.peft.ignored import inert_options, without_options
from spectra.adapters.peft.initialised import InitialisedUpdate, uses_initial, with_initial
from spectra.adapters.peft.itself import PeftItself
from spectra.adapters.peft.lora import LoraUpdate, PeftAdapter
from spectra.adapters.peft.method import MethodUpdate
from spectra.adapters.peft.methods import PeftMethods
from spectra.adapters.peft.parameters import against_parameters
from spectra.adapters.plan import Dialect, Plan, PlannedUpdate, Skipped, formula_of, rescales_base
from spectra.adapters.unsupported import Unsupported
from spectra.adapters.xlabs import XlabsLora
from spectra.errors import CorruptFileError, UnsupportedMethodError
from spectra.files.beside import beside
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Weight

# The first that recognises a checkpoint reads it; FullCheckpoint takes what nobody else does.
DIALECTS: tuple[Dialect, ...] = (
    GgufLora(), MlxAdapter(), PeftMethods(), PeftItself(), PeftAdapter(), XlabsLora(), KohyaLora(),
    DiffusersLora(), Unsupported(), FullCheckpoint(),
)  # fmt: skip

__all__ = [
    "DIALECTS", "Dialect", "InitialisedUpdate", "MethodUpdate", "Plan", "PlannedUpdate", "Skipped",
    "StoredFactors", "WholeTensor", "against_base", "formula_of", "lying_beside", "plan_updates",
    "rescales_base", "uses_initial", "without_options",
]  # fmt: skip


def against_base(plan: Plan, base: Checkpoint, parts: Mapping[str, Weight] | None = None) -> Plan:
    """The plan with what only the base tells of its updates: which modules they are of, and their order of rows.

    ``parts`` are the weights that the base's are split into, if they are.

    Raises
    ------
    WrongBaseError : several weights of the base could be meant, or it does not tell what is needed.
    """
    return against_parameters(with_heads(placed_in(plan, base, parts), base), base)


def plan_updates(tuned: Checkpoint, initial: Checkpoint | None = None) -> Plan:
    """What a fine-tuned checkpoint changes, from its headers and config.

    ``initial`` is the adapter as it was before training, for initialisations that changed the base.

    Raises
    ------
    AdapterError : the adapter contradicts itself.
    CorruptFileError : a weight has no values.
    UnsupportedMethodError : a method or an option that this version cannot read; it is named.
    """
    for dialect in DIALECTS:
        if dialect.recognises(tuned):
            plan = dialect.plan(tuned)
            _refuse_empty(tuned, plan)
            aside = (Skipped(*item, "no_update") for item in tuned.aside.items())
            plan = replace(plan, skipped=(*plan.skipped, *aside, *inert_options(tuned)))
            plan = with_initial(plan, tuned, initial) if isinstance(dialect, PeftAdapter) else plan
            return _as_running(plan, tuned)
    raise AssertionError("FullCheckpoint recognises everything without an adapter config")


def _as_running(plan: Plan, tuned: Checkpoint) -> Plan:
    """The plan with the scalings that a running model has, where they are not those of its config."""
    if not tuned.rescaled:
        return plan
    updates = {update.module: update for update in plan.updates}
    for module, factor in tuned.rescaled.items():
        update = updates.get(module)
        said = f"{module} is scaled by {factor:g} in the running model, beyond what its config says"
        if not isinstance(update, LoraUpdate | MethodUpdate) or isinstance(update, InitialisedUpdate):
            raise UnsupportedMethodError(tuned.path, f"{said}, which is not read for such an update")
        updates[module] = update.rescaled(factor, said)
    facts = {**plan.facts, "scaling": common(update.scaling for update in updates.values() if update.kind != "dense")}
    return replace(plan, updates=tuple(updates[update.module] for update in plan.updates), facts=facts)


def lying_beside(tuned: Checkpoint, plan: Plan) -> Iterator[Skipped]:
    """What holds weights beside the files of a fine-tune that were read."""
    for item in beside(tuned, adapter=not plan.complete):
        yield Skipped(item.name, item.reason, "not_read" if item.trained else "no_update")


def _refuse_empty(tuned: Checkpoint, plan: Plan) -> None:
    """Refuses a tensor of floats without values, unless it is a factor, which its own dialect has looked at."""
    factors = {name for update in plan.updates if update.kind != "dense" for name in update.tensors}
    for name, info in tuned.tensors.items():
        if info.size == 0 and info.is_float and name not in factors:
            raise CorruptFileError(
                info.file,
                f"has no values (shape {list(info.shape)}), so this was saved incompletely. If DeepSpeed's ZeRO-3 "
                "wrote it: zero_to_fp32.py makes whole weights of its shards, and "
                "stage3_gather_16bit_weights_on_model_save saves them whole",
                name,
            )
