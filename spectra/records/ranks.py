"""The ranks that a fine-tune uses, and the LoRA config that they suggest (schema ``spectra.ranks/1``).

How ranks are chosen is :mod:`spectra.analysis.ranks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import UsageError
from spectra.records.coverage import Coverage, coverage_of
from spectra.records.energy import break_even_rank, norm_fro, rank_of_energy
from spectra.records.schemas import anywhere, as_dataframe, known_fields
from spectra.records.shown import OfLayers

if TYPE_CHECKING:
    import pandas

SCHEMA = "spectra.ranks/1"
CURVE = tuple(2**i for i in range(9))  # the ranks whose errors the table lists


@dataclass(frozen=True, repr=False)
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
    values: tuple[float, ...]
    rest_norm: float
    unnamed: str | None = None
    rescaled: bool = False

    def __repr__(self) -> str:
        return f"<LayerRank of {self.name}: rank {self.rank_90} for 90 % of the update, {self.rank_99} for 99 %>"

    @property
    def dense_parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def break_even_rank(self) -> int:
        """The largest rank at which r·(m + n) < m·n."""
        return break_even_rank(self.shape)

    def rank_at(self, energy: float) -> int | None:
        """The smallest rank that holds that share of ‖dW‖_F²; None where it is beyond the break-even rank."""
        rank = rank_of_energy(np.array([*self.values, self.rest_norm]), energy)
        return rank if rank <= len(self.values) else None

    def error_at(self, rank: int) -> float:
        """‖dW − dW_r‖_F / ‖dW‖_F of the best approximation of rank r, up to the break-even rank.

        Raises
        ------
        UsageError : a higher rank, at which the values that would tell are not kept.
        """
        if rank > len(self.values) and self.rest_norm > 0:
            raise UsageError(f"{self.name}: rank {rank} is beyond its break-even rank {self.break_even_rank}")
        whole = norm_fro(np.array([*self.values, self.rest_norm]))
        return norm_fro(np.sort([*self.values[rank:], self.rest_norm])[::-1]) / whole if whole > 0 else 0.0

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """(r, relative error) for r = 1, 2, 4, 8, …: what a lower rank would lose."""
        return tuple((2**i, self.error_at(2**i)) for i in range(len(self.values).bit_length()))


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


@dataclass(frozen=True, repr=False)
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
    task_type : as PEFT has it ("SEQ_CLS", "CAUSAL_LM"), where the fine-tune's own config tells; else None.
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
    task_type: str | None = None

    def __repr__(self) -> str:
        return (
            f"<Suggestion of rank {self.r} for {len(self.choices)} layers: {self.parameters:,} parameters, "
            f"{self.relative_error:.1%} of the update lost>"
        )

    def peft_config(self) -> dict[str, Any]:
        """The fragment that ``peft.LoraConfig(**fragment)`` takes."""
        config: dict[str, Any] = {
            "peft_type": "LORA", "r": self.r, "lora_alpha": self.lora_alpha,
            "rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora, "target_modules": list(self.target_modules),
        }  # fmt: skip
        if self.task_type is not None:
            config["task_type"] = self.task_type
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


ROW_COLUMNS = (
    "tuned", "layer", "module_type", "role", "rows", "columns", "kind", "trained_rank", "parameters",
    "dense_parameters", "update_norm_fro", "update_norm_relative", "rank_90", "rank_99", "effective_rank",
    "stable_rank", "noise_rank", "noise_edge", "break_even_rank", "suggested_rank", "suggested_alpha",
    "suggested_scaling", "suggested_parameters", "relative_error", "capped", *(f"error_at_{rank}" for rank in CURVE),
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class RankReport(OfLayers[LayerRank]):
    """The ranks that one fine-tune uses, layer by layer, and the LoRA config they suggest.

    ``base``, ``tuned``, ``settings``, ``skipped``, ``spectra_version`` and ``seconds`` are as in a
    :class:`~spectra.records.report.Report`; ``failed`` has ``name``, ``status``, ``error`` and
    ``parameters`` of the layers whose values could not be computed.
    """

    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[LayerRank, ...]
    suggestion: Suggestion | None
    skipped: tuple[Mapping[str, Any], ...]
    failed: tuple[Mapping[str, Any], ...]
    spectra_version: str
    seconds: float | None = None

    def __repr__(self) -> str:
        r = None if self.suggestion is None else self.suggestion.r
        return f"<RankReport on {self.tuned.get('path')}: {len(self.layers)} layers, suggested r = {r}>"

    @property
    def coverage(self) -> Coverage:
        """How much of the fine-tune the report is about."""
        analysed = (layer.parameters for layer in self.layers)
        return coverage_of(analysed, (item["parameters"] for item in self.failed), self.skipped)

    def to_dict(self, *, canonical: bool = False) -> dict[str, Any]:
        """JSON-ready objects (schema ``spectra.ranks/1``); ``canonical`` as for reports."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "spectra_version": self.spectra_version,
            "base": dict(self.base),
            "tuned": dict(self.tuned),
            "settings": dict(self.settings),
            "coverage": self.coverage.to_dict(),
            "suggestion": None if self.suggestion is None else self.suggestion.to_dict(),
            "layers": [{**asdict(layer), "curve": layer.curve} for layer in self.layers],
            "skipped": [dict(item) for item in self.skipped],
            "failed": [dict(item) for item in self.failed],
            "seconds": self.seconds,
        }
        if canonical:
            del value["seconds"]
            value["base"], value["tuned"] = anywhere(value["base"]), anywhere(value["tuned"])
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
            row: dict[str, Any] = {
                **{name: getattr(layer, name, None) for name in ROW_COLUMNS},
                "tuned": self.tuned.get("path"),
                "layer": layer.name,
                **dict(zip(("rows", "columns"), layer.shape, strict=True)),
                **{f"error_at_{rank}": error for rank, error in layer.curve if rank in CURVE},
            }
            if choice is not None:
                row |= {f"suggested_{name}": getattr(choice, name) for name in ("rank", "alpha", "scaling")}
                row["suggested_parameters"] = choice.parameters
                row |= {name: getattr(choice, name) for name in ("relative_error", "capped")}
            rows.append({name: row[name] for name in ROW_COLUMNS})
        return rows

    def to_dataframe(self) -> pandas.DataFrame:
        """:meth:`rows` as a DataFrame; needs pandas."""
        return as_dataframe(self.rows(), ROW_COLUMNS)
