"""PEFT adapter folders as peft 0.21 writes and reads them: written whole or not at all.

What LoRA's factors cannot carry (norms, biases, embeddings, new heads) goes along whole, in ``modules_to_save``
or as trained biases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from spectra import __version__
from spectra.adapters.peft.keys import PREFIX
from spectra.errors import UsageError
from spectra.files import folders
from spectra.files.folders import CARD, whole_folder
from spectra.files.orientation import TIED

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how classes with an lm_head are called
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What weights are stored in, as safetensors names it.
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def factor_tensors(module: str, B: Tensor, A: Tensor, *, embedding: bool = False) -> dict[str, Tensor]:
    """The two tensors of a module under the names PEFT gives them.

    PEFT keeps A (r, in) and B (out, r) for Linear and Conv1D alike; of an embedding, whose dW is (d, V) here,
    A (r, V) and B (d, r).
    """
    kind, tail = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
    return {f"{PREFIX}{module}.{kind}A{tail}": A, f"{PREFIX}{module}.{kind}B{tail}": B}


@dataclass(frozen=True)
class Whole:
    """What an adapter carries whole, beside its factors.

    Attributes
    ----------
    modules : for ``modules_to_save``, by their full names.
    keys : name in the adapter → tensor of the fine-tune; PEFT reads no module of which one is missing, so the
        unchanged ones of ``modules`` are among them.
    biases : whether some of these are biases of modules that have factors, which takes ``bias="lora_only"``.
    refused : tensor → why an adapter cannot carry it.
    """

    modules: tuple[str, ...]
    keys: Mapping[str, str]
    biases: bool
    refused: Mapping[str, str]


def whole_modules(
    changed: Iterable[str], names: Iterable[str], targets: Iterable[str], tied: Mapping[str, str] | None = None
) -> Whole:
    """How to carry the tensors that factors do not.

    Parameters
    ----------
    changed : tensors of the fine-tune that differ from the base or are not in it, without the weights of
        ``targets``.
    names : all tensors of the fine-tune.
    targets : the modules that get factors.
    tied : see :func:`tied_head`; the head gets a copy of its own, as PEFT would leave it with the base's.
    """
    targets, names, changed = set(targets), list(names), list(changed)
    modules: dict[str, None] = {}
    keys: dict[str, str] = {}
    refused: dict[str, str] = {}
    biases = False
    for name in changed:
        module, _, parameter = name.rpartition(".")
        if module in targets and parameter == "bias":
            keys[f"{PREFIX}{module}.base_layer.bias"] = name
            biases = True
        elif not module or module in targets:
            refused[name] = "no module of its own, which is all that PEFT saves whole"
        elif any(_takes(module, target) for target in targets):
            refused[name] = f"to save {module!r} whole would take it from the layers with factors"
        else:
            modules[module] = None
    for name in names:
        if not modules.keys().isdisjoint(_with_parents(name)):
            keys[PREFIX + name] = name
    for head, name in (tied or {}).items():
        if name in changed and name not in refused:
            modules[head] = None
            keys[f"{PREFIX}{head}.weight"] = name
    return Whole(tuple(modules), keys, biases, refused)


def tied_head(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{head: embedding's tensor} where a language model's head has no tensor but its embedding's; else empty.

    ``config`` is the fine-tune's ``config.json``, ``names`` are its tensors.
    """
    names = list(names)
    embeddings = [name for name in names if name.endswith(TIED)]
    generative = any(str(name).endswith(GENERATIVE) for name in config.get("architectures") or ())
    has_head = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in names)
    tied = generative and not has_head and len(embeddings) == 1 and config.get("tie_word_embeddings", True)
    return {"lm_head": embeddings[0]} if tied else {}


def _takes(saved: str, target: str) -> bool:
    """Whether PEFT, told to save one module, would keep factors from another: it matches ends, or parts, of names."""
    return any(name.endswith(saved) for name in _with_parents(target)) or f".{saved}." in f".{target}."


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def adapter_config(
    fragment: Mapping[str, Any],
    *,
    base: str | None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    whole: Whole | None = None,
) -> dict[str, Any]:
    """The adapter's config: a suggestion's fragment, with what it takes to be loaded.

    ``fan_in_fan_out`` says that a target stores its weight as (in, out), as GPT-2's Conv1D does; ``base`` is
    the name or path that becomes ``base_model_name_or_path``.  With a ``task_type`` such as "SEQ_CLS" PEFT
    insists on the head's tensors, so it goes with a ``whole`` that has them.
    """
    return {
        **fragment,
        "base_model_name_or_path": base,
        "bias": "lora_only" if whole is not None and whole.biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": list(whole.modules) if whole is not None and whole.modules else None,
        "task_type": task_type,
    }


def write_adapter(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor | np.ndarray]],
    remarks: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Writes a PEFT adapter folder that appears whole or not at all.

    Parameters
    ----------
    folder : must not exist; with ``force`` it may be an adapter folder and nothing else, which is replaced.
    config : the contents of ``adapter_config.json``.
    tensors : names as PEFT has them, and values.
    remarks : paragraphs of the model card.

    Raises
    ------
    UsageError : the folder is there already, a name occurs twice, or it could not be written.
    """
    folder = Path(folder)
    check_folder(folder, force=force)
    values: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors:
        if name in values:
            raise UsageError(f"{folder}: tensor {name!r} was given twice")
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in places:  # which the format does not allow
            tensor = tensor.clone()
        places.add(tensor.untyped_storage().data_ptr())
        values[name] = tensor
    if not values:
        raise UsageError(f"{folder}: an adapter without tensors is none")
    with whole_folder(folder, force=force, ours=why_no_adapter) as home:
        save_file(values, home / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False)
        (home / CONFIG).write_text(text + "\n", encoding="utf-8")
        (home / CARD).write_text(_card(config, remarks), encoding="utf-8")
        # safetensors lets the owner alone read what it writes.
        (home / WEIGHTS).chmod((home / CONFIG).stat().st_mode)
    return folder


def check_folder(folder: str | Path, *, force: bool = False) -> None:
    """Raises UsageError where :func:`write_adapter` would not write; to be asked before any work."""
    folders.check_folder(folder, force=force, ours=why_no_adapter)


def why_no_adapter(folder: Path) -> str | None:
    """Why a folder is more or less than a PEFT adapter, so that nobody replaces it; or None."""
    if not (folder / CONFIG).is_file():
        return "exists and is no PEFT adapter folder"
    others = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS, CARD))
    return f"holds more than an adapter ({', '.join(others[:3])})" if others else None


def _card(config: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The model card: its front matter in YAML, of which JSON strings are a part."""
    base = config.get("base_model_name_or_path")
    front = ["library_name: peft", "tags:", "- lora", "- spectra"]
    if base:
        front.insert(0, f"base_model: {json.dumps(base, ensure_ascii=False)}")
    ranks = sorted({int(config["r"]), *config.get("rank_pattern", {}).values()})
    what = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = [
        "# A low-rank adapter made from a fine-tune",
        f"LoRA of {what}, truncated by singular value decomposition from the change that a fine-tune made to its "
        f"base{f' `{base}`' if base else ''}; nothing was trained to make it. Made by Spectra {__version__}.",
        *remarks,
    ]
    return "\n".join(["---", *front, "---", ""]) + "\n" + "\n\n".join(lines) + "\n"
