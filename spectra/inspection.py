"""What a path holds and how it would be read, from headers and configs alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectra.adapters import plan_updates
from spectra.checkpoint import BYTES_PER_ELEMENT
from spectra.errors import SpectraError, UsageError
from spectra.layers import pair_layers
from spectra.resolve import open_base, open_base_of, open_tuned


@dataclass(frozen=True)
class Inspection:
    """What was found at a path.

    ``updates`` are the layers an audit would analyse, with the base weight each belongs to where a
    base was found; ``problem`` says why a base could not be matched.
    """

    path: str
    layout: str
    format: str
    files: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]
    dtypes: dict[str, int]
    parameters: int
    facts: dict[str, Any]
    updates: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    base: str | None
    problem: str | None


def inspect(
    path: str | Path,
    base: str | Path | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Inspection:
    """Reads headers and configs of a path and, where there is one, of its base.

    Raises
    ------
    SpectraError : the path itself cannot be read, or holds a method that cannot be.
    """
    checkpoint = open_tuned(path)
    plan = plan_updates(checkpoint)
    found_base, problem, pairs, skipped = None, None, {}, plan.skipped
    if base is not None or checkpoint.adapter_config is not None:
        try:
            opened = open_base_of(checkpoint) if base is None else open_base(base)
            found_base = str(opened.path)
            pairing = pair_layers(opened, checkpoint, plan, include=include, exclude=exclude)
            pairs = {pair.update.tensors: pair for pair in pairing.pairs}
            skipped = pairing.skipped
        except SpectraError as error:
            if base is not None and not isinstance(error, UsageError) and found_base is None:
                raise
            problem = str(error)
    updates = []
    for update in plan.updates:
        pair = pairs.get(update.tensors)
        shape = pair.shape if pair else update.shape
        updates.append({
            "module": update.module, "kind": update.kind, "rank": update.rank, "alpha": update.alpha,
            "scaling": update.scaling, "parameters": update.parameters,
            "shape": list(shape) if shape else None, "role": pair.role if pair else None,
            "base_tensor": pair.base.name if pair else None,
            "layout": pair.layout if pair else update.layout, "notes": list(pair.notes) if pair else [],
        })  # fmt: skip
    infos = checkpoint.tensors.values()
    return Inspection(
        path=str(checkpoint.path),
        layout=checkpoint.layout,
        format=plan.format,
        files=tuple(file.name for file in checkpoint.files),
        tensors=tuple({"name": i.name, "dtype": i.dtype, "shape": list(i.shape)} for i in infos),
        dtypes=dict(Counter(info.dtype for info in infos)),
        parameters=sum(info.size for info in infos),
        facts=dict(plan.facts),
        updates=tuple(updates),
        skipped=tuple(asdict(item) for item in skipped),
        base=found_base,
        problem=problem,
    )


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
        f"  holds      {item.layout}, {len(item.files)} file{'s' * (len(item.files) != 1)}",
        f"  tensors    {len(item.tensors)} ({size}), {item.parameters:,} values",
        f"  read as    {item.format}",
    ]
    facts = [
        f"{key} {value}"
        for key, value in item.facts.items()
        if value not in (None, False) and key != "base_model_name_or_path"
    ]
    if facts:
        lines.append(f"  with       {', '.join(facts)}")
    named = item.facts.get("base_model_name_or_path")
    if item.base:
        lines.append(f"  base       {item.base}" + (f"  (named {named!r})" if named else ""))
    elif named:
        lines.append(f"  base       named {named!r}")
    if item.problem:
        lines.append(f"  problem    {item.problem}")
    matched = sum(update["base_tensor"] is not None for update in item.updates)
    kinds = Counter(update["kind"].replace("_", " ") for update in item.updates)
    what = "matrices" if item.format == "full" else "updates "
    line = f"  {what}   {len(item.updates)} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"
    lines.append(line + (f", {matched} matched with the base" if item.base else ""))
    unreadable = sorted(dtype for dtype in item.dtypes if dtype not in BYTES_PER_ELEMENT)
    if unreadable:
        lines.append(f"  not read   tensors of dtype {', '.join(unreadable)}")
    for reason, count in Counter(entry["reason"] for entry in item.skipped).most_common():
        lines.append(f"  skipped    {count} × {reason}")
    if verbose:
        for update in item.updates:
            parts = [update["module"], update["kind"], update["shape"] or "", update["base_tensor"] or ""]
            lines.append("    " + "  ".join(str(part) for part in parts if part))
        for tensor in item.tensors:
            lines.append(f"    {tensor['name']}  {tensor['dtype']} {tensor['shape']}")
    return "\n".join(lines) + "\n"
