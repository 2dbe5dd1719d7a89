"""The values of ``adapter_config.json``, each checked as it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spectra.adapters.peft.pattern import Pattern
from spectra.errors import AdapterError
from spectra.files.checkpoint import Checkpoint

# Config fields of any method that do not change what the stored tensors mean, or are read for all.
COMMON_FIELDS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "fan_in_fan_out",
    ]
)

# Options that other tools write into the config, and that change no weight: whose they are, and what they are for.
INERT = {
    "lora_dtype": "ms-swift's: the precision that the factors were trained in",
    "lorap_lr_ratio": "ms-swift's: the learning rate of LoRA+",
    "lorap_emb_lr": "ms-swift's: the learning rate of LoRA+",
    "loraplus_lr_ratio": "LoRA+: its learning rate",
    "loraplus_lr_embedding": "LoRA+: its learning rate",
    "model_key_mapping": "ms-swift's: the names of a model's parts",
    "_from_model_config": "transformers': where the config came from",
    "merge_weights": "an early peft's: whether to merge when loading",
    "runtime_config": "peft's: how the factors are loaded",
    "ephemeral_gpu_offload": "peft's: where the factors lie in training",
}


class ConfigFields:
    """The values of ``adapter_config.json``, each checked as it is asked for."""

    def __init__(self, tuned: Checkpoint):
        assert tuned.adapter_config is not None
        self.file = tuned.adapter_config_file
        self.values = tuned.adapter_config

    def whole(self, key: str, default: int) -> int:
        """A whole number, at least 0."""
        value = self.number(key, self.values.get(key, default))
        if value < 0 or value != int(value):
            raise AdapterError(self.file, f"{key} = {value:g}; expected a whole number")
        return int(value)

    def number(self, key: str, value: Any) -> float:
        """A number that is no boolean, of sane size."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -1e15 < value < 1e15:
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r}; expected a number")
        return float(value) if isinstance(value, float) else value

    def switch(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r}; expected true or false")
        return bool(value)

    def pattern(self, key: str) -> Pattern:
        """Numbers by patterns of module names."""
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(self.file, f"{key} is not an object")
        return Pattern(
            self.file, {name: self.number(f"{key} for {name[:80]!r}", value) for name, value in pattern.items()}
        )


def common(values: Iterable[Any]) -> Any:
    """The value that all share, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
