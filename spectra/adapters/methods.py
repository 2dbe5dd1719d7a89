"""PEFT's methods besides LoRA: AdaLoRA, VeRA, IA3, LoHa, LoKr and OFT, as peft 0.21 writes them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from spectra.adapters.method import MethodUpdate, Slot
from spectra.adapters.multiplied import check_oft, ia3, oft
from spectra.adapters.peft import COMMON_FIELDS, PREFIX, ConfigFields, common, saved_module
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped
from spectra.adapters.products import adalora, check_adalora, check_vera, loha, lokr, vera
from spectra.adapters.unsupported import foreign_method
from spectra.checkpoint import Checkpoint, TensorInfo
from spectra.errors import AdapterError, UnsupportedMethodError


@dataclass(frozen=True)
class _Method:
    """How one method is read: its factors' names, its config fields, its planned updates."""

    label: str
    factors: tuple[str, ...]
    fields: frozenset[str]
    build: Callable[[ConfigFields, str, Slot], MethodUpdate]
    check: Callable[[ConfigFields], None] = lambda config: None
    shared: tuple[str, ...] = ()  # tensors beside the modules that every update reads


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
        ("lora_A", "lora_B", "lora_E"),
        LORA_FIELDS | ADALORA_FIELDS | {"qalora_group_size", "megatron_core", "use_dora", "lora_bias"},
        adalora,
        check_adalora,
    ),
    "VERA": _Method(
        "VeRA",
        ("vera_lambda_b", "vera_lambda_d"),
        frozenset(["r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"]),
        vera,
        check_vera,
        shared=("vera_A", "vera_B"),
    ),
    "IA3": _Method("IA3", ("ia3_l",), frozenset(["feedforward_modules", "init_ia3_weights"]), ia3),
    "LOHA": _Method(
        "LoHa",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        LYCORIS_FIELDS,
        loha,
    ),
    "LOKR": _Method(
        "LoKr",
        ("lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2"),
        LYCORIS_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        lokr,
    ),
    "OFT": _Method(
        "OFT",
        ("oft_R", "oft_embedding_R"),
        frozenset(["r", "oft_block_size", "module_dropout", "coft", "eps", "block_share"])
        | {"use_cayley_neumann", "num_cayley_neumann_terms"},
        oft,
        check_oft,
    ),
}


class PeftMethods:
    """Adapters that ``peft`` writes with another method than LoRA, of those in ``METHODS``."""

    name = "peft-methods"

    def recognises(self, tuned: Checkpoint) -> bool:
        method = (tuned.adapter_config or {}).get("peft_type")
        return isinstance(method, str) and method in METHODS

    def plan(self, tuned: Checkpoint) -> Plan:
        assert tuned.adapter_config is not None
        config = ConfigFields(tuned)
        method = METHODS[config.values["peft_type"]]
        for key, value in config.values.items():
            if key not in COMMON_FIELDS | method.fields | {"init_weights"} and value:
                raise UnsupportedMethodError(
                    config.file, f"the option {key} = {str(value)[:80]!r} cannot be read with {method.label}"
                )
        method.check(config)
        modules, shared, plain = _sorted(tuned, method)
        updates: list[PlannedUpdate] = []
        skipped: list[Skipped] = []
        for module, slot in modules.items():
            update = method.build(config, module.replace(".base_layer", ""), slot | shared)
            copy = plain.pop(f"{module}.base_layer.weight", None)
            if copy is not None:
                update = replace(update, base_copy=copy.name)
                skipped.append(Skipped(copy.name, "a copy of the base weight that peft stores beside the adapter"))
            updates.append(update)
        foreign = foreign_method(plain)
        if foreign is not None:
            name, other = foreign
            raise UnsupportedMethodError(
                plain[name].file, f"{method.label} does not hold this: it belongs to {other}", plain[name].name
            )
        for name, info in plain.items():
            planned = saved_module(name, info)
            if isinstance(planned, Skipped):
                skipped.append(Skipped(info.name, planned.reason))
            else:
                updates.append(planned)
        own = [update for update in updates if isinstance(update, MethodUpdate)]
        facts = {
            "rank": common(update.rank for update in own),
            "alpha": common(update.alpha for update in own),
            "scaling": common(update.scaling for update in own),
            "use_rslora": False,
            "use_dora": False,
            "conditional": False,
            "base_model_name_or_path": config.values.get("base_model_name_or_path"),
        }
        return Plan(f"peft-{method.label.lower()}", tuple(updates), tuple(skipped), facts)


def _sorted(
    tuned: Checkpoint, method: _Method
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], dict[str, TensorInfo]]:
    """({module: its factors by name}, what all modules share, the rest by the model's own names)."""
    key_of = re.compile(rf"^(?P<module>.+?)\.(?P<factor>{'|'.join(method.factors)})(?P<tail>(\.[^.]+)*)$")
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    shared: dict[str, TensorInfo] = {}
    plain: dict[str, TensorInfo] = {}
    for key, info in tuned.tensors.items():
        name = key.removeprefix(PREFIX)
        match = key_of.match(name)
        common_name = next((one for one in method.shared if re.fullmatch(rf"base_model\.{one}(\.[^.]+)?", key)), None)
        if match is None and common_name is None:
            plain[name] = info
            continue
        slot = shared if match is None else modules[match["module"]]
        factor = common_name if match is None else match["factor"]
        assert factor is not None
        if factor in slot:
            raise AdapterError(info.file, f"{factor} occurs twice (a second adapter?)", key)
        if not info.is_float:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", key)
        slot[factor] = info
    return modules, shared, plain
