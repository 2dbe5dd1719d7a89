"""Saved records, read again; each is checked for what tables, figures and checks need of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.files.folders import RECORD
from spectra.records import comparison, ranks, repair, report
from spectra.records.comparison import Comparison
from spectra.records.history import BEGINS, Record
from spectra.records.ranks import RankReport
from spectra.records.repair import Repair, ScaledVector, Verification
from spectra.records.report import Report

Saved = TypeVar("Saved")
MAX_RECORD_BYTES = 256_000_000  # of a report or a comparison; one of a hundred fine-tunes has some 50 MB
HINT = "not a record of Spectra's in JSON; make one with: spectra audit TUNED -o FILE.json"


def load(path: str | Path) -> Any:
    """Any record that was saved, as the object that it was.

    Parameters
    ----------
    path : a report, a comparison, a rank report, the record of a repair (or the repaired folder), that of its check, or
        the history that a monitor wrote.

    Returns
    -------
    Report, Comparison, RankReport, Repair or Verification; or a list : of a file with several as JSON lines, and of the
    records of a training.

    Raises
    ------
    MissingFileError, CorruptFileError : it cannot be read, or is not one of these.
    """
    path = Path(path)
    if path.is_dir():
        return load_repair(path)

    def made(text: str) -> Any:
        if text.startswith(BEGINS):
            return None
        try:
            return _record(json.loads(text))
        except json.JSONDecodeError:
            if not text.strip():
                raise
            # Several, a line each.
            return [_record(json.loads(line)) for line in text.splitlines()]

    record = _read(path, made, HINT)
    return load_history(path) if record is None else record


def load_report(path: str | Path) -> Report:
    """Reads a report that was written as JSON.

    Raises
    ------
    MissingFileError, CorruptFileError
    """
    hint = "not one report in JSON; make one with: spectra audit TUNED --format json -o FILE"
    return _read(path, lambda text: _report(json.loads(text)), hint)


def load_comparison(path: str | Path) -> Comparison:
    """Reads a comparison that was written as JSON; raises as :func:`load_report` does."""
    hint = "not a comparison in JSON; make one with: spectra compare -o FILE"
    return _read(path, lambda text: _comparison(json.loads(text)), hint)


def load_repair(path: str | Path) -> Repair:
    """Reads the record of a repair; ``path`` may be the folder that holds it; raises as :func:`load_report` does."""
    path = Path(path)
    hint = "not the record of a repair, as spectra repair writes it into its folder"
    if path.is_dir() and not (path / RECORD).exists():
        raise MissingFileError(path, f"was not written by spectra repair: it has no {RECORD}")
    return _read(path / RECORD if path.is_dir() else path, lambda text: _repair(json.loads(text)), hint)


def _read(path: str | Path, made: Callable[[str], Saved], hint: str) -> Saved:
    """What ``made`` makes of a file's text; ``hint`` says what the file should have been."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise MissingFileError(path, "could not be read: no regular file")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise CorruptFileError(path, f"over {MAX_RECORD_BYTES:,} bytes; {hint}")
        return made(path.read_text(encoding="utf-8"))
    except (MissingFileError, CorruptFileError):
        raise
    except OSError as error:
        raise MissingFileError(path, f"could not be read: {error.strerror or error}") from None
    except UsageError as error:
        raise CorruptFileError(path, str(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise CorruptFileError(path, hint) from None


def _record(value: Any) -> Any:
    """The record of a JSON object, by its schema."""
    makers: dict[str, Callable[[Any], Any]] = {
        report.SCHEMA: _report, comparison.SCHEMA: _comparison, ranks.SCHEMA: RankReport.from_dict,
        repair.SCHEMA: _repair, repair.VERIFICATION_SCHEMA: Verification.from_dict,
    }  # fmt: skip
    return makers[value["schema"]](value)


def _report(value: Any) -> Report:
    made = Report.from_dict(value)
    # What a comparison needs must be there and make sense.
    _ = made.summary, made.base["fingerprint_headers"], made.base["fingerprint_covers"], dict(made.tuned)
    _ = [made.settings[key] for key in ("top_k", "epsilon", "side")]
    return made


def _comparison(value: Any) -> Comparison:
    made = Comparison.from_dict(value)
    # What tables and figures need must be there and make sense.
    _ = made.rows(), [one.settings[key] for one in made.reports for key in ("top_k", "epsilon", "side")]
    for item in made.overlaps:
        _ = made.reports[item["a"]], made.reports[item["b"]], item["overlap"] + item["random"]
    return made


def _repair(value: Any) -> Repair:
    made = Repair.from_dict(value)
    # What tables and a check need must be there and make sense.
    _ = made.summary, made.rows(), dict(made.base), dict(made.source), dict(made.left_behind)
    _ = [made.settings[key] for key in ("scale", "which", "keep_rank", "merged", "top_k", "epsilon", "side")]
    for layer in made.layers:
        if not isinstance(layer.name, str) or not layer.vectors or not all(map(_makes_sense, layer.vectors)):
            raise ValueError(layer.name)
    return made


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
