"""Resumable runs: finished work is appended to a file, so that a run continues where it ended.

The first line says what the run is: its settings and what identifies its inputs.  Each further line is what one base
weight gave, and is on the disk before the next weight is begun, so that a kill loses no more than the weight it hit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spectra.analysis.chance import RandomUpdates
from spectra.errors import CorruptFileError, UsageError, in_short
from spectra.records.report import LayerReport, layer_from_dict

SCHEMA = "spectra.run/1"
MARK = b'{"schema": "' + SCHEMA.encode() + b'"'


@dataclass(frozen=True)
class Finished:
    """What one base weight gave.

    Attributes
    ----------
    layers : (which of the run's fine-tunes, the report on its layer, what to draw random updates of it from), one for
        each that has this base weight.
    digests : (which fine-tune, tensor, sha256 of its bytes) of all tensors that were read whole on the way.
    """

    layers: tuple[tuple[int, LayerReport, RandomUpdates | None], ...]
    digests: tuple[tuple[int, str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        layers = [
            [number, asdict(layer), None if updates is None else updates.to_dict()]
            for number, layer, updates in self.layers
        ]
        return {"layers": layers, "digests": list(self.digests)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Finished:
        layers = tuple(
            (int(number), layer_from_dict(layer), None if updates is None else RandomUpdates.from_dict(updates))
            for number, layer, updates in value["layers"]
        )
        return cls(layers, tuple((int(number), str(name), str(digest)) for number, name, digest in value["digests"]))


class Journal:
    """The file of one run; see :func:`open_journal`.

    Attributes
    ----------
    finished : what earlier runs finished, by the key of its base weight.
    """

    def __init__(self, path: Path, file: BinaryIO, finished: dict[str, Finished]):
        self.path, self._file, self.finished = path, file, finished

    def add(self, key: str, finished: Finished) -> None:
        """Appends what a base weight gave; it is on the disk when this returns.

        Raises
        ------
        UsageError : it could not be written; what was begun of the line is taken back.
        """
        line = json.dumps({"key": key, **finished.to_dict()}, allow_nan=False, default=list).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise UsageError(f"{self.path}: could not be written: {error.strerror or error}") from None


@contextlib.contextmanager
def open_journal(path: str | Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the run that ``identity`` (JSON-ready) describes: a new one, or the one that is there.

    A last line that was not finished is cut off.

    Raises
    ------
    UsageError : another run's journal, no journal at all, one in use by another process, or a place that cannot be
        written.
    CorruptFileError : a line of it is damaged.
    """
    path = Path(path)
    try:
        file = path.open("r+b" if path.exists() else "x+b")
    except OSError as error:
        raise UsageError(f"{path}: could not be opened: {error.strerror or error}") from None
    with file:
        _lock(path, file)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [b""]
        begun = not first and MARK.startswith(content[: len(MARK)])  # killed while it wrote its first line
        if not first.startswith(MARK) and content and not begun:
            raise UsageError(f"{path}: exists and is no journal of a run, so nothing is written to it")
        if first:
            _compare(path, _line(path, 1, first).get("run"), identity)
        journal = Journal(path, file, dict(_finished(path, lines)))
        file.truncate(len(whole))
        file.seek(0, os.SEEK_END)
        if not first:
            head = {"schema": SCHEMA, "run": identity}
            file.write(json.dumps(head, allow_nan=False, default=list).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        yield journal


def _finished(path: Path, lines: Sequence[bytes]) -> Iterator[tuple[str, Finished]]:
    for number, line in enumerate(lines, start=2):
        value = _line(path, number, line)
        try:
            yield str(value["key"]), Finished.from_dict(value)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFileError(path, f"line {number} is damaged: {in_short(error)}") from None


def _line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CorruptFileError(path, f"line {number} is damaged; begin anew with another file")
    return value


def _compare(path: Path, theirs: Any, mine: Mapping[str, Any]) -> None:
    """Raises UsageError that names the first thing in which two runs differ."""
    mine = json.loads(json.dumps(mine, default=list))
    if theirs == mine:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    for key, value in mine.items():
        other = theirs.get(key)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):  # settings: name the one that differs
            name = next(name for name in {**value, **other} if value.get(name) != other.get(name))
            what = f"{name} was {other.get(name)!r} there, and is {value.get(name)!r} here"
        elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
            changed = next(new for new, old in zip(value, other, strict=True) if new != old)
            what = f"{changed.get('path', key)} is not as it was when that run began"
        else:
            what = f"its {key} differ"
        raise UsageError(
            f"{path}: this is the journal of another run: {what}; go on with the same inputs and options, or name "
            "another file"
        )
    raise UsageError(f"{path}: this is the journal of another run")


def _lock(path: Path, file: BinaryIO) -> None:
    """Keeps others out until the file is closed, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{path}: another process is writing this run's journal") from None
