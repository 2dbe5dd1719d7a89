"""What all records share: their JSON Schemas, their fields out of JSON, their rows as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from typing import TYPE_CHECKING, Any

from spectra.errors import needs_extra

if TYPE_CHECKING:
    import pandas

_OF_THIS_MACHINE = frozenset(["path", "changed_since_cached", "claimed"])


def as_dataframe(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """Rows as a DataFrame; raises UsageError without pandas."""
    try:
        import pandas
    except ImportError:
        raise needs_extra("to_dataframe() needs", "pandas", "dataframe") from None
    return pandas.DataFrame(rows, columns=list(columns))


def anywhere(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a checkpoint, without what this machine alone knows of it."""
    return {name: value for name, value in facts.items() if name not in _OF_THIS_MACHINE}


def known_fields(record: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record's class out of a JSON object, lists as tuples; fields may have been added since."""
    names = {item.name for item in fields(record)}
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key in names}


def read_schema(name: str) -> dict[str, Any]:
    """A JSON Schema that comes with the package."""
    schema: dict[str, Any] = json.loads(resources.files("spectra.records").joinpath(name).read_text(encoding="utf-8"))
    return schema
