"""The record of a repair: which singular vectors were scaled, what that changed, and how exactly it was written.

``repair.schema.json`` beside this file describes its JSON form (``spectra.repair/1``) and that of the
check of a written repair (``spectra.verification/1``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from spectra.errors import UsageError
from spectra.records.report import DECIDED_STATUSES, Report
from spectra.records.schemas import anywhere, as_dataframe, known_fields, read_schema
from spectra.records.shown import Layers, OfLayers

if TYPE_CHECKING:
    import pandas

SCHEMA = "spectra.repair/1"
VERIFICATION_SCHEMA = "spectra.verification/1"


@dataclass(frozen=True)
class ScaledVector:
    """One singular triplet (u, σ, v) of W1 that was scaled.

    Attributes
    ----------
    index : its 0-based rank in W1; 0 is the largest singular value.
    sigma : σ, in the units of W.
    scale : the λ asked for; 1 changes nothing, 0 removes the vector.
    scale_achieved : uᵀW'v/σ of the weights as written.
    sigma_after : scale_achieved · sigma.
    energy, energy_after : σ²/‖W1‖_F², and sigma_after²/‖W'‖_F².
    index_after : its rank in W', or None where it is below the leading ones that were computed.
    max_cosine : max |cos| over W0's singular vectors, or None where it was not needed.
    intruder : the verdict on it in W1.
    """

    index: int
    sigma: float
    scale: float
    scale_achieved: float
    sigma_after: float
    energy: float
    energy_after: float
    index_after: int | None
    max_cosine: float | None
    intruder: bool


@dataclass(frozen=True, repr=False)
class LayerRepair:
    """One layer of which vectors were chosen.

    Attributes
    ----------
    name, module_type, role, shape : the layer, (m, n) as analysed.
    kind : of the update: "low_rank", "row_scaled" and "column_scaled" (DoRA), "hadamard" (LoHa), "kronecker" (LoKr),
        "scaled" (IA3), "rotated" (OFT, BOFT), "mixed" (GLoRA), "replaced_rows" (trainable tokens), "added", "dense".
    vectors : those chosen, by rank.
    intruders_before, intruders_after : among the leading vectors of W1 and of W'.
    update_norm, update_norm_after : ‖dW‖_F and ‖dW'‖_F.
    update_change : ‖dW' − dW‖_F/‖dW‖_F; None where dW is zero.
    update_error, weight_error : how far what was written may lie from the formula's W' (Frobenius norm): its distance
        from W' along the vectors that were computed, plus a bound on what these are off; over ‖dW'‖_F and over ‖W'‖_F.
        None where that is nothing, 1e-6 of what it was before or less.
    residual : the largest of the triplets', relative to σ₁.
    rank, rank_after : of the low-rank part as stored; None for a dense one.
    parameters, parameters_after : values stored for the update.
    dtype : that of the values written, as safetensors names it ("F32", "BF16").
    noise_like_base : whether W0 is plain noise; None where nobody looked.
    notes : remarks on this layer.
    """

    name: str
    module_type: str
    role: str
    shape: tuple[int, int]
    kind: str
    vectors: tuple[ScaledVector, ...]
    intruders_before: int
    intruders_after: int
    update_norm: float
    update_norm_after: float
    update_change: float | None
    update_error: float | None
    weight_error: float | None
    residual: float
    rank: int | None
    rank_after: int | None
    parameters: int
    parameters_after: int
    dtype: str
    noise_like_base: bool | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        scaled = sum(vector.scale != 1 for vector in self.vectors)
        return f"<LayerRepair of {self.name}: {scaled} of {len(self.vectors)} vectors scaled>"

    @property
    def is_changed(self) -> bool:
        return any(vector.scale != 1 for vector in self.vectors)


ROW_COLUMNS = (
    "tuned", "layer", "module_type", "role", "rows", "columns", "kind", "index", "sigma", "max_cosine", "intruder",
    "scale", "scale_achieved", "sigma_after", "energy", "energy_after", "index_after", "layer_intruders_before",
    "layer_intruders_after", "update_norm", "update_norm_after", "update_change", "update_error", "weight_error",
    "residual", "rank", "rank_after", "parameters", "parameters_after", "dtype", "noise_like_base",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Repair(OfLayers[LayerRepair]):
    """What a repair did to one fine-tune.

    Attributes
    ----------
    base, source : facts on the base and the fine-tune, as ``base`` and ``tuned`` of a report.
    output : the same facts on what was written, or None of a dry run.
    settings : ``scale`` (a number, or {pattern: number}), ``which`` ("all", "top" or {pattern: [index]}),
        ``keep_rank``, ``merged``, ``dtype`` (None: float32, and float64 where stored so), and the audit's.
    layers : those of which vectors were chosen.
    audit : a report on the result, or None where none was made.
    intruders_before : in the source, outside noise-like bases; over all layers where one of these was changed.
    left_behind : file name → why it was not copied.
    remarks : what else whoever uses the result should know.
    spectra_version, seconds : what made it, and its wall time or None.
    """

    base: Mapping[str, Any]
    source: Mapping[str, Any]
    output: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    layers: tuple[LayerRepair, ...]
    audit: Report | None
    intruders_before: int
    left_behind: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    spectra_version: str = ""
    seconds: float | None = None

    def __repr__(self) -> str:
        return f"<Repair of {self.source.get('path')}: {len(self.scaled)} vectors in {len(self.changed)} layers>"

    @property
    def changed(self) -> tuple[LayerRepair, ...]:
        """The layers whose weight is not what it was."""
        return Layers(layer for layer in self.layers if layer.is_changed)

    @property
    def scaled(self) -> tuple[ScaledVector, ...]:
        """The vectors whose scale is not 1."""
        return tuple(vector for layer in self.layers for vector in layer.vectors if vector.scale != 1)

    @property
    def intruders_after(self) -> int:
        """In the result; over the layers that ``intruders_before`` counts."""
        if self.audit is not None:
            return self.audit.total("all" if any(layer.noise_like_base for layer in self.layers) else "judged")
        return self.intruders_before + sum(layer.intruders_after - layer.intruders_before for layer in self.layers)

    @property
    def layers_decided(self) -> int | None:
        """How many layers the audit reached a verdict on; None without an audit."""
        return None if self.audit is None else sum(item.status in DECIDED_STATUSES for item in self.audit.layers)

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over the changed layers; see ``repair.schema.json`` for each field."""
        changed, scaled = self.changed, self.scaled
        return {
            "vectors_scaled": len(scaled),
            "intruders_scaled": sum(vector.intruder for vector in scaled),
            "layers_changed": len(changed),
            "layers_decided": self.layers_decided,
            "layers_noise_like_base": sum(bool(layer.noise_like_base) for layer in changed),
            "intruders_before": self.intruders_before,
            "intruders_after": self.intruders_after,
            "update_change": _together(changed),
            "scale_error": _largest(abs(vector.scale_achieved - vector.scale) for vector in scaled),
            "update_error": _largest(layer.update_error for layer in changed),
            "weight_error": _largest(layer.weight_error for layer in changed),
            "parameters": sum(layer.parameters for layer in changed),
            "parameters_after": sum(layer.parameters_after for layer in changed),
        }

    def to_dict(self, *, canonical: bool = False) -> dict[str, Any]:
        """JSON-ready objects (schema ``spectra.repair/1``); ``canonical`` as for reports."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "spectra_version": self.spectra_version,
            "base": dict(self.base),
            "source": dict(self.source),
            "output": None if self.output is None else dict(self.output),
            "settings": dict(self.settings),
            "summary": self.summary,
            "layers": [asdict(layer) for layer in self.layers],
            "audit": None if self.audit is None else self.audit.to_dict(canonical=canonical),
            "intruders_before": self.intruders_before,
            "left_behind": dict(self.left_behind),
            "remarks": list(self.remarks),
            "seconds": self.seconds,
        }
        if canonical:
            del value["seconds"]
            for name in ("base", "source", "output"):
                value[name] = None if value[name] is None else anywhere(value[name])
            value["settings"].pop("workers", None)
        return value

    def to_json(self, *, canonical: bool = False, indent: int | None = 1) -> str:
        """The record as JSON text; infinities and NaN cannot occur in it."""
        return json.dumps(self.to_dict(canonical=canonical), indent=indent, allow_nan=False, default=list)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Repair:
        """The record that :meth:`to_dict` made (canonical or not); raises UsageError for another schema."""
        if value.get("schema") != SCHEMA:
            raise UsageError(f"not a record of a repair, schema {SCHEMA} (its schema is {value.get('schema')!r})")
        layers = []
        for layer in value["layers"]:
            vectors = tuple(ScaledVector(**known_fields(ScaledVector, vector)) for vector in layer["vectors"])
            layers.append(LayerRepair(**{**known_fields(LayerRepair, layer), "vectors": vectors}))
        audit = value["audit"]
        return cls(
            **{
                **known_fields(cls, value),
                "layers": tuple(layers),
                "audit": None if audit is None else Report.from_dict(audit),
            }
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table behind the CSV and the DataFrame: ``ROW_COLUMNS``, one row a chosen vector."""
        rows = []
        for layer in self.layers:
            common = {
                **{name: getattr(layer, name, None) for name in ROW_COLUMNS},
                "tuned": self.source.get("path"),
                "layer": layer.name,
                **dict(zip(("rows", "columns"), layer.shape, strict=True)),
                "layer_intruders_before": layer.intruders_before,
                "layer_intruders_after": layer.intruders_after,
            }
            rows += [{**common, **asdict(vector)} for vector in layer.vectors]
        return rows

    def to_dataframe(self) -> pandas.DataFrame:
        """:meth:`rows` as a DataFrame; needs pandas."""
        return as_dataframe(self.rows(), ROW_COLUMNS)


