"""A PEFT adapter written again with the factors of some of its modules replaced."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectra.adapters.peft.initialised import InitialisedUpdate
from spectra.adapters.peft.lora import LoraUpdate
from spectra.adapters.peft.naming import ModuleNames
from spectra.adapters.peft.parameters import StackUpdate
from spectra.adapters.peft.tokens import TokensUpdate
from spectra.adapters.peft.writing import CONFIG, WEIGHTS
from spectra.adapters.plan import Plan, PlannedUpdate
from spectra.errors import UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.files.folders import CARD, RECORD, companions, copy_file, recorded_files, write_card
from spectra.files.headers import ForeignTensor
from spectra.files.orientation import role_of
from spectra.updates.algebra import LowRank, RowScaled


def replaceable(folder: Path) -> str | None:
    """Why a folder may not be replaced by a repaired one; None where nothing but what we wrote would be lost.

    That is a folder with our record that holds only the files which the record lists under ``output.files``.  For
    :func:`spectra.files.folders.whole_folder` and ``check_folder``.
    """
    written = recorded_files(folder)
    if written is None:
        return "exists and is no earlier result of spectra repair"
    others = sorted(
        path.name for path in folder.iterdir()
        if path.name not in {*written, RECORD} or path.is_symlink() or not path.is_file()
    )  # fmt: skip
    return f"holds more than was written there ({', '.join(others[:3])})" if others else None


def why_no_adapter(plan: Plan) -> str | None:
    """Why no adapter can be written as this fine-tune is one, or None."""
    if plan.format not in ("peft-lora", "peft-rslora", "peft-dora"):
        return f"repair writes LoRA and DoRA of PEFT, not {plan.format}"
    if any(isinstance(update, StackUpdate) for update in plan.updates):
        return "repair writes LoRA and DoRA of PEFT's modules, not of parameters (target_parameters)"
    kinds = {type(update) for update in plan.updates}
    if TokensUpdate in kinds and not any(issubclass(kind, LoraUpdate) for kind in kinds):
        return "repair writes LoRA and DoRA of PEFT, not rows of tokens alone"
    return None


def why_not_writable(source: Checkpoint, update: PlannedUpdate, rows: int | None = None) -> str | None:
    """Why a module's factors cannot be replaced, or None; to be asked before any work.

    ``rows`` are the pair's: the shared ones of a resized vocabulary.
    """
    config = source.adapter_config or {}
    if config.get("ensure_weight_tying") and role_of(update.module, 2) != "linear":
        return "ensure_weight_tying makes PEFT derive the head's factors from the embedding's, so none can change alone"
    if isinstance(update, InitialisedUpdate):
        return (
            f"its initialisation ({update.how}) changed the base, so that other factors would have PEFT take out "
            "something else; use --merged"
        )
    if isinstance(update, LoraUpdate):
        columns = math.prod(update.A.shape[1:])
        if update.magnitude is not None and rows is not None and rows < columns:
            return (
                f"DoRA's magnitudes are over all {columns} rows of the resized vocabulary, of which the base has {rows}"
            )
    return None


def stored_ranks(source: Checkpoint, plan: Plan, ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank that the modules of ``ranks`` are stored with, and those whose rank changes with theirs.

    ``ranks`` is module → rank of its new factors.  No rank becomes smaller.  A MultiheadAttention's two projections
    share one entry of the config, so both get the larger rank; with ``init_lora_weights="orthogonal"`` PEFT loads even
    ranks alone.  What is missing is filled with zeros, which change no product.
    """
    groups: dict[str, list[LoraUpdate]] = defaultdict(list)
    for update in _factors(plan).values():
        groups[update.options].append(update)
    even = (source.adapter_config or {}).get("init_lora_weights") == "orthogonal"
    stored: dict[str, int] = {}
    for group in groups.values():
        rank = max(max(update.rank, ranks.get(update.module, 0)) for update in group)
        if even and rank != group[0].rank:
            rank += rank % 2
        stored |= {update.module: rank for update in group if update.module in ranks or rank != update.rank}
    return stored


