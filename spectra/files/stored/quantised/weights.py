"""What every quantised form shares: the checkpoint's weights as they may be quantised, and checks of small tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.errors import CorruptFileError
from spectra.files.derived import Derived, Make, Unreadable, Weight, Weights
from spectra.files.headers import ForeignTensor, TensorInfo
from spectra.files.orientation import CONV1D_FAMILIES, CONV1D_MODULES

MAX_SMALL_BYTES = 4096  # of the small tensors that say how others are to be read; bitsandbytes writes some 200
MAX_GROUPS = 64  # of a compressed-tensors config; models have one to three
MAX_SUFFIX = 3  # words after a parameter's name in that of its scale: gate_up_proj_input_scale_ub has three
SCALES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Quantised:
    """A checkpoint whose weights may be quantised.

    Attributes
    ----------
    weights : all its weights, by name.
    config : its config.json.
    settings : the config's ``quantization_config``, or {}.
    groups : what each group of a compressed-tensors config says of its weights.
    modules : the names in each module (what stands before the last point), in the files' order.
    scales : the tensors that are named like scales of a parameter, by that parameter's name.
    """

    weights: Weights
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    modules: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, weights: Weights, config: Mapping[str, Any]) -> Quantised:
        modules: dict[str, list[str]] = {}
        scales: dict[str, list[str]] = {}
        for name in weights:
            module, point, end = name.rpartition(".")
            modules.setdefault(module, []).append(name)
            if "scale" in end or "zero_point" in end:
                scales.setdefault(f"{module}.weight", []).append(name)
                for depth in range(1, MAX_SUFFIX + 1):
                    parts = end.rsplit("_", depth)
                    if len(parts) > depth and parts[0] != "weight":
                        scales.setdefault(module + point + parts[0], []).append(name)
        settings = settings_of(config)
        return cls(weights, config, settings, _groups(settings), _frozen(modules), _frozen(scales))

    @property
    def method(self) -> str:
        """What the config calls the method, or "" where it names none."""
        named = self.settings.get("quant_method")
        return named.lower() if isinstance(named, str) else ""

    def get(self, name: str) -> Weight | None:
        return self.weights.get(name)

    def partner(self, info: TensorInfo, name: str) -> Weight:
        """A tensor that another needs; raises CorruptFileError where it is missing."""
        partner = self.weights.get(name)
        if partner is None:
            raise CorruptFileError(info.file, f"what belongs to it is missing: {name!r}", info.name)
        return partner

    def belonging(self, module: str, *but: str) -> tuple[str, ...]:
        """The names in a module, and in what lies within its weight, but its bias."""
        names = self.modules.get(module, ()) + self.modules.get(f"{module}.weight", ())
        return tuple(name for name in names if name != f"{module}.bias" and name not in but)

    def conv1d(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the weight, quantised as (out, in), is one that its family stores as (in, out) otherwise.

        transformers turns these before they are quantised; the derived weight is turned back, as its siblings are.
        """
        module = name.removesuffix(".weight")
        if self.config.get("model_type") not in CONV1D_FAMILIES or module.split(".")[-1] not in CONV1D_MODULES:
            return False
        bias = self.weights.get(f"{module}.bias")
        return len(shape) == 2 and (bias is None or bias.shape == shape[:1])

    def derived(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: Iterable[TensorInfo],
        make: Make,
        how: str,
        quantised: str,
        *,
        linear: bool = False,
    ) -> Derived:
        """The record of a weight; ``linear`` says that its writer quantises a Conv1D as (out, in)."""
        used = tuple({info.name: info for info in sources}.values())
        if linear and self.conv1d(name, shape):
            shape, make = shape[::-1], _turned(make)
        return Derived(
            name, "F32", shape, used[0].file, used[0].span, tuple(info.name for info in used), make, how, quantised
        )

    def refused(self, name: str, reason: str, sources: Iterable[str]) -> Unreadable:
        """The record of a weight that is there, but not read."""
        used = tuple(dict.fromkeys(sources))
        first = self.weights[used[0]]
        return Unreadable(name, first.dtype, (), first.file, first.span, used, reason)


def _turned(make: Make) -> Make:
    def turned(read: Any, rows: slice | None) -> Any:
        whole = make(read, None).T
        return whole if rows is None else whole[rows]

    return turned


def _frozen(lists: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(names) for key, names in lists.items()}


def _groups(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The distinct ones; none where there are more than any model has."""
    said = settings.get("config_groups")
    weights = (
        [group.get("weights") for group in said.values() if isinstance(group, dict)] if isinstance(said, dict) else []
    )
    distinct = {repr(group): group for group in weights if isinstance(group, dict)}
    return tuple(distinct.values()) if len(distinct) <= MAX_GROUPS else ()


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of its quantisation; {} where it says nothing."""
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            settings = place.get(key) if isinstance(place, dict) else None
            if isinstance(settings, dict):
                return settings
    return {}


def expect(info: TensorInfo, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> TensorInfo:
    """The tensor itself.

    Raises
    ------
    CorruptFileError : it has none of these dtypes, or none of these shapes.
    """
    dtypes = tuple(dtypes)
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes) or "any shape"
        raise CorruptFileError(
            info.file,
            f"{info.dtype} of shape {list(info.shape)}; expected {' or '.join(dtypes)} of shape {wanted}",
            info.name,
        )
    return info


def small_bytes(info: TensorInfo) -> bytes:
    """The bytes of a small tensor that says how others are to be read.

    Raises
    ------
    CorruptFileError : it is not small, or could not be read.
    """
    begin, length = info.span
    if isinstance(info, ForeignTensor) and not info.as_stored and length <= MAX_SMALL_BYTES:
        return _bytes_of(info)
    if length > MAX_SMALL_BYTES:
        raise CorruptFileError(info.file, f"{length:,} bytes; expected at most {MAX_SMALL_BYTES:,}", info.name)
    try:
        with info.file.open("rb") as file:
            file.seek(begin)
            data = file.read(length)
    except OSError as error:
        raise CorruptFileError(info.file, f"could not be read: {error.strerror or error}", info.name) from None
    if len(data) != length:
        raise CorruptFileError(info.file, "the file changed while it was being read", info.name)
    return data


def _bytes_of(info: ForeignTensor) -> bytes:
    import torch

    content: bytes = info.value().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def small_json(info: TensorInfo) -> dict[str, Any]:
    """A JSON object that is stored as bytes in a tensor; raises as :func:`small_bytes` does."""
    try:
        value = json.loads(small_bytes(expect(info, ("U8", "I8"))).decode())
    except CorruptFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(info.file, f"not readable as JSON: {str(error)[:80]}", info.name) from None
    if not isinstance(value, dict):
        raise CorruptFileError(info.file, f"expected a JSON object, found a {type(value).__name__}", info.name)
    return value


def whole_numbers(info: TensorInfo) -> tuple[int, ...]:
    """The values of a small tensor of integers; raises as :func:`small_bytes` does."""
    width = {"I64": 8, "I32": 4, "U8": 1}[expect(info, ("I64", "I32", "U8")).dtype]
    raw = small_bytes(info)
    parts = [raw[at : at + width] for at in range(0, len(raw), width)]
    return tuple(int.from_bytes(part, "little", signed=width > 1) for part in parts)


def is_count(value: object, most: int = 2**31) -> bool:
    """Whether a value that a file gave is a whole number from 1 on; JSON's true is none."""
    return type(value) is int and 0 < value <= most


def blocks_of(length: int, size: int) -> int:
    """How many blocks of this size cover a length, the last of which may be shorter."""
    return math.ceil(length / size)
