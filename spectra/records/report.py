"""The report: everything an audit found, versioned (``spectra.report/1``) and serialisable.

Renderers and gates read this record alone.  ``report.schema.json`` beside this file describes its
JSON form.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spectra.errors import UsageError
from spectra.records.chance import ExpectedByChance, expected_by_chance
from spectra.records.coverage import Coverage, coverage_of
from spectra.records.layer import Vector
from spectra.records.schemas import anywhere, as_dataframe, known_fields, read_schema
from spectra.records.shown import Layers, OfLayers

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


SCHEMA = "spectra.report/1"
FAILED_STATUSES = frozenset({"non_finite", "not_converged", "failed"})
DECIDED_STATUSES = frozenset({"analysed", "proved_small"})
# Which layers a total counts.  Judged are those whose base is no plain noise, in which anything moves the vectors; the
# paper looks at no embeddings and no heads.
SCOPES = ("judged", "all", "paper", "new")

# The intruder levels: the largest share of judged vectors that may be intruders at each.  A convention of this project,
# to put a number into words for gates and tables; it says how much of the top of the spectrum is new, and nothing of
# how much was forgotten.
LEVELS = ((0.0, "none"), (0.01, "slight"), (0.10, "moderate"), (1.0, "strong"))
CANNOT_TELL = "cannot tell"  # of a fine-tune of which no vector could be judged


@dataclass(frozen=True, repr=False)
class LayerReport:
    """One layer; ``intruders`` is their number, ``error`` says why a layer has no findings.

    ``principal_cosines``, ``weights`` and ``null`` come with comparisons; see :class:`spectra.analysis.study.Study`.
    ``expected_by_chance`` says how many intruders random updates with dW's singular values had: "how" ("drawn";
    "below", where so small an update has none; "left_out"; "unknown"), their "counts", whether the base's "spectrum"
    was "computed" or "estimated", and a "reason" where nothing was drawn.
    """

    name: str
    module_type: str
    role: str
    shape: tuple[int, int]
    stored_shape: tuple[int, ...]
    status: str
    update: Mapping[str, Any]
    vectors: tuple[Vector, ...] = ()
    intruders: int = 0
    intruder_indices: tuple[int, ...] = ()
    measures: Mapping[str, float | None] = field(default_factory=dict)
    random_floor: float | None = None
    noise_like_base: bool | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    principal_cosines: tuple[float, ...] = ()
    weights: Mapping[str, Any] | None = None
    null: Mapping[str, Any] | None = None
    expected_by_chance: Mapping[str, Any] | None = None
    error: str | None = None
    engine: str | None = None
    methods: tuple[str, ...] = ()
    residual: float | None = None
    orthogonality: float | None = None
    seconds: float | None = None

    def __repr__(self) -> str:
        found = f"{self.intruders} of {len(self.vectors)} vectors" if self.vectors else self.status
        return f"<LayerReport of {self.name}: {found}>"

    @property
    def in_paper_scope(self) -> bool:
        return self.role not in ("embedding", "head")

    @property
    def borderline(self) -> int:
        return sum("borderline" in vector.flags for vector in self.vectors)


@dataclass(frozen=True, repr=False)
class Report(OfLayers[LayerReport]):
    """What one fine-tune did to the spectrum of its base."""

    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Mapping[str, Any], ...]
    spectra_version: str
    seconds: float | None = None
    baseline: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        found = f"{self.total()} intruders in {self.compared()} vectors"
        return f"<Report on {self.tuned.get('path')}: {found if self.judged else self.intruder_level}>"

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over layers, of which counts are of the judged ones unless they say otherwise; see
        ``report.schema.json`` for each field."""
        analysed = [layer for layer in self.layers if layer.status in DECIDED_STATUSES]
        by_status: dict[str, int] = defaultdict(int)
        for layer in self.layers:
            by_status[layer.status] += 1
        return {
            "layers_analysed": by_status["analysed"],
            "layers_unchanged": by_status["unchanged"],
            "layers_proved_small": by_status["proved_small"],
            "layers_failed": sum(by_status[status] for status in FAILED_STATUSES),
            "layers_skipped": len(self.skipped),
            "coverage": self.coverage.to_dict(),
            "layers_judged": len(self.judged),
            "layers_with_intruders": sum(layer.intruders > 0 for layer in self.judged),
            "layers_noise_like_base": sum(bool(layer.noise_like_base) for layer in analysed),
            "vectors_compared": self.compared(),
            "intruders": self.total(),
            "intruders_all": self.total("all"),
            "intruders_as_in_paper": self.total("paper"),
            "intruders_new": self.total("new") if self.baseline is not None else None,
            "expected_by_chance": self.expected_by_chance.to_dict(),
            "update_over_threshold": self.update_over_threshold,
            "borderline": sum(layer.borderline for layer in analysed),
            "intruder_level": self.intruder_level,
            "trainable_parameters": sum(
                int(layer.update["parameters"]) for layer in self.layers if layer.status != "unchanged"
            ),
            "by_module_type": self._by_module_type(analysed),
            "by_index": self._by_index(self.judged),
        }

    def total(self, scope: str = "judged") -> int:
        """Intruders in the "judged" layers, whose base is no plain noise; in "all"; as the "paper" counts (no
        embeddings, no heads); or "new" since the baseline, in the judged."""
        if scope == "new":
            if self.baseline is None:
                raise UsageError("new intruders are counted against a baseline, and there is none")
            return int(self.baseline["intruders_new"])
        return sum(layer.intruders for layer in self._within(scope))

    def compared(self, scope: str = "judged") -> int:
        """The vectors that :meth:`total` of the same scope looks at; of "new", those of the judged layers."""
        return sum(len(layer.vectors) for layer in self._within("judged" if scope == "new" else scope))

    def _within(self, scope: str) -> tuple[LayerReport, ...]:
        if scope not in SCOPES:
            raise UsageError(f"scope = {scope!r}; expected one of {', '.join(SCOPES)}")
        if scope == "paper":
            return tuple(layer for layer in self.layers if layer.in_paper_scope)
        if scope == "judged":
            return tuple(layer for layer in self.layers if not layer.noise_like_base)
        return self.layers

    @property
    def coverage(self) -> Coverage:
        """How much of the fine-tune the report is about."""
        done = (int(layer.update["parameters"]) for layer in self.layers if layer.status not in FAILED_STATUSES)
        failed = (int(layer.update["parameters"]) for layer in self.failed)
        return coverage_of(done, failed, self.skipped)

    @property
    def base_quantised(self) -> bool:
        """Whether the base is stored with fewer bits; intruders are then relative to its dequantised weights."""
        return self.base.get("quantised") is not None

    @property
    def intruder_level(self) -> str:
        """How many of the judged vectors are intruders, as a word: "none", "slight" (up to 1 %), "moderate" (10 %) or
        "strong"; "cannot tell" where layers changed and none of them could be judged.

        A convention, for gates and tables.  It grades the count, not the fine-tune: "none" is no sign that nothing was
        forgotten.
        """
        if not self.judged and any(layer.status != "unchanged" for layer in self.layers):
            return CANNOT_TELL
        return next(word for limit, word in LEVELS if self.share <= limit)

    @property
    def share(self) -> float:
        """Of the judged vectors, how many are intruders: 0 to 1."""
        vectors = self.compared()
        return self.total() / vectors if vectors else 0.0

    @property
    def expected_by_chance(self) -> ExpectedByChance:
        """How many intruders random updates with the same singular values have in the judged layers."""
        return expected_by_chance([layer.expected_by_chance for layer in self.judged])

    @property
    def update_over_threshold(self) -> float | None:
        """How far from the first intruder: the largest ‖dW‖₂ of a judged layer over the size at which a random update
        has its first one there.  None where no layer's threshold is known."""
        known = [ratio for layer in self.judged if (ratio := layer.measures.get("update_over_threshold")) is not None]
        return max(known, default=None)

    @property
    def judged(self) -> tuple[LayerReport, ...]:
        """The layers that counts are about: those compared whose base is no plain noise."""
        return Layers(layer for layer in self.layers if layer.vectors and not layer.noise_like_base)

    @property
    def failed(self) -> tuple[LayerReport, ...]:
        """Layers that could not be analysed."""
        return Layers(layer for layer in self.layers if layer.status in FAILED_STATUSES)

    @staticmethod
    def _by_module_type(analysed: Sequence[LayerReport]) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = {}
        for layer in analysed:
            row = table.setdefault(layer.module_type, {"layers": 0, "vectors": 0, "intruders": 0, "noise_like": 0})
            if layer.noise_like_base:
                row["noise_like"] += 1
                continue
            row["layers"] += 1
            row["vectors"] += len(layer.vectors)
            row["intruders"] += layer.intruders
        return dict(sorted(table.items()))

    @staticmethod
    def _by_index(analysed: Sequence[LayerReport]) -> list[dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        for layer in analysed:
            for vector in layer.vectors:
                row = rows.setdefault(
                    vector.index, {"index": vector.index, "layers": 0, "intruders": 0, "by_module_type": {}}
                )
                row["layers"] += 1
                if vector.intruder:
                    row["intruders"] += 1
                    kinds = row["by_module_type"]
                    kinds[layer.module_type] = kinds.get(layer.module_type, 0) + 1
        for row in rows.values():
            row["by_module_type"] = dict(sorted(row["by_module_type"].items()))
        return [rows[index] for index in sorted(rows)]

    def against(self, baseline: Report) -> Report:
        """This report with the intruders that are new since ``baseline`` counted, in the judged layers.

        Singular vectors have no identity across runs, so what counts is each layer's number: new
        are those above the baseline's for the same layer.

        Raises
        ------
        UsageError : the two were made with different settings or bases.
        """
        for key in ("top_k", "epsilon", "side"):
            mine, theirs = self.settings[key], baseline.settings[key]
            if mine != theirs:
                raise UsageError(
                    f"the baseline was made with {key} = {theirs}, this run with {mine}; they cannot be compared"
                )
        # Contents are compared where both runs saw them; headers always.
        keys = ["fingerprint_headers"]
        if self.base["fingerprint_covers"] == baseline.base["fingerprint_covers"] == "contents":
            keys.append("fingerprint")
        if any(self.base[key] != baseline.base[key] for key in keys):
            raise UsageError("the baseline was made with another base model; they cannot be compared")
        known = {layer.name: layer.intruders for layer in baseline.layers if not layer.noise_like_base}
        now = {layer.name: layer.intruders for layer in self.layers if not layer.noise_like_base}
        new = {name: count - known.get(name, 0) for name, count in now.items() if count > known.get(name, 0)}
        return replace(
            self,
            baseline={
                "tuned": dict(baseline.tuned),
                "intruders": baseline.total(),
                "intruders_new": sum(new.values()),
                "intruders_gone": sum(max(count - now.get(name, 0), 0) for name, count in known.items()),
                "new_by_layer": new,
            },
        )

    def to_dict(self, *, canonical: bool = False) -> dict[str, Any]:
        """The report as JSON-ready objects (schema ``spectra.report/1``).

        ``canonical`` leaves out what differs between runs of the same work: seconds, the number of
        workers, and the paths and caches of this machine (errors name them, so they go too).
        """
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "spectra_version": self.spectra_version,
            "base_quantised": self.base_quantised,
            "base": dict(self.base),
            "tuned": dict(self.tuned),
            "settings": dict(self.settings),
            "summary": self.summary,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [dict(item) for item in self.skipped],
            "seconds": self.seconds,
        }
        if self.baseline is not None:
            value["baseline"] = dict(self.baseline)
        if canonical:
            del value["seconds"]
            value["base"], value["tuned"] = anywhere(value["base"]), anywhere(value["tuned"])
            value["settings"].pop("workers", None)
            for layer in value["layers"]:
                del layer["seconds"], layer["error"]
            if self.baseline is not None:
                value["baseline"]["tuned"] = anywhere(self.baseline["tuned"])
        return value

    def to_json(self, *, canonical: bool = False, indent: int | None = 1) -> str:
        """The report as JSON text; infinities and NaN cannot occur in it."""
        return json.dumps(self.to_dict(canonical=canonical), indent=indent, allow_nan=False, default=list)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` made (canonical or not).

        Raises
        ------
        UsageError : another schema.
        """
        if value.get("schema") != SCHEMA:
            raise UsageError(f"not a Spectra report of schema {SCHEMA} (its schema is {value.get('schema')!r})")
        layers = [layer_from_dict(layer) for layer in value["layers"]]
        return cls(
            base=value["base"],
            tuned=value["tuned"],
            settings=value["settings"],
            layers=tuple(layers),
            skipped=tuple(value["skipped"]),
            spectra_version=value["spectra_version"],
            seconds=value.get("seconds"),
            baseline=value.get("baseline"),
        )

    def to_html(self) -> str:
        """The page: one self-contained HTML file, as ``spectra audit --html`` writes it, without matrices."""
        import spectra

        return spectra.to_html(self)

    def to_sarif(self) -> str:
        """A SARIF log, as JSON text, for whatever shows findings of static analysis."""
        import spectra

        return spectra.to_sarif([self])

    def to_model_card(self) -> str:
        """A section for a model card, in Markdown."""
        import spectra

        return spectra.to_model_card(self)

    def plot(self, kind: str = "layers") -> Figure:
        """A figure of this report; raises UsageError for kinds that need more than a report holds."""
        import spectra

        return spectra.figure_of([self], kind)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per compared vector, with its layer's columns; needs pandas.

        Layers without vectors (unchanged, failed) have one row with empty vector columns.
        """
        return as_dataframe(self.rows(), ROW_COLUMNS)

    def rows(self) -> list[dict[str, Any]]:
        """The table behind the CSV and the DataFrame: ``ROW_COLUMNS``, one row per vector."""
        rows = []
        for layer in self.layers:
            common = {
                "tuned": self.tuned.get("path"),
                "layer": layer.name,
                "module_type": layer.module_type,
                "role": layer.role,
                "rows": layer.shape[0],
                "columns": layer.shape[1],
                "status": layer.status,
                "update_kind": layer.update["kind"],
                "update_rank": layer.update["rank"],
                "update_scaling": layer.update["scaling"],
                "update_norm_relative": layer.measures.get("update_norm_relative"),
                "update_over_threshold": layer.measures.get("update_over_threshold"),
                "effective_rank": layer.measures.get("effective_rank"),
                "noise_like_base": layer.noise_like_base,
                "layer_intruders": layer.intruders,
            }
            for vector in layer.vectors or (None,):
                own = (
                    {}
                    if vector is None
                    else {
                        "index": vector.index,
                        "sigma": vector.sigma,
                        "max_cosine": vector.max_cosine,
                        "max_cosine_lower": vector.max_cosine_bounds[0],
                        "max_cosine_upper": vector.max_cosine_bounds[1],
                        "base_index": vector.base_index,
                        "base_sigma": vector.base_sigma,
                        "base_capture": vector.base_capture,
                        "intruder": vector.intruder,
                        "flags": " ".join(vector.flags),
                    }
                )
                rows.append({column: {**common, **own}.get(column) for column in ROW_COLUMNS})
        return rows


ROW_COLUMNS = (
    "tuned", "layer", "module_type", "role", "rows", "columns", "status", "update_kind", "update_rank",
    "update_scaling", "update_norm_relative", "update_over_threshold", "effective_rank", "noise_like_base",
    "layer_intruders", "index", "sigma", "max_cosine", "max_cosine_lower", "max_cosine_upper",
    "base_index", "base_sigma", "base_capture", "intruder", "flags",
)  # fmt: skip


def worst_layers(report: Report, number: int) -> list[LayerReport]:
    """The layers with intruders, most of them first and those on plain noise last; at most ``number``."""
    flagged = [layer for layer in report.layers if layer.intruders]
    return sorted(flagged, key=lambda layer: (bool(layer.noise_like_base), -layer.intruders))[: max(number, 0)]


def layer_from_dict(value: Mapping[str, Any]) -> LayerReport:
    """The layer that ``asdict`` and JSON made of one."""
    vectors = tuple(Vector(**known_fields(Vector, vector)) for vector in value["vectors"])
    return LayerReport(**{**known_fields(LayerReport, value), "vectors": vectors})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of :meth:`Report.to_dict`."""
    return read_schema("report.schema.json")


def module_type(name: str) -> str:
    """The part of a module's name after its last number: one word for what recurs by layer.

    ``encoder.layer.3.attention.self.query`` → ``attention.self.query``.  A number at the end stays (``to_out.0``), and
    the number of an expert alone is left out: ``layers.3.mlp.experts.5.down_proj`` → ``mlp.experts.down_proj``.
    """
    parts = name.split("#")[0].split(".")
    parts = [part for i, part in enumerate(parts) if not (part.isdigit() and i and parts[i - 1] == "experts")]
    end = len(parts)
    while end and parts[end - 1].isdigit():
        end -= 1
    numbers = [i for i, part in enumerate(parts[:end]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
