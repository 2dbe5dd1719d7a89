"""Saved records, read again; each is checked for what tables, figures and checks need of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.files.folders import RECORD
from spectra.records.comparison import Comparison
from spectra.records.history import Record
from spectra.records.repair import Mitigation, ScaledVector
from spectra.records.report import Report

Saved = TypeVar("Saved")
MAX_RECORD_BYTES = 256_000_000  # of a report or a comparison; one of a hundred fine-tunes has some 50 MB


def load_report(path: str | Path) -> Report:
    """Reads a report that was written as JSON.

    Raises
    ------
    MissingFileError, CorruptFileError
    """

    def made(value: Any) -> Report:
        report = Report.from_dict(value)
        # What a comparison needs must be there and make sense.
        _ = report.summary, report.base["fingerprint_headers"], report.base["fingerprint_covers"], dict(report.tuned)
        _ = [report.settings[key] for key in ("top_k", "epsilon", "side")]
        return report

    hint = "not one report in JSON; make one with: spectra audit TUNED --format json -o FILE"
    return load_record(path, made, hint)


def load_record(path: str | Path, made: Callable[[Any], Saved], hint: str) -> Saved:
    """What ``made`` makes of a JSON file; ``hint`` says what the file should have been.

    Raises
    ------
    MissingFileError, CorruptFileError
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise MissingFileError(path, "could not be read: no regular file")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise CorruptFileError(path, f"over {MAX_RECORD_BYTES:,} bytes; {hint}")
        return made(json.loads(path.read_text(encoding="utf-8")))
    except (MissingFileError, CorruptFileError):
        raise
    except OSError as error:
        raise MissingFileError(path, f"could not be read: {error.strerror or error}") from None
    except UsageError as error:
        raise CorruptFileError(path, str(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise CorruptFileError(path, hint) from None


def load_comparison(path: str | Path) -> Comparison:
    """Reads a comparison that was written as JSON.

    Raises
    ------
    MissingFileError, CorruptFileError
    """

    def made(value: Any) -> Comparison:
        comparison = Comparison.from_dict(value)
        # What tables and figures need must be there and make sense.
        _ = (
            comparison.rows(),
            [report.settings[key] for report in comparison.reports for key in ("top_k", "epsilon", "side")],
        )
        for item in comparison.overlaps:
            _ = comparison.reports[item["a"]], comparison.reports[item["b"]], item["overlap"] + item["random"]
        return comparison

    return load_record(path, made, "not a comparison in JSON; make one with: spectra compare -o FILE")


def load_mitigation(path: str | Path) -> Mitigation:
    """Reads a record that was written as JSON; ``path`` may be the folder of the repair that holds it.

    Raises
    ------
    MissingFileError, CorruptFileError
    """

    def made(value: Any) -> Mitigation:
        repair = Mitigation.from_dict(value)
        # What tables and a check need must be there and make sense.
        _ = repair.summary, repair.rows(), dict(repair.base), dict(repair.source), dict(repair.left_behind)
        _ = [repair.settings[key] for key in ("scale", "which", "keep_rank", "merged", "top_k", "epsilon", "side")]
        for layer in repair.layers:
            if not isinstance(layer.name, str) or not layer.vectors or not all(map(_makes_sense, layer.vectors)):
                raise ValueError(layer.name)
        return repair

    path = Path(path)
    hint = "not the record of a repair, as spectra mitigate writes it into its folder"
    return load_record(path / RECORD if path.is_dir() else path, made, hint)


def _makes_sense(vector: ScaledVector) -> bool:
    numbers = (vector.sigma, vector.scale, vector.scale_achieved)
    return (
        isinstance(vector.index, int) and vector.index >= 0 and all(map(math.isfinite, numbers)) and vector.scale >= 0
    )


def load_history(path: str | Path) -> list[Record]:
    """The records that a monitor wrote.

    Where a training went on from an earlier step than it had come to, what it had found beyond that is left out.
    A last line without its end, as a training that was killed leaves it, is left out.

    Raises
    ------
    MissingFileError, CorruptFileError
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise MissingFileError(path, f"could not be read: {error.strerror or error}") from None
    except ValueError:
        raise CorruptFileError(path, "no text; expected the history of a monitor") from None
    records: list[Record] = []
    for record in _records(path, (line for line in lines if line.endswith("\n"))):
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    return records


def _records(path: Path, lines: Iterable[str]) -> Iterable[Record]:
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            report = None if value["report"] is None else Report.from_dict(value["report"])
            metrics = {str(name): float(number) for name, number in value["metrics"].items()}
            yield Record(int(value["step"]), metrics, report, value["limit"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CorruptFileError(path, f"line {number} is no record of a monitor") from None
