"""Adapters that are recognised, so that the error can name them, but not read yet.

A method that gets its own dialect leaves this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spectra.adapters.plan import Plan
from spectra.errors import UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint

# (pattern of a tensor's name, what its presence means); the first that matches decides
SIGNATURES: tuple[tuple[str, str], ...] = (
    (r"\.hada_w[12]", "a LoHa without its adapter_config.json (alpha is not known)"),
    (r"\.lokr_[wt]", "a LoKr without its adapter_config.json (alpha is not known)"),
    (r"\.dora_scale$", "a DoRA of LyCORIS without the factors it belongs to"),
    (r"\.(q_layer|p_layer)\.weight$|\.lambda_layer$", "T-LoRA, whose first factors, taken off again, it does not hold"),
    (r"\.boft_[Rs]", "BOFT without its adapter_config.json"),
    (r"\.oft_blocks|\.oft_diag|\.oft_R", "OFT without its adapter_config.json (how it was constrained is not known)"),
    (r"\.lora_(down|up)\.", "a LoRA with lora_down and lora_up under other names than kohya's sd-scripts give"),
    (r"_lora\.(down|up)\.", "a LoRA of an early diffusers"),
    (r"token_adapter|trainable_tokens_delta", "trainable tokens"),
    (r"\.lora_(diag|E|ga)(\.|$)", "a variant of LoRA (KaSA, AdaLoRA)"),
    (r"\.ia3_l|\.on_input$", "IA3"),
    (r"\.vera_lambda_[bd]", "VeRA"),
    (
        r"(^|\.)layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.lora_[AB]\.",
        "a LoRA of mistral-finetune, whose scaling its file does not hold",
    ),
    (r"\.lora_[ab]$", "an MLX LoRA without its adapter_config.json (the scale is not known)"),
    (
        r"\.lora_(A|B|embedding_A|embedding_B)(\.|$)|lora_magnitude_vector",
        "a LoRA without its adapter_config.json (alpha is not known)",
    ),
)
ANY = re.compile("|".join(f"(?:{pattern})" for pattern, _ in SIGNATURES))


class Unsupported:
    """Recognises adapters by their tensors' names and says what they are."""

    name = "unsupported"
    reads = ()

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None and self._method(tuned) is not None

    def plan(self, tuned: Checkpoint) -> Plan:
        foreign = self._method(tuned)
        assert foreign is not None
        tensor, method = foreign
        raise UnsupportedMethodError(
            tuned.tensors[tensor].file, f"this is {method}, which this version cannot read", tensor
        )

    @staticmethod
    def _method(tuned: Checkpoint) -> tuple[str, str] | None:
        return foreign_method(tuned.tensors)


def foreign_method(names: Iterable[str]) -> tuple[str, str] | None:
    """(name, method) of the first tensor name that gives away a method that is not read yet."""
    names = [name for name in names if ANY.search(name)]  # nearly always none, of what may be very many
    for pattern, method in SIGNATURES:
        for name in names:
            if re.search(pattern, name):
                return name, method
    return None
