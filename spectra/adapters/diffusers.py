"""LoRAs of diffusers: ``transformer.<module>.lora_A.weight`` and so on in one file, no config.

The config of each component lies in the header under ``lora_adapter_metadata`` in files of later versions; else alphas
may be stored beside the factors; else the scaling is 1.  A single model's own ``save_lora_adapter`` leaves the
component out.  Before PEFT the factors were ``lora.down`` and ``lora.up``, in text encoders ``lora_linear_layer.down``
and ``.up``; before that, those of attention processors, ``<attention>.processor.to_q_lora.down``.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectra.adapters.factors import ALONE, StoredFactors, check_factors, common_facts, scalar
from spectra.adapters.peft.fields import INERT
from spectra.adapters.peft.keys import BIAS_OF_B
from spectra.adapters.peft.lora import KNOWN_FIELDS, NEUTRAL_INIT
from spectra.adapters.peft.pattern import Pattern
from spectra.adapters.plan import AddedToBias, Plan, Skipped
from spectra.adapters.unsupported import foreign_method
from spectra.errors import AdapterError, CorruptFileError, UnsupportedMethodError
from spectra.files.checkpoint import PICKLE_SUFFIXES, Checkpoint, TensorInfo

METADATA = "lora_adapter_metadata"

_COMPONENT = r"(?P<component>unet|transformer(?:_[0-9])?|text_encoder(?:_[0-9])?|diffusion_model)\."
_FACTOR = (
    r"(?P<name>.+)\.(?P<tail>lora_[AB](?:\.(?P<adapter>\w+))?\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?"
    r"|lora\.(?:down|up)\.weight|lora_linear_layer\.(?:down|up)\.weight|alpha)"
)
_KEY = re.compile(_COMPONENT + _FACTOR)
_BARE = re.compile(_FACTOR)
# Of attention processors, which called all projections the same, whatever the model's own names are.
_EARLY = re.compile(
    rf"(?:{_COMPONENT})?(?P<name>.+?)(?P<own>\.processor)?\.to_(?P<to>[qkv]|out)_lora\.(?P<end>down|up)\.weight"
)
_NAMED = re.compile(r"(?P<name>.+)\.lora_[AB]\.\w+\.weight")
# What only language models call their projections.
LANGUAGE = frozenset(
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query_key_value", "c_attn",
     "qkv_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h", "lm_head", "embed_tokens"]
)  # fmt: skip
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_DOWN = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
_UP = ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight")
_GPT = re.compile(r"transformer\.h\.[0-9]+\..*")  # a language model's own name, by PEFT without its config

NO_ALPHA = "no alpha is stored: the scaling is 1, as diffusers has it"
NO_ALPHAS = (
    "no alpha is stored and ranks differ: the scaling is 1 for each module, as diffusers has it (its earlier versions "
    "took the rank of one module as the alpha of all)"
)
ZERO_ALPHA = "the stored alpha is 0, so the scaling is 0"


class DiffusersLora:
    """What ``save_lora_weights`` of diffusers' pipelines, and ``save_lora_adapter`` of its models, write."""

    name = "diffusers"
    reads = (
        (
            "diffusers: LoRAs with their config in the header, early keys, single models; DiffSynth",
            "W0 + s·BA, s from header or alphas, else 1",
        ),
    )

    def recognises(self, tuned: Checkpoint) -> bool:
        if tuned.adapter_config is not None:
            return False
        names = [name for name in tuned.tensors if not _GPT.fullmatch(name)]
        parses = ((name, _parse(name, bare=False)) for name in names)
        if any(parsed is not None and parsed[2] != "alpha" for _, parsed in parses):
            return True
        if any(name.endswith(".lora_A.weight") for name in names) and _is_bare(tuned):
            return True
        return _has_adapters_name(names)

    def plan(self, tuned: Checkpoint) -> Plan:
        components: dict[str, dict[str, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
        skipped: list[Skipped] = []
        biases: dict[str, TensorInfo] = {}
        rest: dict[str, TensorInfo] = {}
        bare = _is_bare(tuned) or not any(_KEY.fullmatch(key) or _EARLY.fullmatch(key) for key in tuned.tensors)
        for key, info in tuned.tensors.items():
            parsed = None if _GPT.fullmatch(key) else _parse(key, bare=bare)
            if parsed is None:
                rest[key] = info
                continue
            component, module, tail = parsed
            slot = components[component][module]
            if tail == "lora_B.bias":
                biases[f"{component}.{module}"] = info
                skipped.append(Skipped(key, BIAS_OF_B, "without_spectrum"))
            elif tail in slot:
                raise AdapterError(info.file, f"{tail} occurs twice for {component}.{module}", key)
            else:
                slot[tail] = info
        if rest:
            name, method = foreign_method(rest) or (next(iter(rest)), "another method")
            raise UnsupportedMethodError(
                rest[name].file,
                f"beside a LoRA of diffusers, this belongs to {method}, which this version cannot read",
                name,
            )
        configs = _configs(tuned, components)
        updates = [
            update
            for component, modules in components.items()
            for update in _updates(component, modules, configs.get(component))
        ]
        by_module = {update.module: update for update in updates}
        added = tuple(
            AddedToBias(info.name, by_module[module].tensors[0], by_module[module].scaling)
            for module, info in biases.items()
        )
        return Plan("diffusers-lora", tuple(updates), tuple(skipped), common_facts(updates), biases=added)


def _parse(key: str, *, bare: bool) -> tuple[str, str, str] | None:
    """(component, module, factor) of a tensor's name, or None; ``bare`` names have no component."""
    match = None if bare else _EARLY.fullmatch(key)
    if match is not None and (match["component"] or match["own"]):
        component = match["component"] or "unet"  # whose own save_attn_procs wrote no component
        names = _TEXT_PROJECTIONS if component.startswith("text_encoder") else _PROJECTIONS
        return component, f"{match['name']}.{names[match['to']]}", f"lora.{match['end']}.weight"
    match = (_BARE if bare else _KEY).fullmatch(key)
    if match is None:
        return None
    tail = match["tail"] if match["adapter"] is None else f"{match['tail'].partition('.')[0]}.weight"
    return ALONE if bare else match["component"], match["name"], re.sub(r"_vector(\.weight)?$", "", tail)


def _has_adapters_name(names: Sequence[str]) -> bool:
    """Whether these are a model's own names and, in each key, the adapter's, as DiffSynth writes them.

    A language model's projections do not count: a state dict of PEFT's leaves out their alpha.
    """
    named = [match for match in map(_NAMED.fullmatch, names) if match]
    return bool(named) and not any(
        match["name"].startswith("base_model.") or match["name"].rpartition(".")[2] in LANGUAGE for match in named
    )


def _is_bare(tuned: Checkpoint) -> bool:
    """Whether the header holds one model's config itself, and not one for each component."""
    return any("r" in _metadata(file) for file in tuned.files)


@dataclass(frozen=True)
class _Factors:
    """The factors of one module as found, before it is known how they are scaled."""

    name: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    alpha: TensorInfo | None
    magnitude: TensorInfo | None


def _updates(
    component: str, modules: Mapping[str, Mapping[str, TensorInfo]], config: _Config | None
) -> list[StoredFactors]:
    factors = [_factors(f"{component}.{name}", name, slot) for name, slot in modules.items()]
    without = NO_ALPHA if len({item.rank for item in factors}) < 2 else NO_ALPHAS
    if config is None:
        _check_alphas(component, factors)
    updates = []
    for item in factors:
        notes: tuple[str, ...] = ()
        if item.alpha is not None:
            alpha: float | None = scalar(item.alpha)
            assert alpha is not None
            scaling = alpha / item.rank
            notes = () if alpha else (ZERO_ALPHA,)
            if config is not None and not math.isclose(scaling, config.scaling_of(item)[1], rel_tol=1e-2):
                raise AdapterError(
                    item.alpha.file,
                    f"it gives a scaling of {scaling:g}, but {METADATA} in the header one of "
                    f"{config.scaling_of(item)[1]:g}",
                    item.alpha.name,
                )
        elif config is not None:
            alpha, scaling = config.scaling_of(item)
        else:
            alpha, scaling, notes = None, 1.0, (without,)
        if config is not None and config.use_dora != (item.magnitude is not None):
            wanted = "use_dora" if config.use_dora else "no use_dora"
            raise AdapterError(
                item.down.file, f"{METADATA} has {wanted}, but of magnitudes there is "
                f"{'one' if item.magnitude else 'none'} for this module", item.down.name,
            )  # fmt: skip
        updates.append(StoredFactors(
            module=f"{component}.{item.name}",
            targets=(f"{item.name}.weight",),
            down=(item.down,),
            up=(item.up,),
            alpha=alpha,
            scaling=scaling,
            others=() if item.alpha is None else (item.alpha,),
            magnitude=item.magnitude,
            component=component,
            name=item.name,
            layout="conv" if len(item.down.shape) > 2 else None,
            kernel=item.down.shape[2:],
            notes=notes,
        ))  # fmt: skip
    return updates


def _factors(module: str, name: str, slot: Mapping[str, TensorInfo]) -> _Factors:
    present = next(iter(slot.values()))
    downs, ups = [slot[tail] for tail in _DOWN if tail in slot], [slot[tail] for tail in _UP if tail in slot]
    if len(downs) > 1 or len(ups) > 1:
        raise AdapterError(present.file, f"{module} has factors of several kinds", present.name)
    if not downs or not ups:
        missing = "lora_A" if not downs else "lora_B"
        raise AdapterError(present.file, f"its partner {module}.{missing} (or as it was called before) is missing",
                           present.name)  # fmt: skip
    rank, magnitude = check_factors(downs[0], ups[0]), slot.get("lora_magnitude")
    if magnitude is not None:
        shape, outputs = magnitude.shape, ups[0].shape[0]
        if not magnitude.is_float or magnitude.size != outputs or outputs not in shape[:2]:
            raise AdapterError(
                magnitude.file, f"expected {outputs} magnitudes, found {magnitude.dtype} of shape {list(shape)}",
                magnitude.name,
            )  # fmt: skip
    return _Factors(name, downs[0], ups[0], rank, slot.get("alpha"), magnitude)


def _check_alphas(component: str, factors: Sequence[_Factors]) -> None:
    """Raises where no config and not all alphas are there, and what is missing could be several numbers."""
    without = [item for item in factors if item.alpha is None]
    if without and len(without) < len(factors):
        raise UnsupportedMethodError(
            without[0].down.file,
            f"other modules of {component} have an alpha, this one has none: it could be its rank, or theirs",
            without[0].down.name,
        )


def _configs(tuned: Checkpoint, components: Mapping[str, object]) -> dict[str, _Config]:
    """component → PEFT's config of it, as the headers hold it."""
    fields: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in tuned.files:
        for key, value in _metadata(file).items():
            component, _, field = (ALONE, "", key) if ALONE in components else key.partition(".")
            if component in components:
                fields[component][field] = value
    return {component: _Config(tuned.files[0], values) for component, values in fields.items()}


def _metadata(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if file.suffix in PICKLE_SUFFIXES:
        return {}
    try:
        with safe_open(file, framework="np") as opened:
            raw = (opened.metadata() or {}).get(METADATA, "{}")
        value = json.loads(raw)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(file, f"{METADATA} in its header is not readable as JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(file, f"{METADATA} in its header is no JSON object")
    return value


class _Config:
    """The fields of PEFT's LoraConfig, checked: anything that is not understood is refused by name."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file, self.values = file, values
        for key, value in values.items():
            if key not in KNOWN_FIELDS | INERT.keys() and value:
                raise UnsupportedMethodError(
                    file, f"the option {key[:80]} = {str(value)[:80]!r} in {METADATA} cannot be read by this version"
                )
        method = values.get("peft_type", "LORA")
        if method != "LORA":
            raise UnsupportedMethodError(file, f"the method {str(method)[:80]!r} in {METADATA} cannot be read")
        init = values.get("init_lora_weights", True)
        if not any(init is value or init == value for value in NEUTRAL_INIT):
            raise UnsupportedMethodError(
                file, f"init_lora_weights = {str(init)[:80]!r} changed the base weights when training began"
            )
        self.rank = self._number("r", values.get("r", 8))
        self.alpha = self._number("lora_alpha", values.get("lora_alpha", 8))
        self.use_rslora, self.use_dora = self._switch("use_rslora"), self._switch("use_dora")
        self.ranks, self.alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def scaling_of(self, item: _Factors) -> tuple[float, float]:
        """(alpha, scaling) of a module: alpha / r, or alpha / √r for rsLoRA."""
        rank, alpha = self.ranks.lookup(item.name, self.rank), self.alphas.lookup(item.name, self.alpha)
        if rank != item.rank:
            raise AdapterError(
                item.down.file, f"its first dimension is {item.rank}, but {METADATA} gives this module r = {rank:g}",
                item.down.name,
            )  # fmt: skip
        return alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _switch(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r} in {METADATA}; expected true or false")
        return bool(value)

    def _number(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e15 < value < 1e15:
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r} in {METADATA}; expected a number")
        return value

    def _pattern(self, key: str) -> Pattern:
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(self.file, f"{key} in {METADATA} is not an object")
        return Pattern(self.file, {name: self._number(key, value) for name, value in pattern.items()})
