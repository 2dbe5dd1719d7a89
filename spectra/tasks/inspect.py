"""What a path holds and how it would be read, from headers and configs alone."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectra.adapters import formula_of, plan_updates, uses_initial
from spectra.errors import CorruptFileError, SpectraError, UnsafeFileError, UsageError, in_one_line
from spectra.files.checkpoint import PICKLE_SUFFIXES, TRAINING_STATE, Checkpoint
from spectra.pairing.fused import split_apart
from spectra.pairing.pairs import pair_layers
from spectra.pairing.precision import caveat, quantised_as
from spectra.render.columns import grouped_notes
from spectra.sources.live import Source, said_of
from spectra.sources.resolve import Access, open_base, open_base_of, open_tuned

SHOWN_BESIDE = 5


@dataclass(frozen=True)
class Inspection:
    """What was found at a path.

    ``updates`` are the layers an audit would analyse, with the base weight each belongs to where a
    base was found; ``problem`` says why a base could not be matched, ``caveat`` what the base's precision means, and
    ``beside`` names what else in the folder holds weights, which is not read.
    """

    path: str
    layout: str
    format: str
    files: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]
    dtypes: dict[str, int]
    not_read: tuple[str, ...]
    quantised: str | None
    parameters: int
    facts: dict[str, Any]
    updates: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    base: str | None
    problem: str | None
    caveat: str | None = None
    beside: tuple[str, ...] = ()


def inspect(
    path: Source,
    base: Source | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split_fused: bool = False,
    allow_pickle: bool = False,
    local_files_only: bool = False,
    initial_adapter: Source | None = None,
) -> Inspection:
    """Reads headers and configs of a path, or what a model in memory has of them, and of its base where there is one.

    Raises
    ------
    SpectraError : the path itself cannot be read, or holds a method that cannot be.
    """
    access = Access(allow_pickle, local_files_only)
    checkpoint = open_tuned(path, access)
    initial = open_tuned(initial_adapter, access) if initial_adapter is not None else None
    if split_fused:
        checkpoint = split_apart(checkpoint, checkpoint)[1]
    plan = plan_updates(checkpoint, initial)
    if initial_adapter is not None and not uses_initial(plan):
        raise UsageError(
            f"{said_of(initial_adapter)}: {checkpoint.path} has no initialisation that needs an initial adapter"
        )
    found_base, problem, pairs, skipped, listed = None, None, {}, plan.skipped, plan.updates
    precision: str | None = None
    if base is not None or checkpoint.adapter_config is not None:
        try:
            opened = open_base_of(checkpoint, access) if base is None else open_base(base, access)
            found_base = str(opened.path)
            precision = caveat(opened, checkpoint, plan)
            if split_fused:
                opened = split_apart(opened, checkpoint)[0]
            pairing = pair_layers(opened, checkpoint, plan, include=include, exclude=exclude)
            # Tensors may serve several modules; those whose names the base alone tells are found by their tensors.
            pairs = {(name, pair.update.tensors): pair for pair in pairing.pairs for name in (None, pair.name)}
            skipped = pairing.skipped
            listed = pairing.plan.updates  # with one for each expert of a stack and each part of what is split
        except SpectraError as error:
            broken = found_base is None or isinstance(error, CorruptFileError | UnsafeFileError)
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
        base=found_base,
        problem=problem,
        caveat=precision,
        beside=beside(checkpoint),
    )


def beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What holds weights in the folder that was read, besides what was; folders' names end in a slash."""
    if not checkpoint.path.is_dir():
        return ()
    read = {file.resolve() for file in checkpoint.files}
    found = []
    with contextlib.suppress(OSError):  # what may not be listed
        for path in sorted(checkpoint.path.iterdir()):
            if path.is_dir():
                if not any(path.resolve() in file.parents for file in read) and any(map(_has_weights, path.iterdir())):
                    found.append(f"{path.name}/")
            elif _has_weights(path) and path.resolve() not in read:
                found.append(path.name)
    return tuple(found)