def write_repaired(
    home: Path,
    source: Checkpoint,
    plan: Plan,
    changed: Mapping[str, LowRank | RowScaled],
    *,
    whole: Mapping[str, Tensor] | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Writes the adapter with the factors of some modules replaced; everything else stays as it is.

    Parameters
    ----------
    home : an empty folder, as :func:`spectra.files.folders.whole_folder` gives it.
    source : the adapter, and ``plan`` what :func:`spectra.adapters.plan_updates` makes of it.
    changed : module (as the planned update calls it) → new factors B (m, r'), A (r', n), for DoRA the magnitude (m,),
        oriented as analysed and in the dtype that they are to be stored in; ``scaling`` is the planned update's.
        n may fall short of a resized vocabulary's columns: what the update adds there stays as it is.
    whole : tensor's name → new values of a tensor that is stored whole (``modules_to_save``), in the stored shape or
        its leading rows; stored in the source's dtype.
    remarks : paragraphs that are added to the model card.

    With nothing changed every file is copied byte for byte, but what was pickled is not pickled again.

    Raises
    ------
    UsageError : a module's factors cannot be replaced (see :func:`why_not_writable`), or what they are on the rows that
        the base does not have cannot be kept.
    """
    whole = whole or {}
    factors = _factors(plan)
    ranks = stored_ranks(source, plan, {module: update.A.shape[0] for module, update in changed.items()})
    for path in companions(source).files:
        copy_file(path, home / path.name)
    if source.in_memory:
        text = json.dumps(source.adapter_config, indent=2, sort_keys=True)
        (home / CONFIG).write_text(text + "\n", encoding="utf-8")
    pickled = any(isinstance(info, ForeignTensor) for info in source.tensors.values())
    if changed or whole or pickled:
        tensors: dict[str, Tensor] = {}
        for module, rank in ranks.items():
            tensors |= _tensors(source, factors[module], changed.get(module), rank)
        for name, value in whole.items():
            tensors[name] = _with_leading_rows(source, name, value)
        _write_tensors(home / WEIGHTS, source, tensors)
        (home / WEIGHTS).chmod((home / CONFIG).stat().st_mode)  # safetensors lets the owner alone read what it writes
        _write_config(home / CONFIG, factors, ranks)
        write_card(home, home / CARD, remarks, _front(source))
    else:
        (weights,) = source.files
        copy_file(weights, home / WEIGHTS)


def _factors(plan: Plan) -> dict[str, LoraUpdate]:
    return {update.module: update for update in plan.updates if isinstance(update, LoraUpdate)}


def _tensors(source: Checkpoint, update: LoraUpdate, new: LowRank | RowScaled | None, rank: int) -> dict[str, Tensor]:
    """The tensors of one module as they are stored, with ``rank`` columns; without new factors the old ones."""
    old_B, old_A = source.read(update.B.name).flatten(1), source.read(update.A.name).flatten(1)
    if new is None:
        B, A = old_B, old_A
    else:
        why = why_not_writable(source, update, new.A.shape[1])
        if why is not None:
            raise UsageError(f"{source.path}: {update.module}: {why}")
        if new.scaling != update.scaling or (update.magnitude is None) != isinstance(new, LowRank):
            raise ValueError(f"{update.module}: factors of another scaling or kind than the adapter's")
        B, A = new.B.cpu(), new.A.cpu()
        if update.layout == "embedding" and A.shape[1] < old_A.shape[1]:
            more = _other_columns(B, old_B, old_A[:, A.shape[1] :])
            if more is None:
                raise UsageError(
                    f"{source.path}: {update.module}: its new factors cannot keep what the adapter adds to the "
                    f"{old_A.shape[1] - A.shape[1]} rows that the base's vocabulary does not have"
                )
            A = torch.cat([A, more.to(A.dtype)], 1)
    missing = rank - A.shape[0]
    B = torch.cat([B, B.new_zeros(B.shape[0], missing)], 1)
    A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
    tensors = {
        update.A.name: A.reshape(rank, *update.A.shape[1:]),
        update.B.name: B.reshape(update.B.shape[0], rank, *update.B.shape[2:]),
    }
    if update.magnitude is not None and isinstance(new, RowScaled):
        tensors[update.magnitude.name] = new.magnitude.cpu().reshape(update.magnitude.shape)
    return tensors


def _other_columns(B: Tensor, old_B: Tensor, old_A: Tensor) -> Tensor | None:
    """X with B·X = old_B·old_A up to the rounding of B's dtype; None where there is none."""
    wanted = old_B.double() @ old_A.double()
    X = torch.linalg.lstsq(B.double(), wanted, driver="gelsd").solution
    lost = B.double() @ X.to(B.dtype).double() - wanted
    return X if bool(lost.norm() <= 4 * torch.finfo(B.dtype).eps * wanted.norm()) else None


def _with_leading_rows(source: Checkpoint, name: str, value: Tensor) -> Tensor:
    stored = source.read(name)
    if value.shape[1:] != stored.shape[1:] or value.shape[0] > stored.shape[0]:
        raise ValueError(f"{name}: values of shape {list(value.shape)} for a tensor of {list(stored.shape)}")
    stored = stored.clone()
    stored[: value.shape[0]] = value.cpu().to(stored.dtype)
    return stored


def _write_tensors(file: Path, source: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """The source's tensors and metadata, with other values, shapes and dtypes for some."""
    metadata: dict[str, str] | None = {"format": "pt"}
    if not any(isinstance(info, ForeignTensor) for info in source.tensors.values()):
        with safe_open(source.files[0], framework="pt") as opened:
            metadata = opened.metadata()
    values = {name: (changed[name] if name in changed else source.read(name)).contiguous() for name in source.tensors}
    if source.in_memory:  # where several names may be one tensor
        values = {name: value.clone() for name, value in values.items()}
    save_file(values, file, metadata=metadata)


def _write_config(file: Path, factors: Mapping[str, LoraUpdate], ranks: Mapping[str, int]) -> None:
    """The copied config with the patterns that give every module its rank and its old scaling."""
    if all(factors[module].rank == rank for module, rank in ranks.items()):
        return
    text = file.read_text(encoding="utf-8")
    values = json.loads(text)
    rslora = bool(values.get("use_rslora"))
    by_name = {update.options: (update, ranks.get(module, update.rank)) for module, update in factors.items()}
    names = ModuleNames({name: re.sub(r"^.*\.\d+\.", "", name) for name in by_name}, ())
    _, rank_pattern = names.pattern({name: rank for name, (_, rank) in by_name.items()}, int(values.get("r", 8)))
    alphas = {name: alpha_of(update, rank, rslora) for name, (update, rank) in by_name.items()}
    _, alpha_pattern = names.pattern(alphas, values.get("lora_alpha", 8))
    values |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    end = "\n" if text.endswith("\n") else ""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=text.isascii()) + end, encoding="utf-8")


def alpha_of(update: LoraUpdate, rank: int, rslora: bool) -> float:
    """The alpha that leaves the scaling as it is at another rank: alpha·(rank/r), for rsLoRA alpha·√(rank/r)."""
    if rank == update.rank:
        return update.alpha
    divisor, before = (math.sqrt(rank), math.sqrt(update.rank)) if rslora else (rank, update.rank)
    alpha = update.alpha * math.sqrt(rank / update.rank) if rslora else update.alpha * rank / update.rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((value for value in near if value / divisor == update.alpha / before), alpha)
    return int(alpha) if alpha == int(alpha) else alpha


def _front(source: Checkpoint) -> list[str]:
    base = (source.adapter_config or {}).get("base_model_name_or_path")
    named = [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if isinstance(base, str) and base else []
    return [*named, "library_name: peft", "tags:", "- lora", "- spectra"]