@dataclass(frozen=True)
class LayerCheck:
    """One layer of a written repair held against the formula.

    Attributes
    ----------
    name : the layer.
    error : ‖W as it lies there − W' of the formula‖_F over the larger of ‖W'‖_F and ‖W0‖_F; 0 where it was not to be
        changed, and lies there bit by bit; None where it was not to be changed and differs, or is missing.
    tolerance : how large it may be.
    holds : whether it is not larger.
    """

    name: str
    error: float | None
    tolerance: float
    holds: bool


@dataclass(frozen=True, repr=False)
class Verification(OfLayers[LayerCheck]):
    """Whether a folder holds the repair that its record describes.

    Attributes
    ----------
    folder, source : the repair, and the fine-tune it was made from.
    layers : every layer that was compared, changed or not.
    problems : what else is not as recorded, a line each.
    """

    folder: str
    source: str
    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Verification of {self.folder}: {'holds' if self.holds else 'does not hold'}>"

    @property
    def holds(self) -> bool:
        """Whether every layer holds and nothing else is amiss."""
        return not self.problems and all(layer.holds for layer in self.layers)

    @property
    def failed(self) -> tuple[LayerCheck, ...]:
        """Layers that are not as recorded."""
        return Layers(layer for layer in self.layers if not layer.holds)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready objects (schema ``spectra.verification/1``)."""
        return {"schema": VERIFICATION_SCHEMA, "holds": self.holds, **asdict(self)}

    def to_json(self, *, indent: int | None = 1) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Verification:
        """The check that :meth:`to_dict` made; raises UsageError for another schema."""
        if value.get("schema") != VERIFICATION_SCHEMA:
            raise UsageError(f"not a check of schema {VERIFICATION_SCHEMA} (its schema is {value.get('schema')!r})")
        layers = tuple(LayerCheck(**known_fields(LayerCheck, layer)) for layer in value["layers"])
        return cls(**{**known_fields(cls, value), "layers": layers})

    def rows(self) -> list[dict[str, Any]]:
        """The table behind the CSV: one row a layer."""
        return [{"folder": self.folder, "layer": item.pop("name"), **item} for item in map(asdict, self.layers)]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of :meth:`Repair.to_dict`; it refers to the reports' own.

    That of :meth:`Verification.to_dict` is its ``$defs.verification``.
    """
    return read_schema("repair.schema.json")


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _together(layers: Iterable[LayerRepair]) -> float | None:
    """(Σ‖dW' − dW‖_F²/Σ‖dW‖_F²)^½; None where nothing changed."""
    known = [(layer.update_change * layer.update_norm, layer.update_norm)
             for layer in layers if layer.update_change is not None]  # fmt: skip
    whole = math.hypot(*(size for _, size in known))
    return math.hypot(*(change for change, _ in known)) / whole if whole > 0 else None
