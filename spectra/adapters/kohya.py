"""LoRAs of kohya's sd-scripts, and those of LyCORIS that are plain LoRA: one file, no config.

Keys are ``lora_unet_<module>.lora_down.weight``, the dots of the module's name turned into underscores, with
``lora_up``, a scalar ``alpha`` and, for convolutions in Tucker form, ``lora_mid``.  dW = alpha/dim · up · down, where
dim is the first dimension of ``lora_down``.
"""

from __future__ import annotations

import re
from collections import defaultdict

from spectra.adapters.factors import StoredFactors, check_factors, common_facts, scalar
from spectra.adapters.plan import Plan, Skipped
from spectra.adapters.unsupported import foreign_method
from spectra.checkpoint import Checkpoint, TensorInfo
from spectra.errors import AdapterError, UnsupportedMethodError

_MODULE = r"(?P<component>lora_unet|lora_te\d?|lora_transformer|lycoris)_(?P<name>[^.]+)"
_KEY = re.compile(_MODULE + r"\.(?P<tail>lora_(?:down|up)(?:\.[0-9]{1,3})?\.weight|lora_mid\.weight|alpha)")
_VECTOR = re.compile(rf"{_MODULE}\.(diff_b|w_norm|b_norm)")

NO_ALPHA = "no alpha is stored, so it is taken for the rank, as its tools do: the scaling is 1"
ZERO_ALPHA = (
    "the stored alpha is 0, which the trainer takes for the rank (a scaling of 1) and its merging script for no "
    "change; this report follows the trainer"
)


class KohyaLora:
    """What ``networks/lora.py`` of sd-scripts writes, and LyCORIS for ``algo=lora`` and ``locon``."""

    name = "kohya"

    def recognises(self, tuned: Checkpoint) -> bool:
        return tuned.adapter_config is None and any(_KEY.fullmatch(name) for name in tuned.tensors)

    def plan(self, tuned: Checkpoint) -> Plan:
        modules: dict[tuple[str, str], dict[str, TensorInfo]] = defaultdict(dict)
        skipped: list[Skipped] = []
        rest: dict[str, TensorInfo] = {}
        for key, info in tuned.tensors.items():
            match = _KEY.fullmatch(key)
            if match is not None:
                modules[match["component"], match["name"]][match["tail"]] = info
            elif key.startswith("bundle_emb."):
                skipped.append(Skipped(key, "an embedding that was learnt for the prompt: no weight of the model"))
            elif _VECTOR.fullmatch(key) and len(info.shape) < 2:
                skipped.append(Skipped(key, "not a matrix: a vector or scalar has no spectrum"))
            else:
                rest[key] = info
        _refuse(rest)
        updates = tuple(_update(*module, slot) for module, slot in modules.items())
        return Plan("kohya-lora", updates, tuple(skipped), common_facts(updates))


def _refuse(rest: dict[str, TensorInfo]) -> None:
    """Raises UnsupportedMethodError for what is no plain LoRA."""
    if not rest:
        return
    name, method = foreign_method(rest) or (next(iter(rest)), "another method")
    why = (
        "dora_scale holds the norms of W0 + dW by some versions of its tools and of W0 alone by others, which the file "
        "does not tell apart"
        if name.endswith(".dora_scale")
        else f"this belongs to {method}"
    )
    raise UnsupportedMethodError(rest[name].file, f"{why}; this version cannot read it (plain LoRA it can)", name)


def _update(component: str, name: str, slot: dict[str, TensorInfo]) -> StoredFactors:
    module = f"{component}_{name}"
    downs, ups = _numbered(slot, "lora_down"), _numbered(slot, "lora_up")
    present = next(iter(slot.values()))
    for number in sorted(downs.keys() ^ ups.keys()):
        alone, partner = (downs, "lora_up") if number in downs else (ups, "lora_down")
        raise AdapterError(alone[number].file, f"its partner {partner} is missing", alone[number].name)
    if not downs:
        raise AdapterError(present.file, "there is neither lora_down nor lora_up beside it", present.name)
    mid = slot.get("lora_mid.weight")
    order = sorted(downs)
    if len(order) > 1 and order != list(range(len(order))):
        raise AdapterError(downs[order[0]].file, f"expected parts 0 to {len(order) - 1}, found {order}", present.name)
    down, up = tuple(downs[number] for number in order), tuple(ups[number] for number in order)
    ranks = {check_factors(a, b, mid) for a, b in zip(down, up, strict=True)}
    if len(down) > 1 and (len(ranks) > 1 or mid is not None or any(a.shape != down[0].shape for a in down)):
        raise AdapterError(down[0].file, f"its {len(down)} parts do not fit each other", down[0].name)
    rank = ranks.pop()
    notes = [] if len(down) == 1 else [f"the updates of {len(down)} parts of the output, of rank {rank} each"]
    info = slot.get("alpha")
    alpha = None if info is None else scalar(info)
    if not alpha:
        notes.append(NO_ALPHA if alpha is None else ZERO_ALPHA)
        alpha = float(rank)
    return StoredFactors(
        module=module,
        targets=(f"{name}.weight",),
        down=down,
        up=up,
        alpha=alpha,
        scaling=alpha / rank,
        mid=mid,
        others=() if info is None else (info,),
        component=component,
        name=name,
        joint="_",
        layout="conv" if len(down[0].shape) > 2 else None,
        kernel=down[0].shape[2:] if mid is None else mid.shape[2:],
        notes=tuple(notes),
    )


def _numbered(slot: dict[str, TensorInfo], factor: str) -> dict[int, TensorInfo]:
    """The parts of a factor by number; one that has no number is the first."""
    found: dict[int, TensorInfo] = {}
    for tail, info in slot.items():
        if tail.startswith(factor):
            middle = tail.removeprefix(factor).removesuffix(".weight")
            number = int(middle[1:]) if middle else 0
            if number in found:
                raise AdapterError(info.file, f"{factor} occurs twice for one module", info.name)
            found[number] = info
    return found
