"""Adapters of MLX: ``adapters.safetensors`` beside an ``adapter_config.json`` of MLX's own.

``lora_a`` is (in, r) and ``lora_b`` (r, out): dW = scale · (lora_a · lora_b)ᵀ, and the scale is absolute, over no rank.
DoRA has the magnitudes ``m`` (out,) besides.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from spectra.adapters.factors import StoredFactors, common_facts
from spectra.adapters.plan import Plan, Skipped
from spectra.checkpoint import Checkpoint, TensorInfo
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.orientation import role_of

_KEY = re.compile(r"(?P<module>.+)\.(?P<factor>lora_a|lora_b|m)")
KNOWN_PARAMETERS = frozenset(["rank", "scale", "alpha", "dropout", "keys"])


class MlxAdapter:
    """What ``mlx_lm.lora`` writes for the fine-tune types lora and dora."""

    name = "mlx"

    def recognises(self, tuned: Checkpoint) -> bool:
        config = tuned.adapter_config
        if config is None or "peft_type" in config:
            return False
        own = "lora_parameters" in config or "fine_tune_type" in config
        return own or tuned.layout == "mlx folder" or any(name.endswith(".lora_a") for name in tuned.tensors)

    def plan(self, tuned: Checkpoint) -> Plan:
        config = _Config(tuned)
        modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        skipped: list[Skipped] = []
        for key, info in tuned.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UnsupportedMethodError(
                    info.file, "neither lora_a nor lora_b of MLX nor a magnitude: this version cannot read it", key
                )
            modules[match["module"]][match["factor"]] = info
        updates = []
        for module, slot in modules.items():
            if all(len(info.shape) == 3 for info in slot.values()):
                reason = "stacked experts are not split in this version"
                skipped += [Skipped(info.name, reason) for info in slot.values()]
            else:
                updates.append(_update(config, module, slot))
        facts = {**common_facts(updates), "use_dora": config.use_dora, "base_model_name_or_path": config.model}
        return Plan("mlx-dora" if config.use_dora else "mlx-lora", tuple(updates), tuple(skipped), facts)


def _update(config: _Config, module: str, slot: dict[str, TensorInfo]) -> StoredFactors:
    present = next(iter(slot.values()))
    for factor in ("lora_a", "lora_b"):
        if factor not in slot:
            raise AdapterError(present.file, f"its partner {module}.{factor} is missing", present.name)
    A, B, magnitude = slot["lora_a"], slot["lora_b"], slot.get("m")
    for info in slot.values():
        if not info.is_float:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
    for info in (A, B):
        if len(info.shape) != 2 or info.size == 0:
            raise AdapterError(info.file, f"expected a matrix, found shape {list(info.shape)}", info.name)
    rank = A.shape[1]
    if B.shape[0] != rank:
        raise AdapterError(B.file, f"its first dimension is {B.shape[0]}, but {A.name!r} has rank {rank}", B.name)
    if rank != config.rank:
        raise AdapterError(A.file, f"its second dimension is {rank}, but the config gives rank = {config.rank}", A.name)
    if config.use_dora != (magnitude is not None):
        found = "none" if magnitude is None else "one"
        raise AdapterError(
            A.file, f"the config's fine_tune_type is {config.kind}, but of m there is {found} for this module", A.name
        )
    embedding = role_of(module, 2) == "embedding"
    if magnitude is not None:
        if embedding:
            raise UnsupportedMethodError(
                magnitude.file, "DoRA of an embedding in MLX scales each token: this version cannot read it",
                magnitude.name,
            )  # fmt: skip
        if magnitude.shape != (B.shape[1],):
            raise AdapterError(
                magnitude.file, f"expected {B.shape[1]} magnitudes, found {list(magnitude.shape)}", magnitude.name
            )
    return StoredFactors(
        module=module,
        targets=(f"{module}.weight",),
        down=(A,),
        up=(B,),
        alpha=None,
        scaling=config.scale,
        magnitude=magnitude,
        transposed=True,
        layout="embedding" if embedding else None,
        notes=config.notes,
    )


class _Config:
    """MLX's ``adapter_config.json``: what was given to the trainer, of which little concerns the tensors."""

    def __init__(self, tuned: Checkpoint):
        assert tuned.adapter_config is not None
        home = tuned.path if tuned.path.is_dir() else tuned.path.parent
        self.file = home / "adapter_config.json"
        values = tuned.adapter_config
        self.kind = values.get("fine_tune_type") or "lora"
        if self.kind not in ("lora", "dora"):
            raise UnsupportedMethodError(
                self.file,
                f"fine_tune_type = {str(self.kind)[:80]!r} cannot be read by this version (lora and dora can)",
            )
        self.use_dora = self.kind == "dora"
        parameters = values.get("lora_parameters")
        if not isinstance(parameters, Mapping):
            raise AdapterError(self.file, "lora_parameters is missing; without it the scale is unknown")
        for key, value in parameters.items():
            if key not in KNOWN_PARAMETERS and value:
                raise UnsupportedMethodError(
                    self.file, f"the option {key[:80]} = {str(value)[:80]!r} cannot be read by this version"
                )
        self.rank = self._number(parameters, "rank")
        self.scale = self._number(parameters, "scale")
        self.notes = self._about_alpha(parameters, "num_layers" in values or "fine_tune_type" in values)
        named = values.get("model")
        self.model = named if isinstance(named, str) else None

    def _number(self, parameters: Mapping[str, object], key: str) -> float:
        value = parameters.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e15 < value < 1e15:
            raise AdapterError(self.file, f"{key} = {str(value)[:80]!r} in lora_parameters; expected a number")
        return value

    def _about_alpha(self, parameters: Mapping[str, object], recent: bool) -> tuple[str, ...]:
        """Notes; earlier versions of mlx-lm multiplied the scale by alpha/rank, later ones kept alpha in the config."""
        if parameters.get("alpha") is None:
            return ()
        alpha = self._number(parameters, "alpha")
        if alpha == self.rank or not self.rank:
            return ()
        other = self.scale * alpha / self.rank
        if not recent:
            raise UnsupportedMethodError(
                self.file,
                f"alpha = {alpha:g} in lora_parameters: the scale could be {self.scale:g}, or {other:g} "
                "(scale·alpha/rank, as earlier versions of mlx-lm had it); put the one that is meant there "
                "and take alpha out",
            )
        return (
            f"the config has alpha = {alpha:g} besides; mlx-lm takes the scale {self.scale:g} alone, and so does this "
            f"report (its earliest versions took scale·alpha/rank = {other:g})",
        )