def in_words(names: Sequence[str]) -> str:
    """The first of the names of files and folders, and how many more there are."""
    more = len(names) - SHOWN_BESIDE
    return ", ".join([*(in_one_line(name, 80) for name in names[:SHOWN_BESIDE]), *([f"{more} more"] * (more > 0))])


def _has_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf", *PICKLE_SUFFIXES) and not TRAINING_STATE.match(path.name)


def to_json(found: Sequence[Inspection]) -> str:
    """A JSON array, one object a path."""
    return json.dumps([asdict(item) for item in found], indent=1) + "\n"


def render_inspection(found: Sequence[Inspection], *, verbose: bool = False) -> str:
    """For people."""
    return "\n".join(_render(item, verbose) for item in found)


def _render(item: Inspection, verbose: bool) -> str:
    size = ", ".join(f"{count} × {dtype}" for dtype, count in sorted(item.dtypes.items()))
    lines = [
        item.path,
        f"  holds      {item.layout}"
        + (f", {len(item.files)} file{'s' * (len(item.files) != 1)}" if item.files else ""),
        f"  tensors    {len(item.tensors)} ({size}), {item.parameters:,} values",
        f"  read as    {item.format}",
    ]
    if item.quantised and item.updates:
        lines.append(f"  stored as  {item.quantised}: read as the weights that it stands for")
    facts = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in item.facts.items()
        if value not in (None, False) and key not in ("base_model_name_or_path", "conditional")
    ]
    if facts:
        lines.append(f"  with       {', '.join(facts)}")
    if item.facts.get("conditional"):
        lines.append("  active     on some tokens only: those after its invocation tokens (aLoRA)")
    named = item.facts.get("base_model_name_or_path")
    if item.base:
        lines.append(f"  base       {item.base}" + (f"  (named {named!r})" if named else ""))
    elif named:
        lines.append(f"  base       named {named!r}")
    if item.caveat:
        lines.append(f"             note: {item.caveat}")
    if item.problem:
        lines.append(f"  problem    {item.problem}")
    matched = sum(update["base_tensor"] is not None for update in item.updates)
    kinds = Counter(update["kind"].replace("_", " ") for update in item.updates)
    formulas = Counter((update["formula"], update["scaling"]) for update in item.updates)
    what = "matrices" if item.format == "full" else "updates "
    line = f"  {what}   {len(item.updates)} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"
    lines.append(
        line + (f", {matched} matched with the base" if item.base else "")
        if item.updates
        else f"  {what}   none that can be read"
    )
    for (formula, scaling), count in formulas.most_common():
        s = f", s = {scaling:g}" if scaling is not None and "s·" in formula else ""
        lines.append(f"  formula    {f'{count} × ' if len(formulas) > 1 else ''}{formula}{s}")
    said = " ".join(entry["reason"] for entry in item.skipped)
    not_read = [dtype for dtype in item.not_read if f"stored as {dtype}" not in said]
    if not_read:
        lines.append(f"  not read   tensors of dtype {', '.join(not_read)}")
    notes = grouped_notes((update["module"], update["notes"]) for update in item.updates)
    lines += [f"  note       {note}" for note in notes]
    for reason, count in Counter(entry["reason"] for entry in item.skipped).most_common():
        lines.append(f"  skipped    {count} × {reason}")
    if item.beside:
        lines.append(f"  not read   also here: {in_words(item.beside)}")
    if verbose:
        for update in item.updates:
            parts = [update["module"], update["kind"], update["shape"] or "", update["base_tensor"] or ""]
            lines.append("    " + "  ".join(str(part) for part in parts if part))
        for tensor in item.tensors:
            lines.append(f"    {tensor['name']}  {tensor['dtype']} {tensor['shape']}")
    return "\n".join(lines) + "\n"
