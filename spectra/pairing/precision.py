"""What a checkpoint's weights were quantised as, and what that means for a result."""

from __future__ import annotations

import re

from spectra.adapters import Plan
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Derived, Unreadable
from spectra.files.stored.quantised.weights import settings_of
from spectra.sources.resolve import named_base

# What the names of models say that were stored with fewer bits: "…-bnb-4bit", "…-GPTQ-Int4", "….w4a16".
_NAMED = re.compile(
    r"(?<![a-z0-9])(?:bnb|[2-8]-?bits?|gptq|awq|fp8|nf4|fp4|mxfp[468]|nvfp4|int[2-8]|w[48]a(?:8|16)|hqq|aqlm|eetq|exl[23]"
    r"|quip|quanti[sz]ed)(?![a-z])"
)


def quantised_as(checkpoint: Checkpoint) -> str | None:
    """What some of a checkpoint's weights were quantised as ("nf4"; "fp8, nf4" where they differ); None if none were.

    Of a GGUF file its own names ("Q4_0").  Where none of them can be read, what its config.json calls the method.
    """
    types = _read_as(checkpoint)
    if types:
        return ", ".join(sorted(types))
    if not any(isinstance(info, Unreadable) for info in checkpoint.derived.values()):
        return None
    configs = [checkpoint.config, *(model.config for model in checkpoint.components.values())]
    methods = (settings_of(config).get("quant_method") for config in configs)
    return next((method[:40] for method in methods if isinstance(method, str)), None)


def _read_as(checkpoint: Checkpoint) -> set[str]:
    """What those of its weights were quantised as that are read."""
    return {info.quantised for info in checkpoint.derived.values() if isinstance(info, Derived) and info.quantised}


def sounds_quantised(name: str) -> bool:
    """Whether the last part of a model's name or path says that it is quantised."""
    return _NAMED.search(name.rstrip("/").rsplit("/", 1)[-1].lower()) is not None


def caveat(base: Checkpoint, tuned: Checkpoint | None = None, plan: Plan | None = None) -> str | None:
    """What a reader should know where base and fine-tune may have met at different precisions; None where nothing.

    ``plan`` is the fine-tune's; without both, only what the base says of itself.

    What a trainer quantised while it loaded the model (QLoRA on a model stored in full) leaves no trace in an adapter,
    so nothing is said of that.
    """
    here = quantised_as(base)
    said = []
    if here and _read_as(base):
        said = [f"the base is stored as {here}: intruders are counted relative to its dequantised weights"]
    elif here:
        said = [f"weights that the base stores as {here} are not read"]
    if tuned is None or plan is None:
        return "; ".join(said) or None
    if plan.complete:
        there = quantised_as(tuned)
        if there and there != here:
            said.append(f"the fine-tune is stored as {there}: what rounding changed counts as part of the update")
        elif here and not there:
            said.append("the fine-tune is not: what rounding changed in the base counts as part of the update")
        return "; ".join(said) or None
    named = (tuned.adapter_config or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or named_base(tuned, base):
        return "; ".join(said) or None
    if here and not sounds_quantised(named):
        said.append(f"the adapter names {named!r}, so if it was trained against full weights, audit it against those")
    elif not here and sounds_quantised(named):
        said.append(
            f"the adapter names {named!r}, a quantised model, as its base, and this base is not quantised: intruders "
            "are counted relative to weights that the adapter was not trained on"
        )
    return "; ".join(said) or None
