"""The history that a monitor writes: one line an audit, appended."""

from __future__ import annotations

import json
from pathlib import Path

from spectra.errors import UsageError
from spectra.records.history import BEGINS, Record


def begin_history(path: Path) -> None:
    """Makes ready a file that is to be appended to: a last line without its end, as a kill leaves it, is cut off.

    Raises
    ------
    UsageError : it is no history of a monitor, or could not be written.
    """
    try:
        if not path.exists():
            return
        with path.open("r+b") as file:
            start = file.read(len(BEGINS)).decode(errors="replace")
            if not BEGINS.startswith(start):
                raise UsageError(f"{path}: exists and is no history of a training, so nothing is appended to it")
            whole = file.seek(0)
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)
    except OSError as error:
        raise UsageError(f"{path}: could not be written: {error.strerror or error}") from None


def append_line(path: Path, record: Record) -> None:
    """Appends a record to a file of JSON lines, in a folder that is made if need be; raises UsageError."""
    line = json.dumps(record.to_dict(), allow_nan=False, default=list) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise UsageError(f"{path}: could not be written: {error.strerror or error}") from None
