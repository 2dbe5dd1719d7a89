"""What a path holds and how it would be read, from headers and configs alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Unpack

from spectra.adapters import formula_of, lying_beside, plan_updates, uses_initial, without_options
from spectra.errors import CorruptFileError, SpectraError, UnsafeFileError, UsageError
from spectra.pairing.fused import split_apart
from spectra.pairing.pairs import pair_layers
from spectra.pairing.precision import caveat, quantised_as
from spectra.records.inspection import Inspection
from spectra.runs.options import InspectOptions, patterns_of, takes_options
from spectra.sources.live import Source, said_of
from spectra.sources.resolve import Access, open_base, open_base_of, open_tuned


@takes_options(InspectOptions)
def inspect(tuned: Source, base: Source | None = None, **options: Unpack[InspectOptions]) -> Inspection:
    """What a fine-tune or a model holds and how it would be read, from headers and configs alone.

    Parameters
    ----------
    tuned, base : as for :func:`spectra.audit`; where a base is named or found, updates are matched with its weights.
    {options}

    Raises
    ------
    SpectraError : the path itself cannot be read, or holds a method that cannot be.
    """
    access = Access(options["allow_pickle"], options["local_files_only"])
    initial_adapter, split_fused = options["initial_adapter"], options["split_fused"]
    include, exclude = (patterns_of(name, options[name]) for name in ("include", "exclude"))
    checkpoint = without_options(open_tuned(tuned, access), patterns_of("ignore_options", options["ignore_options"]))
    initial = open_tuned(initial_adapter, access) if initial_adapter is not None else None
    if split_fused:
        checkpoint = split_apart(checkpoint, checkpoint)[1]
    plan = plan_updates(checkpoint, initial)
    if initial_adapter is not None and not uses_initial(plan):
        raise UsageError(
            f"{said_of(initial_adapter)}: {checkpoint.path} has no initialisation that needs an initial adapter"
        )
    base_path, problem, pairs, skipped, listed = None, None, {}, plan.skipped, plan.updates
    precision: str | None = None
    if base is not None or checkpoint.adapter_config is not None:
        try:
            opened = open_base_of(checkpoint, access) if base is None else open_base(base, access)
            base_path = str(opened.path)
            precision = caveat(opened, checkpoint, plan)
            if split_fused:
                opened = split_apart(opened, checkpoint)[0]
            pairing = pair_layers(opened, checkpoint, plan, include=include, exclude=exclude)
            # Tensors may serve several modules; those whose names the base alone tells are found by their tensors.
            pairs = {(name, pair.update.tensors): pair for pair in pairing.pairs for name in (None, pair.name)}
            skipped = pairing.skipped
            listed = pairing.plan.updates  # with one for each expert of a stack and each part of what is split
        except SpectraError as error:
            broken = base_path is None or isinstance(error, CorruptFileError | UnsafeFileError)
            if base is not None and not isinstance(error, UsageError) and broken:
                raise
            problem = str(error)
    updates = []
    for update in listed:
        pair = pairs.get((None if getattr(update, "component", "") else update.module, update.tensors))
        shape = pair.shape if pair else update.shape
        updates.append({
            "module": update.module, "kind": update.kind, "formula": formula_of(update),
            "rank": update.rank, "alpha": update.alpha, "scaling": update.scaling, "parameters": update.parameters,
            "shape": list(shape) if shape else None, "role": pair.role if pair else None,
            "base_tensor": pair.base.name if pair else None,
            "layout": pair.layout if pair else update.layout, "notes": list(pair.notes) if pair else [],
        })  # fmt: skip
    infos = checkpoint.tensors.values()
    used = {name for update in plan.updates for name in update.tensors}
    return Inspection(
        path=str(checkpoint.path),
        layout=checkpoint.layout,
        format=plan.format,
        files=tuple(file.name for file in checkpoint.files),
        tensors=tuple({"name": i.name, "dtype": i.dtype, "shape": list(i.shape)} for i in infos),
        dtypes=dict(Counter(info.dtype for info in infos)),
        not_read=tuple(sorted({info.dtype for info in infos if not info.is_float and info.name not in used})),
        quantised=quantised_as(checkpoint),
        parameters=sum(info.size for info in infos),
        facts=dict(plan.facts),
        updates=tuple(updates),
        skipped=tuple(asdict(item) for item in skipped),
        base=base_path,
        problem=problem,
        caveat=precision,
        beside=tuple(item.name for item in lying_beside(checkpoint, plan)),
    )
