"""Adapters of MLX: ``adapters.safetensors`` beside an ``adapter_config.json`` of MLX's own.

``lora_a`` is (in, r) and ``lora_b`` (r, out): dW = scale · (lora_a · lora_b)ᵀ, and the scale is absolute, over no rank.
Of stacked experts they are (E, r, in) and (E, out, r): dW = scale · lora_b · lora_a for each.  DoRA has the magnitudes
``m`` (out,) besides, of embeddings one a token.  A full fine-tune is stored in such a folder, too: the trained weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.adapters.factors import StoredFactors, common_facts
from spectra.adapters.full import whole_tensor
from spectra.adapters.plan import Plan, PlannedUpdate, Skipped
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import Checkpoint, TensorInfo
from spectra.files.orientation import Layout, role_of
from spectra.files.stored.experts import MAX_EXPERTS, members

if TYPE_CHECKING:
    import torch

    from spectra.updates.algebra import Update

_KEY = re.compile(r"(?P<module>.+)\.(?P<factor>lora_a|lora_b|m)")
_SWITCH = re.compile(r"(?P<home>.+)\.(?:switch_mlp|experts)\.(?P<part>[^.]+)")
_LETTERS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # what some models call these, an expert a file
KNOWN_PARAMETERS = frozenset(["rank", "scale", "alpha", "dropout", "keys"])


class MlxAdapter:
    """What ``mlx_lm.lora`` writes for the fine-tune types lora, dora and full."""

    name = "mlx"
    reads = (("MLX: LoRA, DoRA, experts, full", "W0 + scale·(ab)ᵀ"),)

    def recognises(self, tuned: Checkpoint) -> bool:
        config = tuned.adapter_config
        if config is None or "peft_type" in config:
            return False
        own = "lora_parameters" in config or "fine_tune_type" in config
        return own or tuned.layout == "mlx folder" or any(name.endswith(".lora_a") for name in tuned.tensors)

    def plan(self, tuned: Checkpoint) -> Plan:
        config = _Config(tuned)
        if config.kind == "full":
            return _full(tuned, config)
        modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        skipped: list[Skipped] = []
        for key, info in tuned.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UnsupportedMethodError(
                    info.file, "neither lora_a nor lora_b of MLX nor a magnitude: this version cannot read it", key
                )
            modules[match["module"]][match["factor"]] = info
        updates: list[StoredFactors] = []
        for module, slot in modules.items():
            match = _SWITCH.fullmatch(module)
            if not any(len(info.shape) == 3 for info in slot.values()):
                updates.append(_update(config, module, slot))
            elif match is not None:
                updates += _experts(config, module, slot, match)
            else:
                skipped += [
                    Skipped(info.name, "stacked experts under a name that is not known", "not_read")
                    for info in slot.values()
                ]
        facts = {**common_facts(updates), "use_dora": config.use_dora, "base_model_name_or_path": config.model}
        return Plan("mlx-dora" if config.use_dora else "mlx-lora", tuple(updates), tuple(skipped), facts)


def _full(tuned: Checkpoint, config: _Config) -> Plan:
    """Trained weights under the names of MLX's model."""
    updates: list[PlannedUpdate] = []
    skipped: list[Skipped] = []
    for name, info in tuned.tensors.items():
        match = _SWITCH.fullmatch(name.removesuffix(".weight"))
        if match is not None and len(info.shape) == 3 and info.is_float and 0 < info.shape[0] <= MAX_EXPERTS:
            cut = members(info, f"{match['home']}.experts", match["part"], turned=False)
            planned = [whole_tensor(member, member.name) for member in cut]
        elif len(info.shape) > 2:
            reason = (
                "more than two dimensions: a convolution, whose channels MLX stores last, or experts unknown by name"
            )
            planned = [Skipped(name, reason, "not_read")]
        else:
            planned = [whole_tensor(info, name)]
        for item in planned:
            if isinstance(item, Skipped):
                skipped.append(replace(item, name=name))
            else:
                updates.append(item)
    facts = {"rank": None, "alpha": None, "scaling": None, "base_model_name_or_path": config.model}
    return Plan("mlx-full", tuple(updates), tuple(skipped), facts)


@dataclass(frozen=True)
class ExpertFactors(StoredFactors):
    """The factors of one expert: its slices of lora_a (E, r, in), or (E·r, in), and of lora_b (E, out, r)."""

    expert: int = 0

    @property
    def rank(self) -> int:
        return self.up[0].shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up[0].shape[1], self.down[0].shape[-1]

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)

    def read(self, checkpoint: Checkpoint, layout: Layout, rows: int | None, dtype: torch.dtype, device: str) -> Update:
        from spectra.updates.algebra import LowRank

        A, B = (checkpoint.read(info.name, digest=True) for info in (*self.down, *self.up))
        A = A.reshape(B.shape[0], self.rank, -1)[self.expert].to(device=device).double()
        return LowRank(B[self.expert].to(device=device).double(), A, self.scaling)


