"""PEFT's methods and LoRA's options that are known by name and not read, each with the reason.

The names are those of ``PeftType`` and ``LoraConfig`` in peft 0.21.
"""

from __future__ import annotations

from pathlib import Path

from spectra.errors import UnsupportedMethodError

NO_WEIGHT = "changes no weight of the model, so there is no spectrum to compare"
NO_ONE_WEIGHT = "adds what depends on the input, so that no one weight has its effect"
OVER_ALL = "has parts that are sized, drawn or shared over all modules, so that none can be read by itself"
NOT_YET = "cannot be read by this version (LoRA, rsLoRA, DoRA, AdaLoRA, VeRA, IA3, LoHa, LoKr, OFT, BOFT and trainable "
NOT_YET += "tokens can by themselves, others through peft)"

# Methods that train prompts or networks beside the model, only vectors, or that have no weight to merge into.
METHODS: dict[str, str] = {
    **dict.fromkeys(
        [
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ],
        NO_WEIGHT,
    ),
    "LN_TUNING": "trains norms alone: a vector has no spectrum",
    "BEFT": "trains biases alone: a vector has no spectrum",
    **dict.fromkeys(["POLY", "XLORA", "LILY", "SHADOW"], NO_ONE_WEIGHT),
    **dict.fromkeys(["RANDLORA", "VBLORA", "PVERA", "UNILORA", "TINYLORA", "FROD"], OVER_ALL),
    "ADAMSS": "has parts by clusters of the base weight's singular vectors, which peft computes anew as it loads",
}

# Options of LoRA that change what the stored factors mean.
OPTIONS: dict[str, str] = {
    "use_qalora": "QA-LoRA adds to a quantised weight by groups of its input",
    "use_bdlora": "the factors are block-diagonal, and stored as blocks",
    "arrow_config": "Arrow mixes several adapters, token by token",
    "kasa_config": "KaSA took the smallest singular values out of the base and has some of its own",
    "monteclora_config": "MonteCLoRA draws its factors anew at each step",
    "megatron_config": "Megatron's layers are parts of the weights, one for each device",
}


def refuse_method(file: Path, method: str | None) -> UnsupportedMethodError:
    """What is raised for a ``peft_type`` that no dialect reads."""
    if method is None:
        return UnsupportedMethodError(file, f"the method of this adapter (no peft_type) {NOT_YET}")
    if method in METHODS:
        return UnsupportedMethodError(file, f"{method} {METHODS[method]}")
    return UnsupportedMethodError(file, f"the method {method} {NOT_YET}")


def how_to_ignore(option: str) -> str:
    """What a user can do about an option that is not known."""
    return f"if you know that it changes no weight, pass --ignore-option {option[:80]} (ignore_options=…)"


def refuse_option(file: Path, option: str, value: object) -> UnsupportedMethodError:
    """What is raised for an option of LoRA that is not read."""
    why = f" ({OPTIONS[option]})" if option in OPTIONS else f"; {how_to_ignore(option)}"
    return UnsupportedMethodError(
        file, f"the option {option[:80]} = {str(value)[:80]!r} cannot be read by this version{why}"
    )
