"""Tables for other programs: parquet."""

from __future__ import annotations

import io

import pandas

import spectra
from spectra.records.report import ROW_COLUMNS
from spectra.render.frames import to_parquet
from tests.support.commands import run
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report

LORA, FULL, BASE = (str(FIXTURES / name) for name in ("lora-r4", "full", "base"))
FEW = ["--include", "layers.0.self_attn"]
INTEGERS = {"rows", "columns", "update_rank", "layer_intruders", "index", "base_index"}
BOOLEANS = {"noise_like_base", "intruder"}
TEXTS = {"tuned", "layer", "module_type", "role", "status", "update_kind", "flags"}


def checked(frame):
    assert tuple(frame.columns) == ROW_COLUMNS
    for column, dtype in frame.dtypes.items():
        if column in INTEGERS:
            assert dtype == "Int64", column
        elif column in BOOLEANS:
            assert dtype == "boolean", column
        elif column in TEXTS:
            assert pandas.api.types.is_string_dtype(dtype), column
        else:
            assert dtype == "float64", column
    return frame


def test_parquet_of_several_is_one_table(capsys, tmp_path):
    target = tmp_path / "report.parquet"
    for _ in range(2):  # it replaces its own
        code, out, err = run(capsys, "audit", LORA, FULL, "--base", BASE, *FEW, "-o", str(target))
        assert (code, out, err) == (0, "", f"spectra: wrote {target} (parquet)\n")
    frame = checked(pandas.read_parquet(target))
    reports = spectra.audit_many([LORA, FULL], BASE, include=["layers.0.self_attn"])
    assert list(frame["tuned"].unique()) == [LORA, FULL]
    assert dict(frame.groupby("tuned")["intruder"].sum()) == {r.tuned["path"]: r.total("all") for r in reports}
    for found in reports:
        mine = frame[frame["tuned"] == found.tuned["path"]].reset_index(drop=True)
        theirs = found.to_dataframe()
        for column in ROW_COLUMNS:
            assert [*mine[column].dropna()] == [*theirs[column].dropna()], column
            assert [*mine[column].isna()] == [*theirs[column].isna()], column


def test_types_hold_where_values_are_missing():
    empty = layer("layers.1.q", vectors=(), status="failed", error="x", noise_like_base=None)
    mixed = layer("layers.2.q", update={"kind": "dense", "rank": None, "scaling": None, "parameters": 1})
    for layers in ([layer("layers.0.q", [0]), empty, mixed], [empty], [mixed]):
        frame = checked(pandas.read_parquet(io.BytesIO(to_parquet([report(layers)]))))
        assert len(frame) == sum(len(item.vectors) or 1 for item in layers)
    assert frame["update_rank"].isna().all()
