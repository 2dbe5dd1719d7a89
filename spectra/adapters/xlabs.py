"""LoRAs of XLabs for Flux: ``double_blocks.0.processor.qkv_lora1.down.weight`` in one file, no config, no alpha.

``lora1`` is of the image stream, ``lora2`` of the text stream; ``down`` is (r, in), ``up`` (out, r), and the scaling 1.
"""

from __future__ import annotations

import re
from collections import defaultdict

from spectra.adapters.factors import StoredFactors, check_factors, common_facts
from spectra.adapters.plan import Plan
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint, TensorInfo

_PREFIX = "diffusion_model."
_KEY = re.compile(
    rf"(?:{_PREFIX})?(?P<block>double_blocks\.\d+)\.processor\.(?P<of>qkv|proj)_lora(?P<stream>[12])"
    r"\.(?P<end>down|up)\.weight",
    re.ASCII,
)
_STREAMS = {"1": "img_attn", "2": "txt_attn"}
_SINGLE = re.compile(r"(?:.*\.)?single_blocks\.\d+\.processor\..+", re.ASCII)
NO_ALPHA = "no alpha is stored: the scaling is 1, as XLabs' own nodes have it"


class XlabsLora:
    """What XLabs' trainer writes of Flux's double blocks."""

    name = "xlabs"
    reads = (("XLabs: the double blocks of Flux°", "W0 + BA"),)

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None and any(map(_KEY.fullmatch, tuned.tensors))

    def plan(self, tuned: Checkpoint) -> Plan:
        modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for key, info in tuned.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                why = "this is no tensor that a LoRA of XLabs is known to have"
                if _SINGLE.fullmatch(key):
                    why = (
                        "XLabs adds what it trains in single blocks to a part of linear1 and to what comes out of "
                        "linear2, which is no update of one weight"
                    )
                raise UnsupportedMethodError(info.file, f"{why}; nothing was analysed", key)
            slot = modules[f"{match['block']}.{_STREAMS[match['stream']]}.{match['of']}"]
            if match["end"] in slot:
                raise AdapterError(info.file, f"{match['end']} occurs twice for one module", key)
            slot[match["end"]] = info
        updates = [_update(name, slot) for name, slot in modules.items()]
        return Plan("xlabs-lora", tuple(updates), (), common_facts(updates))


def _update(name: str, slot: dict[str, TensorInfo]) -> StoredFactors:
    present = next(iter(slot.values()))
    if len(slot) < 2:
        missing = "up" if "down" in slot else "down"
        raise AdapterError(present.file, f"its partner {missing} is missing", present.name)
    check_factors(slot["down"], slot["up"])
    return StoredFactors(
        module=f"{_PREFIX}{name}", targets=(f"{name}.weight",), down=(slot["down"],), up=(slot["up"],), alpha=None,
        scaling=1.0, component="diffusion_model", name=name, notes=(NO_ALPHA,),
    )  # fmt: skip
