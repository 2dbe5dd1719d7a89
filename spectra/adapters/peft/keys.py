"""How peft names what it stores: ``base_model.model.<module>.<factor>[.<adapter>][.weight]``.

``save_pretrained`` leaves the adapter's name out.  A model's own state dict has it in every key, and holds the base's
weights as well: those of wrapped modules as ``….base_layer.weight``, all others under their own names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from spectra.adapters.full import whole_tensor
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped
from spectra.errors import AdapterError
from spectra.files.checkpoint import Checkpoint, TensorInfo

PREFIX = "base_model.model."
TOKENS = "trainable_tokens_delta"
DEEPEST = 4  # parts of a name from a factor on: the factor, the adapter, which some tools double, "weight"
VELORA = "lora_velora_embed"
SAVED_AGAIN = "peft stores this saved module twice, and loads the one under the model's own name"
BIAS_OF_B = "the bias of lora_B: a vector has no spectrum"
BASE_COPY = "a copy of the base weight that peft stores beside the adapter"

# What the factors of each method are called.
FACTORS: dict[str, tuple[str, ...]] = {
    "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", TOKENS, VELORA),
    "ADALORA": ("lora_A", "lora_B", "lora_E", "ranknum"),
    "VERA": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "IA3": ("ia3_l",),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2"),
    "OFT": ("oft_R", "oft_embedding_R"),
    "BOFT": ("boft_R", "boft_s"),
    "TRAINABLE_TOKENS": (TOKENS,),
}

# What peft's wrappers put into the names of modules.
_WRAPPED = re.compile(r"\.(base_layer|token_adapter)(?=\.|$)")
_BEFORE = re.compile(r"(?:\w+\.){0,4}?base_model\.model\.", re.ASCII)
_SAVED = ".modules_to_save."


@dataclass(frozen=True)
class Key:
    """The parts of one tensor's name; ``adapter`` and ``ending`` ("weight", "bias") are empty where it has none."""

    module: str
    factor: str
    adapter: str
    ending: str


class StoredKeys:
    """The tensors of an adapter, sorted by what their names say.

    Parameters
    ----------
    factors : what the method's factors are called.
    shared : names of factors that belong to no module (``base_model.<name>``).

    Attributes
    ----------
    file : the first of those that hold them, or what stands for them in memory.
    adapter : the adapter's name where the keys have it, else "".
    has_factors : whether any tensor is a factor of a module.
    modules : module, wrappers included → factor → tensor.
    biases : module → the bias of its lora_B.
    shared : factor → tensor.
    plain : the model's own name, wrappers included → tensor, of all that is stored whole.
    again : the keys of ``plain`` that hold what is stored under the model's own name too, which is what peft loads.
        So peft saves embeddings that were resized and trained as modules to save.
    """

    def __init__(self, tuned: Checkpoint, factors: Sequence[str], shared: Sequence[str] = ()):
        self.file = next(iter(tuned.files), tuned.path)
        self.modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        self.biases: dict[str, TensorInfo] = {}
        self.shared: dict[str, TensorInfo] = {}
        self.plain: dict[str, TensorInfo] = {}
        named: dict[str, TensorInfo] = {}  # adapter's name → the first tensor that has it
        parse, alone = _parser(factors), _alone(shared)
        for name, info in tuned.tensors.items():
            key = alone(name) or parse(in_model(name))
            if key is None:
                self.plain[in_model(name)] = info
                continue
            named.setdefault(key.adapter, info)
            if len(named) > 1:
                listed = ", ".join(repr(one) if one else "one without a name" for one in sorted(named))
                raise AdapterError(info.file, f"several adapters are in one file: {listed}; save each by itself", name)
            if key.ending == "bias":
                self.biases[key.module] = info
                continue
            slot = self.modules[key.module] if key.module else self.shared
            if key.factor in slot:
                raise AdapterError(info.file, f"{key.factor} occurs twice for one module", name)
            slot[key.factor] = info
        self.has_factors = bool(self.modules)
        self.adapter = next(iter(named), "")
        if self.adapter:
            self._check_saved()
        self.again = frozenset(
            name
            for name in self.plain
            if _SAVED in name and name.endswith(".weight") and own_name(name, self.adapter) in self.plain
        )

    def _check_saved(self) -> None:
        """Of a raw state dict, modules to save must be this adapter's."""
        for name, info in self.plain.items():
            _, marker, rest = name.partition(_SAVED)
            other = rest.partition(".")[0]
            if marker and other != self.adapter:
                raise AdapterError(
                    info.file, f"several adapters are in one file: {self.adapter!r}, {other!r}; save each by itself",
                    info.name,
                )  # fmt: skip

    def copies(self) -> dict[str, tuple[str, TensorInfo]]:
        """The model's own name → (name, tensor), of the base weights of wrapped modules."""
        return {
            unwrapped(name): (name, info)
            for name, info in self.plain.items()
            if ".base_layer." in name and len(info.shape) >= 2
        }

    def own_name(self, name: str) -> str | None:
        """The model's own name of a tensor stored whole; None for what peft keeps beside a saved module."""
        return None if name in self.again else own_name(name, self.adapter)

    def saved(self, name: str, info: TensorInfo) -> PlannedUpdate | Skipped:
        """How a tensor that is stored whole is treated: a module to save, a bias, or what peft keeps beside them."""
        if name in self.again:
            return Skipped(info.name, SAVED_AGAIN, "no_update")
        plain = self.own_name(name)
        if plain is None:
            return Skipped(info.name, "the untrained original that peft keeps beside a saved module", "no_update")
        planned = whole_tensor(info, plain, self.plain.get(f"{name.removesuffix('weight')}bias"))
        return replace(planned, name=info.name) if isinstance(planned, Skipped) else planned


