"""Which rank, which alpha: the rank each layer's update really uses, and a PEFT config that would hold it.

Pure records and logic over singular values (schema ``spectra.ranks/1``).  A suggestion says what a LoRA of
that shape *could* hold of the change that was trained, at what cost.  That training it would find the same
change is no consequence.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.adapters.peft.naming import ModuleNames
from spectra.analysis import measures
from spectra.errors import UsageError
from spectra.records.report import as_dataframe, known_fields, module_type

if TYPE_CHECKING:
    import pandas

SCHEMA = "spectra.ranks/1"
ENERGY = 0.9
SCALING = 2.0  # alpha = 2r; Shuttleworth et al. 2024, arXiv 2410.21228
DIGITS = 7  # of the singular values kept: those of float32
CURVE = tuple(2**i for i in range(9))  # the ranks whose errors the table lists
# Which layers share a rank.
GROUPS: Mapping[str, Callable[[LayerRank], str]] = {
    "layer": lambda layer: layer.name,
    "type": lambda layer: layer.module_type,
    "model": lambda layer: "",
}

LEFT_OUT = {
    "embedding": "an embedding: LoRA usually leaves it as it is, modules_to_save would train it whole",
    "head": "a head: usually new or small, and trained whole by modules_to_save",
    "conv": "a convolution: only linear layers get a suggestion",
}
UNCHANGED = "unchanged"
TOO_THIN = "too thin: no low-rank update would be smaller than the weight"
PACKED = "a packed projection: PEFT adapts the attention it belongs to as one"


@dataclass(frozen=True)
class LayerRank:
    """What rank one layer's update dW = W1 − W0 uses.

    Attributes
    ----------
    name, module_type, role, shape : the layer, (m, n) as analysed.
    kind : of the update: "low_rank", "row_scaled" and "column_scaled" (DoRA), "hadamard" (LoHa), "kronecker" (LoKr),
        "scaled" (IA3), "rotated" (OFT, BOFT), "mixed" (GLoRA), "replaced_rows" (trainable tokens), "added",
        "dense", or "merged".
    trained_rank : the adapter's r, or None.
    parameters : values that the fine-tune stores for it.
    update_norm_fro, update_norm_relative : ‖dW‖_F, and over ‖W0‖_F (None where W0 is zero).
    rank_90, rank_99 : the smallest ranks that hold 90 and 99 % of ‖dW‖_F²; 0 where dW is zero.
    effective_rank, stable_rank : exp of the entropy of σ/Σσ (Roy & Vetterli 2007); ‖dW‖_F²/‖dW‖₂².
    noise_edge : the largest singular value that white noise of the size of dW's bulk would have, or None;
        see :func:`spectra.analysis.measures.noise_edge`.
    noise_rank : how many singular values lie above it.
    values : the leading singular values, (≤ break-even rank,), descending, to seven digits.
    rest_norm : the Frobenius norm of what all further ones hold.
    unnamed : why no config can name it, where its weight is no module of the base's own; else None.
    rescaled : whether dW also holds the rescaling of the base, as with DoRA.
    """

    name: str
    module_type: str
    role: str
    shape: tuple[int, int]
    kind: str
    trained_rank: int | None
    parameters: int
    update_norm_fro: float
    update_norm_relative: float | None
    rank_90: int
    rank_99: int
    effective_rank: float
    stable_rank: float
    noise_edge: float | None
    noise_rank: int | None
    values: tuple[float, ...] = field(repr=False)
    rest_norm: float
    unnamed: str | None = None
    rescaled: bool = False

    @property
    def dense_parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def break_even_rank(self) -> int:
        """The largest rank at which r·(m + n) < m·n."""
        return measures.break_even_rank(self.shape)

    def rank_at(self, energy: float) -> int | None:
        """The smallest rank that holds that share of ‖dW‖_F²; None where it is beyond the break-even rank."""
        rank = measures.rank_of_energy(np.array([*self.values, self.rest_norm]), energy)
        return rank if rank <= len(self.values) else None

    def error_at(self, rank: int) -> float:
        """‖dW − dW_r‖_F / ‖dW‖_F of the best approximation of rank r, up to the break-even rank.

        Raises
        ------
        UsageError : a higher rank, at which the values that would tell are not kept.
        """
        if rank > len(self.values) and self.rest_norm > 0:
            raise UsageError(f"{self.name}: rank {rank} is beyond its break-even rank {self.break_even_rank}")
        whole = measures.norm_fro(np.array([*self.values, self.rest_norm]))
        return measures.norm_fro(np.sort([*self.values[rank:], self.rest_norm])[::-1]) / whole if whole > 0 else 0.0

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """(r, relative error) for r = 1, 2, 4, 8, …: what a lower rank would lose."""
        return tuple((2**i, self.error_at(2**i)) for i in range(len(self.values).bit_length()))


def layer_rank(
    singular_values: np.ndarray,
    shape: tuple[int, int],
    *,
    name: str,
    role: str,
    kind: str,
    trained_rank: int | None,
    parameters: int,
    base_norm_fro: float,
) -> LayerRank:
    """The record of one layer from the singular values of dW (float64, descending; of a low-rank dW its r suffice)."""
    size = measures.norm_fro(singular_values)
    kept = min(singular_values.size, measures.break_even_rank(shape))
    # Only entries that were trained one by one have noise for a bulk: that of a rescaled or rotated base is none.
    edge = measures.noise_edge(singular_values, shape) if kind in ("dense", "merged") else None
    return LayerRank(
        name=name, module_type=module_type(name), role=role, shape=shape, kind=kind, trained_rank=trained_rank,
        parameters=parameters, update_norm_fro=size,
        update_norm_relative=size / base_norm_fro if base_norm_fro > 0 else None,
        rank_90=measures.rank_of_energy(singular_values, 0.9), rank_99=measures.rank_of_energy(singular_values, 0.99),
        effective_rank=measures.effective_rank(singular_values),
        stable_rank=measures.stable_rank(size, float(singular_values[0]) if singular_values.size else 0.0),
        noise_edge=edge, noise_rank=None if edge is None else int((singular_values > edge).sum()),
        values=tuple(_rounded(value) for value in singular_values[:kept]),
        rest_norm=_rounded(measures.norm_fro(singular_values[kept:])),
    )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _plain(value: float) -> float:  # as PEFT's own configs have it
    return int(value) if value == int(value) else value


@dataclass(frozen=True)
class Choice:
    """The rank suggested for one layer.

    ``scaling`` is what multiplies B·A; ``relative_error`` is ‖dW − dW_r‖_F/‖dW‖_F; ``capped`` says what kept
    the rank below the one asked for: "max_rank", "break_even" or None.
    """

    name: str
    rank: int
    alpha: float
    scaling: float
    relative_error: float
    capped: str | None
    parameters: int
    dense_parameters: int


@dataclass(frozen=True)
class Suggestion:
    """A LoRA config that could hold the change that was trained.

    Attributes
    ----------
    energy, max_rank, by, use_rslora, alpha_rule : what was asked for.
    r, lora_alpha, rank_pattern, alpha_pattern, target_modules, exclude_modules : as PEFT has them.
    choices : rank and alpha of each target, and what it loses.
    left_out : ``name`` and ``reason`` of each layer without.
    parameters, dense_parameters, trained_parameters : values in the suggested factors of all targets, in
        their weights, and in what the fine-tune stored for them.
    relative_error : (Σ‖dW − dW_r‖_F² / Σ‖dW‖_F²)^½ over the targets.
    left_out_share : the share of Σ‖dW‖_F² over all layers that lies in the layers left out.
    rescaled : how many targets are DoRA's, whose dW also holds the rescaling of the base.
    layer_replication : as PEFT has it, where the names are those of a model whose layers are ranges of the base's.
    """

    energy: float
    max_rank: int | None
    by: str
    use_rslora: bool
    alpha_rule: str
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...]
    choices: tuple[Choice, ...]
    left_out: tuple[Mapping[str, str], ...]
    parameters: int
    dense_parameters: int
    trained_parameters: int
    relative_error: float
    left_out_share: float
    rescaled: int
    layer_replication: tuple[tuple[int, int], ...] = ()

    def peft_config(self) -> dict[str, Any]:
        """The fragment that ``peft.LoraConfig(**fragment)`` takes."""
        config: dict[str, Any] = {
            "peft_type": "LORA", "r": self.r, "lora_alpha": self.lora_alpha,
            "rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora, "target_modules": list(self.target_modules),
        }  # fmt: skip
        if self.exclude_modules:
            config["exclude_modules"] = list(self.exclude_modules)
        if self.layer_replication:
            config["layer_replication"] = [list(ends) for ends in self.layer_replication]
        return config

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.peft_config()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Suggestion:
        choices = tuple(Choice(**choice) for choice in value["choices"])
        ranges = tuple((start, end) for start, end in value.get("layer_replication", ()))
        return cls(**{**known_fields(cls, value), "choices": choices, "layer_replication": ranges})


def suggest(
    layers: Sequence[LayerRank],
    *,
    energy: float = ENERGY,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    other_modules: Iterable[str] = (),
) -> Suggestion | None:
    """The smallest LoRA that holds ``energy`` of each layer's ‖dW‖_F²; None where no linear layer changed.

    Parameters
    ----------
    energy, max_rank : in (0, 1]; at least 1.  No rank goes beyond the layer's break-even rank either.
    by : which layers get the same rank, the highest that one of them needs: none ("layer"), those of a
        module "type", or all ("model").
    use_rslora : scale by alpha/√r (Kalajdzievski 2023, arXiv 2312.03732).
    alpha : a number, or a multiple of each layer's rank such as "2r".  By default "2r"; with rsLoRA the
        whole number, one for all layers, that brings the most common rank's scaling closest to 2.
    other_modules : further modules of the model, which short names in the config may not match.

    Raises
    ------
    UsageError : a value that makes no sense.
    """
    if not 0 < energy <= 1:
        raise UsageError(f"energy = {energy}; expected a share above 0 and up to 1")
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"max_rank = {max_rank}; expected at least 1")
    if by not in GROUPS:
        raise UsageError(f"by = {by!r}; expected one of {', '.join(GROUPS)}")
    multiple, fixed = _alpha_rule(alpha, use_rslora)
    left_out = [{"name": layer.name, "reason": reason} for layer in layers if (reason := why_not(layer))]
    targets = [layer for layer in layers if not why_not(layer)]
    if not targets:
        return None
    ranks = _ranks(targets, energy, max_rank, by)
    others = [*(item["name"] for item in left_out), *other_modules]
    names = ModuleNames({layer.name: layer.module_type for layer in targets}, others)
    r, rank_pattern = names.pattern(ranks)
    if multiple is not None:
        alphas = {name: _plain(multiple * rank) for name, rank in ranks.items()}
    else:
        common = fixed if fixed is not None else max(1, round(SCALING * math.sqrt(r)))
        alphas = dict.fromkeys(ranks, _plain(common))
    lora_alpha, alpha_pattern = names.pattern(alphas)
    root = math.sqrt if use_rslora else float
    choices = tuple(
        Choice(
            layer.name, rank, alphas[layer.name], alphas[layer.name] / root(rank), layer.error_at(rank),
            _capped(layer, rank, energy, max_rank), measures.lora_parameters(layer.shape, rank), layer.dense_parameters,
        )
        for layer, rank in zip(targets, ranks.values(), strict=True)
    )  # fmt: skip
    largest = max(layer.update_norm_fro for layer in layers)  # scaled, so that squares do not underflow
    sizes = np.array([layer.update_norm_fro for layer in targets]) / largest
    lost = np.array([choice.relative_error for choice in choices]) * sizes
    held, everything = float(np.sum(sizes**2)), sum((layer.update_norm_fro / largest) ** 2 for layer in layers)
    target_modules, exclude_modules = names.targets()
    return Suggestion(
        energy=energy, max_rank=max_rank, by=by, use_rslora=use_rslora,
        alpha_rule=f"{multiple:g}r" if multiple is not None else f"{lora_alpha:g}",
        r=r, lora_alpha=lora_alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
        target_modules=target_modules, exclude_modules=exclude_modules, choices=choices, left_out=tuple(left_out),
        parameters=sum(choice.parameters for choice in choices),
        dense_parameters=sum(choice.dense_parameters for choice in choices),
        trained_parameters=sum(layer.parameters for layer in targets),
        relative_error=math.sqrt(float(np.sum(lost**2)) / held),
        left_out_share=max(0.0, 1 - held / everything),
        rescaled=sum(layer.rescaled for layer in targets),
    )  # fmt: skip


def why_not(layer: LayerRank) -> str | None:
    """Why a layer gets no suggestion, or None."""
    if layer.role in LEFT_OUT:
        return LEFT_OUT[layer.role]
    if layer.name.endswith("in_proj_weight"):
        return PACKED
    if not layer.update_norm_fro > 0:
        return UNCHANGED
    return layer.unnamed or (None if layer.break_even_rank else TOO_THIN)


def _alpha_rule(alpha: str | float | None, use_rslora: bool) -> tuple[float | None, float | None]:
    """(multiple of the rank, fixed value), of which one at most is not None."""
    if alpha is None:
        return (None, None) if use_rslora else (SCALING, None)
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?\s*(r)?", str(alpha).strip())
    value = float(match[1] or 1) if match and (match[1] or match[2]) else 0.0
    if not (match and 0 < value < math.inf):
        raise UsageError(f"alpha = {alpha!r}; expected a positive number or a multiple of the rank such as 2r")
    return (value, None) if match[2] else (None, value)


def own_rank(layer: LayerRank, energy: float, max_rank: int | None) -> int:
    """The rank that :func:`suggest` gives a layer that shares it with no other."""
    return min(layer.rank_at(energy) or layer.break_even_rank, max_rank or layer.break_even_rank)


def _ranks(targets: Sequence[LayerRank], energy: float, max_rank: int | None, by: str) -> dict[str, int]:
    group, needs = GROUPS[by], defaultdict[str, int](int)
    for layer in targets:
        needs[group(layer)] = max(needs[group(layer)], own_rank(layer, energy, None))
    most = max_rank or max(needs.values())
    return {layer.name: min(needs[group(layer)], layer.break_even_rank, most) for layer in targets}


def _capped(layer: LayerRank, rank: int, energy: float, max_rank: int | None) -> str | None:
    needed = layer.rank_at(energy)
    if needed is not None and needed <= rank:
        return None
    return "max_rank" if rank == max_rank else "break_even"


ROW_COLUMNS = (
    "tuned", "layer", "module_type", "role", "rows", "columns", "kind", "trained_rank", "parameters",
    "dense_parameters", "update_norm_fro", "update_norm_relative", "rank_90", "rank_99", "effective_rank",
    "stable_rank", "noise_rank", "noise_edge", "break_even_rank", "suggested_rank", "suggested_alpha",
    "suggested_scaling", "suggested_parameters", "relative_error", "capped", *(f"error_at_{rank}" for rank in CURVE),
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class RankReport:
    """The ranks that one fine-tune uses, layer by layer, and the LoRA config they suggest.

    ``base``, ``tuned``, ``settings``, ``skipped``, ``spectra_version`` and ``seconds`` are as in a
    :class:`~spectra.records.report.Report`; ``failed`` has ``name``, ``status`` and ``error`` of the layers whose
    values could not be had.
    """

    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[LayerRank, ...]
    suggestion: Suggestion | None
    skipped: tuple[Mapping[str, str], ...]
    failed: tuple[Mapping[str, str], ...]
    spectra_version: str
    seconds: float | None = None

    def __repr__(self) -> str:
        r = None if self.suggestion is None else self.suggestion.r
        return f"<RankReport on {self.tuned.get('path')}: {len(self.layers)} layers, suggested r = {r}>"

    def to_dict(self, *, canonical: bool = False) -> dict[str, Any]:
        """JSON-ready objects (schema ``spectra.ranks/1``); ``canonical`` as for reports."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "spectra_version": self.spectra_version,
            "base": dict(self.base),
            "tuned": dict(self.tuned),
            "settings": dict(self.settings),
            "suggestion": None if self.suggestion is None else self.suggestion.to_dict(),
            "layers": [{**asdict(layer), "curve": layer.curve} for layer in self.layers],
            "skipped": [dict(item) for item in self.skipped],
            "failed": [dict(item) for item in self.failed],
            "seconds": self.seconds,
        }
        if canonical:
            del value["seconds"], value["base"]["path"], value["tuned"]["path"]
            value["settings"].pop("workers", None)
            for item in value["failed"]:
                del item["error"]
        return value

    def to_json(self, *, canonical: bool = False, indent: int | None = None) -> str:
        """The same as JSON text; on one line, since spectra are long."""
        return json.dumps(self.to_dict(canonical=canonical), indent=indent, allow_nan=False, default=list)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RankReport:
        """The report that :meth:`to_dict` made; raises UsageError for another schema."""
        if value.get("schema") != SCHEMA:
            raise UsageError(f"not a rank report of schema {SCHEMA} (its schema is {value.get('schema')!r})")
        suggestion = value["suggestion"]
        return cls(
            **{
                **known_fields(cls, value),
                "layers": tuple(LayerRank(**known_fields(LayerRank, layer)) for layer in value["layers"]),
                "suggestion": None if suggestion is None else Suggestion.from_dict(suggestion),
            }
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table behind the CSV and the DataFrame: ``ROW_COLUMNS``, one row a layer."""
        rows, choices = [], {choice.name: choice for choice in self.suggestion.choices} if self.suggestion else {}
        for layer in self.layers:
            choice = choices.get(layer.name)
            found: dict[str, Any] = {
                **{name: getattr(layer, name, None) for name in ROW_COLUMNS},
                "tuned": self.tuned.get("path"),
                "layer": layer.name,
                **dict(zip(("rows", "columns"), layer.shape, strict=True)),
                **{f"error_at_{rank}": error for rank, error in layer.curve if rank in CURVE},
            }
            if choice is not None:
                found |= {f"suggested_{name}": getattr(choice, name) for name in ("rank", "alpha", "scaling")}
                found["suggested_parameters"] = choice.parameters
                found |= {name: getattr(choice, name) for name in ("relative_error", "capped")}
            rows.append({name: found[name] for name in ROW_COLUMNS})
        return rows

    def to_dataframe(self) -> pandas.DataFrame:
        """:meth:`rows` as a DataFrame; needs pandas."""
        return as_dataframe(self.rows(), ROW_COLUMNS)
