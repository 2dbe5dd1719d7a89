"""Tables for data frames: reports as one parquet file."""

from __future__ import annotations

import io
from collections.abc import Sequence

from spectra.errors import needs_extra
from spectra.records.report import ROW_COLUMNS, Report
from spectra.records.schemas import as_dataframe

# What a column holds where that is no text; each may be missing.
_TYPES = {
    "rows": "Int64", "columns": "Int64", "update_rank": "Int64", "layer_intruders": "Int64", "index": "Int64",
    "base_index": "Int64", "noise_like_base": "boolean", "intruder": "boolean",
    "update_scaling": "float64", "update_norm_relative": "float64", "update_over_threshold": "float64",
    "effective_rank": "float64", "sigma": "float64",
    "max_cosine": "float64", "max_cosine_lower": "float64", "max_cosine_upper": "float64", "base_sigma": "float64",
    "base_capture": "float64",
}  # fmt: skip


def to_parquet(reports: Sequence[Report]) -> bytes:
    """The rows of all reports, as in their CSV; ``tuned`` tells the fine-tunes apart.

    The file's metadata name the schema, ``spectra.rows/1``, and the version.

    Raises
    ------
    UsageError : pandas or pyarrow is missing.
    """
    check_parquet()
    import pyarrow
    import pyarrow.parquet

    frame = as_dataframe([row for report in reports for row in report.rows()], ROW_COLUMNS)
    frame = frame.astype({column: _TYPES.get(column, "string") for column in ROW_COLUMNS})
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    own = {b"schema": b"spectra.rows/1", b"spectra_version": reports[0].spectra_version.encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **own})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def check_parquet() -> None:
    """Raises UsageError where what writes parquet is missing."""
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError:
        raise needs_extra("parquet needs", "pandas and pyarrow", "dataframe") from None
    del pandas