def in_model(name: str) -> str:
    """A tensor's name without what peft, and what wraps a whole model in training, put before it."""
    return name[match.end() :] if (match := _BEFORE.match(name)) else name


def unwrapped(name: str) -> str:
    """A name without what peft's wrappers put into it."""
    return _WRAPPED.sub("", name)


def own_name(name: str, adapter: str) -> str | None:
    """The model's own name of a tensor stored whole; None for the original that peft keeps beside one."""
    if ".original_module." in name:
        return None
    if adapter:
        return unwrapped(name.replace(f"{_SAVED}{adapter}.", "."))
    return unwrapped(re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name))


def plain_name(name: str, tuned: Checkpoint) -> str | None:
    """The model's own name of a tensor that is stored whole, in an adapter of PEFT or elsewhere."""
    if (tuned.adapter_config or {}).get("peft_type") is None:
        return name
    return own_name(in_model(name), "")


def beside_factors(tuned: Checkpoint, plan: Plan) -> Iterator[tuple[str, str, float | None]]:
    """(tensor, the model's own name of what it changes, scaling) of all that an adapter holds besides factors.

    Without a scaling it takes the model's place; a bias of lora_B is multiplied by it and added.
    """
    method = (tuned.adapter_config or {}).get("peft_type")
    stored = StoredKeys(tuned, FACTORS.get(method, FACTORS["LORA"]) if isinstance(method, str) else FACTORS["LORA"])
    scalings = {update.module: update.scaling for update in plan.updates if update.kind != "dense"}
    used = {update.base_copy for update in plan.updates}
    used |= {name for update in plan.updates if update.kind != "dense" for name in update.tensors}
    used |= {item.name for item in plan.skipped if item.reason == BASE_COPY}
    for module, info in stored.biases.items():
        scaling = scalings.get(unwrapped(module))
        if scaling is None:
            raise AdapterError(info.file, f"its partner {module}.lora_B is missing", info.name)
        yield info.name, f"{unwrapped(module)}.bias", scaling
    for name, info in stored.plain.items():
        plain = stored.own_name(name)
        if info.name not in used and plain is not None:
            yield info.name, plain, None


def _parser(factors: Sequence[str]) -> Callable[[str], Key | None]:
    known = frozenset(factors)

    def parse(name: str) -> Key | None:
        parts = name.rsplit(".", DEEPEST)
        for at in range(1, len(parts)):  # the module's name comes first
            if parts[at] in known:
                return Key(".".join(parts[:at]), parts[at], *_tail(parts[at + 1 :]))
        return None

    return parse


def _alone(shared: Sequence[str]) -> Callable[[str], Key | None]:
    parse = _parser(shared)

    def parse_shared(name: str) -> Key | None:
        key = parse(name) if shared else None
        return None if key is None or key.module != "base_model" else replace(key, module="")

    return parse_shared


def _tail(parts: list[str]) -> tuple[str, str]:
    """(adapter's name, ending) of what follows a factor's name."""
    ending = parts.pop() if parts and parts[-1] in ("weight", "bias") else ""
    return ".".join(parts[:1] if len(set(parts)) == 1 else parts), ending