def _experts(
    config: _Config, module: str, slot: dict[str, TensorInfo], match: re.Match[str]
) -> Iterator[ExpertFactors]:
    """The updates of stacked experts, one an expert, under the names that their weights have by themselves."""
    _check(config, module, slot)
    A, B = slot["lora_a"], slot["lora_b"]
    if len(B.shape) != 3 or len(A.shape) not in (2, 3) or B.size == 0 or B.shape[0] > MAX_EXPERTS:
        expected = f"(experts, out, r), of {MAX_EXPERTS} experts at most"
        raise AdapterError(B.file, f"expected {expected}, found shape {list(B.shape)}", B.name)
    count, _, rank = B.shape
    _check_rank(config, B, rank, "third")
    if A.shape[:-1] not in ((count, rank), (count * rank,)):
        raise AdapterError(A.file, f"expected ({count}, {rank}, in), found shape {list(A.shape)}", A.name)
    if config.use_dora:
        raise UnsupportedMethodError(A.file, "MLX has no DoRA of stacked experts", A.name)
    home, part = f"{match['home']}.experts", match["part"]
    for expert in range(count):
        name = f"{home}.{expert}.{part}"
        others = [f"{home}.{expert}.{_LETTERS[part]}.weight"] if part in _LETTERS else []
        yield ExpertFactors(
            module=name,
            targets=(f"{name}.weight", *others),
            down=(A,),
            up=(B,),
            alpha=None,
            scaling=config.scale,
            notes=(*config.notes, f"expert {expert} of {module}"),
            expert=expert,
        )


def _check(config: _Config, module: str, slot: dict[str, TensorInfo]) -> None:
    """Raises AdapterError where a factor is missing or no number."""
    present = next(iter(slot.values()))
    for factor in ("lora_a", "lora_b"):
        if factor not in slot:
            raise AdapterError(present.file, f"its partner {module}.{factor} is missing", present.name)
    for info in slot.values():
        if not info.is_float:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)


def _check_rank(config: _Config, info: TensorInfo, rank: int, dimension: str) -> None:
    if rank != config.rank:
        raise AdapterError(
            info.file, f"its {dimension} dimension is {rank}, but the config gives rank = {config.rank}", info.name
        )


def _update(config: _Config, module: str, slot: dict[str, TensorInfo]) -> StoredFactors:
    _check(config, module, slot)
    A, B, magnitude = slot["lora_a"], slot["lora_b"], slot.get("m")
    for info in (A, B):
        if len(info.shape) != 2 or info.size == 0:
            raise AdapterError(info.file, f"expected a matrix, found shape {list(info.shape)}", info.name)
    rank = A.shape[1]
    if B.shape[0] != rank:
        raise AdapterError(B.file, f"its first dimension is {B.shape[0]}, but {A.name!r} has rank {rank}", B.name)
    _check_rank(config, A, rank, "second")
    if config.use_dora != (magnitude is not None):
        stored = "none" if magnitude is None else "one"
        raise AdapterError(
            A.file, f"the config's fine_tune_type is {config.kind}, but of m there is {stored} for this module", A.name
        )
    embedding = role_of(module, 2) == "embedding"
    if magnitude is not None:
        count = A.shape[0] if embedding else B.shape[1]  # of an embedding, one a token
        if magnitude.shape != (count,):
            raise AdapterError(
                magnitude.file, f"expected {count} magnitudes, found {list(magnitude.shape)}", magnitude.name
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
        by_columns=embedding,
        layout="embedding" if embedding else None,
        notes=config.notes,
    )


class _Config:
    """MLX's ``adapter_config.json``: what was given to the trainer, of which little concerns the tensors."""

    def __init__(self, tuned: Checkpoint):
        assert tuned.adapter_config is not None
        self.file = tuned.adapter_config_file
        values = tuned.adapter_config
        self.kind = values.get("fine_tune_type") or "lora"
        if self.kind not in ("lora", "dora", "full"):
            raise UnsupportedMethodError(
                self.file,
                f"fine_tune_type = {str(self.kind)[:80]!r} cannot be read by this version (lora, dora and full can)",
            )
        self.use_dora = self.kind == "dora"
        named = values.get("model")
        self.model = named if isinstance(named, str) else None
        if self.kind == "full":
            return
        parameters = values.get("lora_parameters")
        if parameters is None and "rank" in values and "alpha" in values:
            raise UnsupportedMethodError(
                self.file,
                "an adapter of mlx-vlm: its config has alpha and rank, but no lora_parameters with a scale as mlx-lm's "
                "has, and how they scale is not known here",
            )
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
