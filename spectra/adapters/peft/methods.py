"""PEFT's methods besides LoRA: AdaLoRA, VeRA, IA3, LoHa, LoKr, OFT, BOFT and trainable tokens, as of peft 0.21."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spectra.adapters.peft.butterfly import boft
from spectra.adapters.peft.fields import COMMON_FIELDS, INERT, ConfigFields
from spectra.adapters.peft.keys import FACTORS, StoredKeys, unwrapped
from spectra.adapters.peft.method import MethodUpdate, Slot
from spectra.adapters.peft.multiplied import check_oft, ia3, oft
from spectra.adapters.peft.products import adalora, check_adalora, loha, lokr
from spectra.adapters.peft.refused import how_to_ignore
from spectra.adapters.peft.tokens import replaced_tokens
from spectra.adapters.peft.unknown import plan_of
from spectra.adapters.peft.vera import vera
from spectra.adapters.plan import Plan, Skipped
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class _Method:
    """How one method is read: its config fields, its planned updates; its factors' names are in ``FACTORS``.

    ``formula`` is of the tuned weight, for the documentation.
    """

    label: str
    formula: str
    fields: frozenset[str]
    build: Callable[[ConfigFields, str, Slot], MethodUpdate]
    check: Callable[[ConfigFields], None] = lambda config: None
    shared: tuple[str, ...] = ()  # tensors beside the modules that every update reads
    idle: Mapping[str, str] = field(default_factory=dict)  # what a raw state dict holds besides: name → why not read


# AdaLoRA's config is LoRA's, whose rank, patterns and rsLoRA it ignores.
LORA_FIELDS = frozenset(
    ["r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"]
)
ADALORA_FIELDS = frozenset(
    ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]
)
LYCORIS_FIELDS = frozenset(
    ["r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "rank_pattern", "alpha_pattern"]
)

METHODS: dict[str, _Method] = {
    "ADALORA": _Method(
        "AdaLoRA",
        "W0 + s·B·diag(E)·A",
        LORA_FIELDS | ADALORA_FIELDS | {"qalora_group_size", "megatron_core", "use_dora", "lora_bias"},
        adalora,
        check_adalora,
        idle={"ranknum": "the rank that AdaLoRA started with"},
    ),
    "VERA": _Method(
        "VeRA",
        "W0 + (b ⊙ B)·(d ⊙ A), with A and B stored or made anew",
        frozenset(["r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"]),
        vera,
        shared=("vera_A", "vera_B"),
    ),
    "IA3": _Method("IA3", "W0 scaled by row or column", frozenset(["feedforward_modules", "init_ia3_weights"]), ia3),
    "LOHA": _Method(
        "LoHa",
        "W0 + s·(B₁A₁) ⊙ (B₂A₂)",
        LYCORIS_FIELDS,
        loha,
    ),
    "LOKR": _Method(
        "LoKr",
        "W0 + s·(C ⊗ D)",
        LYCORIS_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        lokr,
    ),
    "OFT": _Method(
        "OFT",
        "W0·Rᵀ, of embeddings Rᵀ·W0",
        frozenset(["r", "oft_block_size", "module_dropout", "coft", "eps", "block_share"])
        | {"use_cayley_neumann", "num_cayley_neumann_terms"},
        oft,
        check_oft,
    ),
    "BOFT": _Method(
        "BOFT",
        "diag(s)·W0·Rᵀ",
        frozenset(["boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"]),
        boft,
    ),
    "TRAINABLE_TOKENS": _Method(
        "trainable-tokens", "W0 with some rows replaced", frozenset(["token_indices"]), replaced_tokens
    ),
}


class PeftMethods:
    """Adapters that ``peft`` writes with another method than LoRA, of those in ``METHODS``."""

    name = "peft-methods"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"PEFT: {method.label}", method.formula) for method in METHODS.values())

    def recognises(self, tuned: Checkpoint) -> bool:
        method = (tuned.adapter_config or {}).get("peft_type")
        return isinstance(method, str) and method in METHODS

    def plan(self, tuned: Checkpoint) -> Plan:
        assert tuned.adapter_config is not None
        config = ConfigFields(tuned)
        method = METHODS[config.values["peft_type"]]
        for key, value in config.values.items():
            if key not in COMMON_FIELDS | method.fields | INERT.keys() | {"init_weights"} and value:
                raise UnsupportedMethodError(
                    config.file,
                    f"the option {key[:80]} = {str(value)[:80]!r} cannot be read with {method.label}; "
                    f"{how_to_ignore(key)}",
                )
        method.check(config)
        stored = StoredKeys(tuned, FACTORS[config.values["peft_type"]], method.shared)
        own: list[MethodUpdate] = []
        skipped: list[Skipped] = []
        for module, slot in stored.modules.items():
            for name in method.idle.keys() & slot.keys():
                skipped.append(Skipped(slot.pop(name).name, method.idle[name], "no_update"))
            own.append(method.build(config, unwrapped(module), _floats(stored.shared | slot)))
        used = {name for update in own for name in update.tensors}
        skipped += [
            Skipped(info.name, "every module has its own copy of it", "no_update")
            for info in stored.shared.values() if info.name not in used
        ]  # fmt: skip
        for info in stored.biases.values():
            raise UnsupportedMethodError(info.file, f"{method.label} does not hold this: it belongs to LoRA", info.name)
        return plan_of(stored, method.label, own, config.values.get("base_model_name_or_path"), skipped)


def _floats(slot: Slot) -> Slot:
    """The factors as they are; an AdapterError names one that holds no floats."""
    for info in slot.values():
        if not info.holds_floats:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
    return slot
