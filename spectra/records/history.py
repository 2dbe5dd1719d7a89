"""What one audit of a model in training found, as numbers to log and as lines of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spectra.records.report import Report
from spectra.records.sweeps import decided, free_weight, mean_measure, mean_update_size

PREFIX = "spectra/"
IN_TYPE = f"{PREFIX}intruders_in/"
BEGINS = '{"step": '  # how a history, one record a line, begins


@dataclass(frozen=True)
class Record:
    """One audit.

    Attributes
    ----------
    step : of the training.
    metrics : numbers by name, as they are logged; see :func:`metrics_of`.
    report : everything else; None of an audit so long ago that it was let go, or where the file has none.
    limit : which limit was crossed, if any.
    """

    step: int
    metrics: Mapping[str, float]
    report: Report | None = None
    limit: Literal["warn", "stop"] | None = None

    @property
    def intruders(self) -> int:
        return int(self.metrics[f"{PREFIX}intruders"])

    @property
    def seconds(self) -> float:
        """What this audit took."""
        return self.metrics[f"{PREFIX}seconds"]

    @property
    def should_stop(self) -> bool:
        return self.limit == "stop"

    @property
    def by_module_type(self) -> dict[str, int]:
        """Intruders by module type."""
        return {
            name.removeprefix(IN_TYPE): int(value) for name, value in self.metrics.items() if name.startswith(IN_TYPE)
        }

    def to_dict(self) -> dict[str, Any]:
        report = None if self.report is None else self.report.to_dict()
        return {"step": self.step, "limit": self.limit, "metrics": dict(self.metrics), "report": report}


def metrics_of(report: Report) -> dict[str, float]:
    """The numbers to log.

    Parameters
    ----------
    report : of the model as it is.

    Returns
    -------
    dict : under "spectra/…"

        - intruders, layers_with_intruders: counts, outside noise-like bases; intruders_all: in every layer;
        - energy_share: Σσ² of intruders / Σσ² of the vectors compared, the mean over layers;
        - cosine_margin: the lowest max |cos| of any vector, less epsilon.  How much is left until the first intruder,
          or, below 0, how far the worst one is beyond; where a vector has bounds alone, its lower one;
        - threshold_margin: the least θ̄/σ₁(dW) of any layer: by which factor the update may grow until a random one of
          its size would be expected to bring an intruder.  A prediction (:mod:`spectra.analysis.threshold`).  In the
          trained family of the fixtures it was, in the median over the layers of a fine-tune, 1.0 to 1.9 times the
          exact factor, and the least of them 1.2 to 2.3 times too large;
        - threshold_margin_exact: that factor, counted rather than predicted, where it was asked for and lies between
          a millionth and 4;
        - update_norm, update_norm_largest: ‖dW‖_F/‖W0‖_F, the mean over layers and the largest;
        - layers_failed: layers that could not be analysed;
        - intruders_in/TYPE: the count of each module type.

        Layers that did not change have no margin and no share; the two margins leave out noise-like bases, in
        which anything moves the vectors.  A number that nothing gives is left out.
    """
    summary = report.summary
    values: dict[str, float | None] = {
        key: float(summary[key]) for key in ("intruders", "intruders_all", "layers_with_intruders")
    }
    values["energy_share"] = mean_measure(report, "intruder_energy_share")
    lowest = [
        vector.max_cosine_bounds[0] if vector.max_cosine is None else vector.max_cosine
        for layer in report.judged
        for vector in layer.vectors
        if "null_space" not in vector.flags
    ]
    values["cosine_margin"] = min(lowest) - float(report.settings["epsilon"]) if lowest else None
    nearest = report.update_over_threshold
    values["threshold_margin"] = 1 / nearest if nearest else None
    values["threshold_margin_exact"] = free_weight(report)[0]
    sizes = [size for layer in decided(report) if (size := layer.measures.get("update_norm_relative")) is not None]
    values["update_norm"], values["update_norm_largest"] = mean_update_size(report), max(sizes, default=None)
    values["layers_failed"] = float(summary["layers_failed"])
    named = {f"{PREFIX}{name}": value for name, value in values.items() if value is not None}
    types = dict.fromkeys(sorted(layer.module_type for layer in report.layers), 0)
    for name, row in summary["by_module_type"].items():
        types[name] = row["intruders"]
    return named | {f"{IN_TYPE}{name}": float(count) for name, count in types.items()}
