"""Adapters of kohya's sd-scripts and of LyCORIS: one file, no config.

Keys are ``lora_unet_<module>.lora_down.weight``, the dots of the module's name turned into underscores, with
``lora_up``, a scalar ``alpha`` and, for convolutions in Tucker form, ``lora_mid``.  dW = alpha/dim · up · down, where
dim is the first dimension of ``lora_down``.  Other factors are those of :mod:`spectra.adapters.lycoris`.  Some tools
write the same factors under names with dots, ``diffusion_model.<module>.lokr_w1``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from spectra.adapters.factors import StoredFactors, alpha_of, check_factors, common_facts
from spectra.adapters.lycoris import METHODS as LYCORIS
from spectra.adapters.lycoris import is_lycoris, read_module
from spectra.adapters.lycoris_multiplied import KOHYA_OFT
from spectra.adapters.lycoris_products import LycorisUpdate
from spectra.adapters.plan import VECTOR, AddedToBias, Plan, Skipped
from spectra.adapters.unsupported import foreign_method
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint, TensorInfo

_PLAIN = r"lora_(?:down|up)(?:\.[0-9]{1,3})?\.weight|lora_mid\.weight|alpha"
_UNDERSCORED = re.compile(
    rf"(?P<component>lora_unet|lora_te\d?|lora_transformer|lycoris|{KOHYA_OFT})_(?P<name>[^.]+)\.(?P<tail>.+)"
)
_DOTTED = re.compile(
    r"(?:(?P<component>unet|transformer(?:_[0-9])?|text_encoder(?:_[0-9])?|diffusion_model)\.)?(?P<name>.+?)"
    rf"\.(?P<tail>{_PLAIN}|hada_\w+|lokr_\w+|oft_blocks|oft_diag|rescale|on_input|weight|dora_scale|diff(?:_[bm])?)"
)
# What tells such a file by itself where names have dots; the others are names that parameters have.
_TELLING = re.compile(
    r".*\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag|on_input|lora_(down|up)\.weight)"
    r"|(unet|transformer(_[0-9])?|text_encoder(_[0-9])?|diffusion_model)\..+\.diff"
)
_VECTORS = ("diff_b", "w_norm", "b_norm")
_PEFT = "base_model.model."


class _Module(NamedTuple):
    component: str
    name: str
    joint: str

    @property
    def called(self) -> str:
        return self.joint.join(part for part in (self.component, self.name) if part)


def _parse(key: str) -> tuple[_Module, str] | None:
    """(module, factor) of a tensor's name, or None."""
    match = _UNDERSCORED.fullmatch(key)
    if match is not None:
        return _Module(match["component"], match["name"], "_"), match["tail"]
    match = _DOTTED.fullmatch(key)
    return None if match is None else (_Module(match["component"] or "", match["name"], "."), match["tail"])


class KohyaLora:
    """What ``networks/lora.py``, ``loha.py``, ``lokr.py`` and ``oft.py`` of sd-scripts write, and LyCORIS."""

    name = "kohya"
    reads = (
        (
            "kohya's sd-scripts: LoRA, LoCon, split parts, OFT°",
            "W0 + s·BA, s = alpha / rank; OFT rotates the output side",
        ),
        (
            f"LyCORIS: {', '.join(LYCORIS)}; DoRA by rows or columns, as the shape of `dora_scale` says",
            "as its forward pass computes it (its own merge of LoHa and LoKr applies alpha / rank twice)",
        ),
    )

    def recognises(self, tuned: Checkpoint) -> bool:
        if tuned.adapter_config is not None:
            return False
        return any(
            _TELLING.fullmatch(name) and not name.startswith(_PEFT)
            if _UNDERSCORED.fullmatch(name) is None
            else _is_factor(name)
            for name in tuned.tensors
        )

    def plan(self, tuned: Checkpoint) -> Plan:
        modules: dict[_Module, dict[str, TensorInfo]] = defaultdict(dict)
        skipped: list[Skipped] = []
        biases: dict[_Module, TensorInfo] = {}
        rest: dict[str, TensorInfo] = {}
        for key, info in tuned.tensors.items():
            parsed = _parse(key)
            if key.startswith("bundle_emb."):
                why = "an embedding that was learnt for the prompt: no weight of the model"
                skipped.append(Skipped(key, why, "new"))
            elif parsed is None:
                rest[key] = info
            elif parsed[1] == "diff_m":
                skipped.append(
                    Skipped(key, "a change of the block's modulation, which is no matrix", "without_spectrum")
                )
            elif len(info.shape) < 2 and parsed[1] in (*_VECTORS, "diff"):
                if parsed[1] == "diff_b":
                    biases[parsed[0]] = info
                skipped.append(Skipped(key, VECTOR, "without_spectrum"))
            else:
                modules[parsed[0]][parsed[1]] = info
        updates: list[StoredFactors | LycorisUpdate] = []
        added: list[AddedToBias] = []
        for module, slot in modules.items():
            made = len(updates)
            if all(re.fullmatch(_PLAIN, factor) for factor in slot):
                updates.append(_update(module, slot))
            elif module.joint == "_" or is_lycoris(slot.keys() - {"weight"}) or "dora_scale" in slot:
                component = module.component or "model"
                updates.append(read_module(module.called, component, module.name, module.joint, slot))
            else:
                rest |= {info.name: info for info in slot.values()}
            if module in biases:
                added += [AddedToBias(biases[module].name, update.tensors[0], 1.0) for update in updates[made:]]
        if rest:
            name, method = foreign_method(rest) or (next(iter(rest)), "another method")
            raise UnsupportedMethodError(
                rest[name].file, f"beside an adapter of kohya's or of LyCORIS, this belongs to {method}: this version "
                "cannot read it", name,
            )  # fmt: skip
        plain = all(isinstance(update, StoredFactors) for update in updates)
        facts = common_facts(updates)
        return Plan("kohya-lora" if plain else "lycoris", tuple(updates), tuple(skipped), facts, biases=tuple(added))


def _is_factor(name: str) -> bool:
    """Whether a name with underscores ends in a factor that is read."""
    tail = name.partition(".")[2]
    return re.fullmatch(_PLAIN, tail) is not None or is_lycoris((tail,)) or tail == "dora_scale"


def _update(module: _Module, slot: dict[str, TensorInfo]) -> StoredFactors:
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
    alpha, scaling, about = alpha_of(info, rank)
    return StoredFactors(
        module=module.called,
        targets=(f"{module.name}.weight",),
        down=down,
        up=up,
        alpha=alpha,
        scaling=scaling,
        mid=mid,
        others=() if info is None else (info,),
        component=module.component or "model",
        name=module.name,
        joint=module.joint,
        layout="conv" if len(down[0].shape) > 2 else None,
        kernel=down[0].shape[2:] if mid is None else mid.shape[2:],
        notes=(*notes, *about),
    )


def _numbered(slot: dict[str, TensorInfo], factor: str) -> dict[int, TensorInfo]:
    """The parts of a factor by number; one that has no number is the first."""
    parts: dict[int, TensorInfo] = {}
    for tail, info in slot.items():
        if tail.startswith(factor):
            middle = tail.removeprefix(factor).removesuffix(".weight")
            number = int(middle[1:]) if middle else 0
            if number in parts:
                raise AdapterError(info.file, f"{factor} occurs twice for one module", info.name)
            parts[number] = info
    return parts
