"""Small JSON files: configurations and indices, bounded before they are parsed."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectra.errors import CorruptFileError, MissingFileError

MAX_NAME = 500  # letters; the longest names in use have less than 200
MAX_CONFIG_BYTES, MAX_CONFIG_ITEMS = 4_000_000, 100_000  # the largest name 20,000 labels, twice
MAX_INDEX_BYTES, MAX_INDEX_ITEMS = 32_000_000, 400_000  # the largest models have 150,000 tensors


def check_regular(path: Path) -> int:
    """The size of a file in bytes.

    Raises
    ------
    MissingFileError : it is a pipe, a device or a folder, where reading would wait or never end.
    OSError : it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise MissingFileError(path, f"could not be opened: no regular file, but {what}")
    return status.st_size


def read_json(path: Path, *, unique: bool = False, index: bool = False) -> dict[str, Any]:
    """A JSON object, or {} where the file does not exist.

    With ``unique`` a name that occurs twice is an error: readers differ in which they take.  An ``index`` may be
    longer than a configuration.

    Raises
    ------
    MissingFileError, CorruptFileError
    """
    value = _json_of(path, {}, unique=unique, index=index)
    if not isinstance(value, dict):
        raise CorruptFileError(path, f"expected a JSON object, found a {type(value).__name__}")
    return value


def read_json_list(path: Path) -> list[Any]:
    """A JSON list, or [] where the file does not exist; raises as :func:`read_json` does."""
    value = _json_of(path, [])
    if not isinstance(value, list):
        raise CorruptFileError(path, f"expected a JSON list, found a {type(value).__name__}")
    return value


def _json_of(path: Path, absent: Any, *, unique: bool = False, index: bool = False) -> Any:
    """What a small JSON file holds, or ``absent`` where it does not exist."""
    most_bytes, most_items = (MAX_INDEX_BYTES, MAX_INDEX_ITEMS) if index else (MAX_CONFIG_BYTES, MAX_CONFIG_ITEMS)
    try:
        size = check_regular(path)
        if size > most_bytes:
            raise CorruptFileError(path, f"{size:,} bytes; expected at most {most_bytes:,} of such a file")
        with path.open("rb") as file:
            raw = file.read(most_bytes)
        if sum(raw.count(mark) for mark in (b",", b"{", b"[")) > most_items:
            raise CorruptFileError(path, f"more than {most_items:,} items, which no such file has")
        return json.loads(raw.decode(), object_pairs_hook=unique_names(path) if unique else None)
    except FileNotFoundError as error:
        if isinstance(error, MissingFileError):
            raise
        return absent
    except CorruptFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"not readable as JSON: {error}") from None


def unique_names(path: Path, tensor: str | None = None) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """What makes a name that occurs twice in a JSON object an error."""

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise CorruptFileError(path, f"{name[:MAX_NAME]!r} occurs twice", tensor)
            entries[name] = value
        return entries

    return hook
