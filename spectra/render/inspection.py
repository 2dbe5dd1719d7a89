"""An inspection as text or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from spectra.errors import in_one_line
from spectra.records.inspection import Inspection
from spectra.render.columns import grouped_notes

SHOWN_BESIDE = 5


def in_words(names: Sequence[str]) -> str:
    """The first of the names of files and folders, and how many more there are."""
    more = len(names) - SHOWN_BESIDE
    return ", ".join([*(in_one_line(name, 80) for name in names[:SHOWN_BESIDE]), *([f"{more} more"] * (more > 0))])


def to_json(inspections: Sequence[Inspection]) -> str:
    """A JSON array, one object a path."""
    return json.dumps([asdict(item) for item in inspections], indent=1) + "\n"


def render_inspection(inspections: Sequence[Inspection], *, verbose: bool = False) -> str:
    """For people."""
    return "\n".join(_render(item, verbose) for item in inspections)


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
