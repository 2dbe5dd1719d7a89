"""The comparison: reports on several fine-tunes of one base, side by side (``spectra.comparison/1``)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from spectra.errors import MissingLayerError, UsageError
from spectra.records import sweeps
from spectra.records.report import Report
from spectra.records.schemas import as_dataframe, read_schema
from spectra.records.shown import Shown

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA = "spectra.comparison/1"
STEP = re.compile(r"checkpoint-(\d+)$")  # as transformers names them

COLUMNS = (
    "label", "path", "method", "rank", "alpha", "scaling", "step", "trainable_parameters", "trainable_ratio",
    "update_norm_relative", "update_norm_spectral_relative", "effective_rank", "stable_rank", "rank_90", "rank_99",
    "intruders", "vectors_compared", "intruders_all", "intruders_as_in_paper", "expected_by_chance",
    "expected_by_chance_deviation", "update_over_threshold", "intruder_energy_share", "threshold", "threshold_layer",
    "margin", "null_mean", "null_p_value", "rho_k",
    "principal_overlap", "spectrum_shift", "intruder_level", "layers_analysed", "layers_failed",
)  # fmt: skip
MEANS = (
    "update_norm_relative", "update_norm_spectral_relative", "effective_rank", "stable_rank", "rank_90", "rank_99",
    "rho_k", "principal_overlap", "spectrum_shift",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Fine-tunes of one base side by side.

    Attributes
    ----------
    reports : one a fine-tune, each as :func:`spectra.audit` gives it, with the measures that need every
        cosine filled in.
    overlaps : one a pair of fine-tunes: ``a``, ``b`` (their places in ``reports``), ``overlap`` and
        ``random``, the means of ``layers``: for each weight that both change, the overlap
        ‖U_aᵀU_b‖_F²/min(i, j) of the leading i and j directions of the two updates (Hu et al. 2021,
        section 7.2), and what it would be for random directions, max(i, j)/d.
    spectra_version : what made it.
    seconds : wall time, or None.
    """

    reports: tuple[Report, ...]
    overlaps: tuple[Mapping[str, Any], ...]
    spectra_version: str
    seconds: float | None = None

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.labels)}>"

    def __len__(self) -> int:
        return len(self.reports)

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __getitem__(self, key: str | int) -> Report:
        """The report of that label, or at that place; raises UsageError (also a KeyError) or IndexError."""
        if not isinstance(key, str):
            return self.reports[key]
        if key not in self.labels:
            raise MissingLayerError(f"no fine-tune is called {key!r:.120}; there are {', '.join(self.labels)}")
        return self.reports[self.labels.index(key)]

    def to_html(self) -> str:
        """The page: one self-contained HTML file, as ``spectra compare --html`` writes it."""
        import spectra

        return spectra.to_html(self)

    def plot(self, kind: str = "layers") -> Figure:
        """A figure of this comparison; raises UsageError for kinds that need more than a comparison holds."""
        import spectra

        return spectra.figure_of(self, kind)

    @property
    def base(self) -> Mapping[str, Any]:
        return self.reports[0].base

    @property
    def labels(self) -> tuple[str, ...]:
        """The fine-tunes' shortest names that tell them apart."""
        return report_labels(self.reports)

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The training step of each fine-tune, from names like ``checkpoint-200``; None where there is none."""
        matches = [STEP.search(PurePath(str(report.tuned.get("path", ""))).name) for report in self.reports]
        merged = [report.tuned["format"] == "merged" for report in self.reports]
        return tuple(int(m[1]) if m and not of_many else None for m, of_many in zip(matches, merged, strict=True))

    @property
    def is_trajectory(self) -> bool:
        """Whether these are the checkpoints of one training run: in one folder, each at a step of its own."""
        steps, homes = self.steps, {str(PurePath(str(report.tuned.get("path", ""))).parent) for report in self.reports}
        return len(steps) > 1 and None not in steps and len(set(steps)) == len(steps) and len(homes) == 1

    def rows(self) -> list[dict[str, Any]]:
        """One row a fine-tune: ``COLUMNS``, then its intruders by module type as ``intruders: TYPE``.

        Measures are means over its layers, but ``update_over_threshold`` is the largest of a judged layer;
        ``threshold`` is the adapter weight at which the first intruder of all layers appears, ``margin`` how far the
        weight it has, 1, is from that.
        """
        types = sorted({kind for report in self.reports for kind in report.summary["by_module_type"]})
        rows = []
        for label, step, report in zip(self.labels, self.steps, self.reports, strict=True):
            summary, totals, chance = report.summary, sweeps.null_totals(report), report.expected_by_chance
            threshold, layer = sweeps.free_weight(report)
            row: dict[str, Any] = {
                **summary,
                **{name: sweeps.mean_measure(report, name) for name in MEANS},
                "label": label,
                "path": report.tuned.get("path"),
                "method": report.tuned["format"],
                "rank": report.tuned.get("rank"),
                "alpha": report.tuned.get("alpha"),
                "scaling": report.tuned.get("scaling"),
                "step": step,
                "trainable_ratio": sweeps.trainable_ratio(report),
                "intruder_energy_share": sweeps.mean_measure(report, "intruder_energy_share"),
                "threshold": threshold,
                "threshold_layer": layer,
                "margin": None if threshold is None else threshold - 1,
                "expected_by_chance": chance.intruders,
                "expected_by_chance_deviation": chance.deviation,
                "null_mean": None if totals is None else sum(totals) / len(totals),
                "null_p_value": sweeps.null_p_value(report),
            }
            by_type = {f"intruders: {kind}": summary["by_module_type"].get(kind, {}).get("intruders") for kind in types}
            rows.append({**{name: row[name] for name in COLUMNS}, **by_type})
        return rows

    def to_dict(self, *, canonical: bool = False) -> dict[str, Any]:
        """JSON-ready objects (schema ``spectra.comparison/1``); ``canonical`` as for reports."""
        reports = [report.to_dict(canonical=canonical) for report in self.reports]
        named = ("path", "label", "step") if canonical else ()  # by what this machine calls them
        value = {
            "schema": SCHEMA,
            "spectra_version": self.spectra_version,
            "base": reports[0]["base"],
            "summary": [{key: item for key, item in row.items() if key not in named} for row in self.rows()],
            "reports": reports,
            "overlaps": [dict(item) for item in self.overlaps],
            "seconds": self.seconds,
        }
        if canonical:
            del value["seconds"]
        return value

    def to_json(self, *, canonical: bool = False, indent: int | None = 1) -> str:
        """The comparison as JSON text."""
        return json.dumps(self.to_dict(canonical=canonical), indent=indent, allow_nan=False, default=list)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Comparison:
        """The comparison that :meth:`to_dict` made; raises UsageError for another schema."""
        if value.get("schema") != SCHEMA:
            raise UsageError(f"not a Spectra comparison of schema {SCHEMA} (its schema is {value.get('schema')!r})")
        return cls(
            reports=tuple(Report.from_dict(report) for report in value["reports"]),
            overlaps=tuple(value["overlaps"]),
            spectra_version=value["spectra_version"],
            seconds=value.get("seconds"),
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """:meth:`rows` as a DataFrame; needs pandas.  For one row a vector, join the reports' own."""
        rows = self.rows()
        return as_dataframe(rows, list(rows[0]))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of :meth:`Comparison.to_dict`; it refers to the reports' own."""
    return read_schema("comparison.schema.json")


def report_labels(reports: Sequence[Report]) -> tuple[str, ...]:
    """The fine-tunes' shortest names that tell them apart."""
    return short_names([str(report.tuned.get("path") or report.tuned["fingerprint"]) for report in reports])


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Each path's last part, with as many of the parts before it as tell all of them apart.

    A merge, ``0.5*PATH + 0.5*PATH``, is made of several.
    """
    terms = [[_weighted(term) for term in path.split(" + ")] for path in paths]
    depth = max((len(PurePath(path).parts) for merge in terms for _, _, path in merge), default=0)
    for length in range(1, depth + 1):
        names = tuple(
            " + ".join(f"{weight}{star}{'/'.join(PurePath(path).parts[-length:])}" for weight, star, path in merge)
            for merge in terms
        )
        if len(set(names)) == len(names):
            return names
    return tuple(f"{path} ({number})" for number, path in enumerate(paths, 1))


def _weighted(term: str) -> tuple[str, str, str]:
    """("0.5", "*", path) of a term of a merge; ("", "", path) of a path."""
    weight, star, path = term.partition("*")
    try:
        float(weight)
    except ValueError:
        return "", "", term
    return weight, star, path
