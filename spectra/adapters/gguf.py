"""LoRAs in GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes and llama.cpp applies them.

``blk.N.attn_q.weight.lora_a`` (r, in) and ``.lora_b`` (out, r), one alpha for all, r that of the tensor: dW = alpha/r ·
b·a, and b·a itself where alpha is 0.  The rows of query and key updates of the architecture "llama" are reordered as
those of its weights are, which the base's numbers of heads undo.  Of the embedding, a is stored as (V, r).  Modules of
an architecture that is not known keep GGUF's names, as those of its models do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spectra.adapters.factors import StoredFactors, check_factors, common_facts
from spectra.adapters.plan import VECTOR, Plan, Skipped
from spectra.errors import AdapterError, UnsupportedMethodError, WrongBaseError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.gguf.headers import check_heads, in_order
from spectra.files.gguf.names import REORDERED, module_of

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import LowRank

NO_ALPHA = "the stored alpha is 0 or missing: the scaling is 1, as llama.cpp has it"
ONE_ALPHA = "one alpha is stored for all modules: rsLoRA and patterns of alphas were lost when this file was written"
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@dataclass(frozen=True)
class GgufFactors(StoredFactors):
    """The factors of one module.

    ``reordered`` names the number of heads, in a config, whose rows ``up`` has in ggml's order; ``heads`` is that
    number, once the base is known.  ``tokens`` says that ``down`` is stored as (V, r).
    """

    reordered: str = ""
    heads: int | None = None
    tokens: bool = False

    @property
    def rank(self) -> int:
        return self.up[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up[0].shape[0], self.down[0].shape[0 if self.tokens else 1]

    def read(self, checkpoint: Checkpoint, layout: Any, rows: int | None, dtype: torch.dtype, device: str) -> LowRank:
        from spectra.updates.algebra import LowRank

        A, B = (checkpoint.load(info, digest=True).to(device=device).double() for info in (*self.down, *self.up))
        A = A.T if self.tokens else A
        if self.reordered:
            assert self.heads is not None, "against_base gives it"
            B = in_order(B, self.heads)
        return LowRank(B, A if rows is None else A[:, :rows], self.scaling)


class GgufLora:
    """What ``convert_lora_to_gguf.py`` writes."""

    name = "gguf"
    reads = (("llama.cpp: GGUF LoRA", "W0 + s·BA, rows of q and k put back in transformers' order"),)

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.layout == "gguf adapter"

    def plan(self, tuned: Checkpoint) -> Plan:
        file, fields = tuned.files[0], tuned.config
        if fields.get("adapter.type") != "lora":
            kind = str(fields.get("adapter.type"))[:40]
            raise UnsupportedMethodError(file, f"adapter.type = {kind!r} cannot be read by this version (lora can)")
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise AdapterError(file, "general.architecture is missing; without it the names of modules are unknown")
        alpha = fields.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -1e15 < alpha < 1e15:
            raise AdapterError(file, f"adapter.lora.alpha = {str(alpha)[:40]!r}; expected a finite number")
        modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        skipped: list[Skipped] = []
        for key, info in tuned.weights.items():
            module, _, tail = key.rpartition(".")
            if tail in ("lora_a", "lora_b") and module.endswith(".weight"):
                modules[module.removesuffix(".weight")][tail] = info
            elif len(info.shape) < 2 and "norm" in module.rpartition(".")[2]:
                skipped.append(Skipped(key, VECTOR, "without_spectrum"))
            else:
                raise UnsupportedMethodError(info.file, "neither lora_a nor lora_b, nor a norm: it is not read", key)
        if not modules:
            raise AdapterError(file, "holds no lora_a or lora_b")
        updates: list[StoredFactors] = []
        for name, slot in modules.items():
            if any(len(info.shape) == 3 for info in slot.values()):
                why = "stacked experts of a GGUF file are not split"
                skipped += [Skipped(info.name, why, "not_read") for info in slot.values()]
            else:
                updates.append(_update(architecture, name, slot, float(alpha)))
        facts = {
            **common_facts(updates),
            "architecture": architecture,
            "conditional": "adapter.alora.invocation_tokens" in fields,
            "base_model_name_or_path": None,
        }
        return Plan("gguf-lora", tuple(updates), tuple(skipped), facts)


def _update(architecture: str, name: str, slot: Mapping[str, TensorInfo], alpha: float) -> GgufFactors:
    present = next(iter(slot.values()))
    for factor in ("lora_a", "lora_b"):
        if factor not in slot:
            raise AdapterError(present.file, f"its partner {name}.weight.{factor} is missing", present.name)
    module, part = module_of(architecture, name)
    if module is None or part is None:
        raise UnsupportedMethodError(
            present.file, f"{name!r} is no module of {architecture!r} that this version knows", present.name
        )
    A, B = slot["lora_a"], slot["lora_b"]
    tokens = part == "token_embd"
    rank = check_factors(replace(A, shape=A.shape[::-1]) if tokens else A, B)
    return GgufFactors(
        module=module,
        targets=(f"{module}.weight",),
        down=(A,),
        up=(B,),
        alpha=alpha or None,
        scaling=alpha / rank if alpha else 1.0,
        layout="embedding" if tokens else None,
        notes=(ONE_ALPHA,) if alpha else (NO_ALPHA,),
        reordered=HEADS[part] if part in REORDERED.get(architecture, ()) else "",
        tokens=tokens,
    )


def with_heads(plan: Plan, base: Checkpoint) -> Plan:
    """The plan with the numbers of heads that put rows in order again, from the base's config.

    Raises
    ------
    WrongBaseError : it does not tell them, and some update needs them.
    CorruptFileError : rows that are not of that many heads.
    """
    if not any(isinstance(update, GgufFactors) and update.reordered for update in plan.updates):
        return plan
    nested = base.config.get("text_config")
    config = {**base.config, **(nested if isinstance(nested, Mapping) else {})}
    updates = []
    for update in plan.updates:
        if isinstance(update, GgufFactors) and update.reordered:
            heads = config.get(update.reordered, config.get("num_attention_heads"))
            if type(heads) is not int:
                raise WrongBaseError(
                    base.path,
                    f"{update.module!r} has its rows in ggml's order, and the config.json of this base does not give "
                    f"{update.reordered}, which puts them in order again",
                )
            check_heads(update.up[0], heads)
            update = replace(update, heads=heads)
        updates.append(update)
    return replace(plan, updates=tuple(updates))
