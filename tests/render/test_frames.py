"""Tables and lines for other programs: parquet, JSON lines."""

from __future__ import annotations

import io
import json
import shutil
import sys

import jsonschema
import pandas
import pytest
from safetensors.torch import load_file, save_file

import spectra
from spectra.cli import main
from spectra.records.report import ROW_COLUMNS, json_schema
from spectra.records.schemas import read_schema
from spectra.render.frames import to_parquet
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report

LORA, FULL, BASE = (str(FIXTURES / name) for name in ("lora-r4", "full", "base"))
FEW = ["--include", "layers.0.self_attn"]
INTEGERS = {"rows", "columns", "update_rank", "layer_intruders", "index", "base_index"}
BOOLEANS = {"noise_like_base", "intruder"}
TEXTS = {"tuned", "layer", "module_type", "role", "status", "update_kind", "flags"}


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


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


def test_parquet_is_no_text(capsys):
    code, out, err = run(capsys, "audit", LORA, "--format", "parquet")
    assert (code, out) == (2, "")
    assert "name a file to write with -o" in err


def test_only_our_own_tables_are_replaced(capsys, tmp_path):
    target = tmp_path / "data.parquet"
    pandas.DataFrame({"a": [1]}).to_parquet(target)
    before = target.read_bytes()
    code, _, err = run(capsys, "audit", LORA, "-o", str(target))
    assert code == 2
    assert "not overwritten" in err
    assert target.read_bytes() == before


def test_without_pyarrow_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run(capsys, "audit", "/no/such", "-o", str(tmp_path / "x.parquet"))
    assert (code, err) == (
        2, "spectra: error: parquet needs pandas and pyarrow: pip install 'intruder-spectra[dataframe]'\n",
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("unreadable", [0, 1])
def test_json_lines_of_an_audit(capsys, tmp_path, count, unreadable):
    tuned = [LORA, FULL][:count] + [str(tmp_path / "nothing")] * unreadable
    code, out, err = run(capsys, "audit", *tuned, "--base", BASE, *FEW, "--format", "jsonl")
    assert code == (2 if unreadable else 0)
    assert err.count("\n") == unreadable
    lines = [json.loads(line) for line in out.splitlines()]
    assert out.endswith("\n")
    assert [line["schema"] for line in lines] == ["spectra.report/1"] * count + ["spectra.unreadable/1"] * unreadable
    for line, path in zip(lines, tuned, strict=True):
        if line["schema"] == "spectra.report/1":
            jsonschema.validate(line, json_schema())
            assert line["tuned"]["path"] == path
        else:
            assert line["error"].startswith(f"{path}: ")


def test_json_lines_where_nothing_could_be_read(capsys, tmp_path):
    target = tmp_path / "all.jsonl"
    for _ in range(2):
        code, out, _ = run(capsys, "audit", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(target))
        assert (code, out) == (2, "")
    assert [json.loads(line)["schema"] for line in target.read_text().splitlines()] == ["spectra.unreadable/1"] * 2


def test_json_lines_name_layers_that_failed(capsys, tmp_path):
    shutil.copytree(LORA, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, file)
    code, out, _ = run(capsys, "audit", str(tmp_path / "adapter"), "--base", BASE, *FEW, "--format", "jsonl")
    (line,) = out.splitlines()
    assert code == 2
    assert json.loads(line)["summary"]["layers_failed"] == 1


def test_json_lines_of_a_repair(capsys):
    command = ["mitigate", LORA, "--scale", "0.5", "--dry-run", *FEW]
    (line,) = run(capsys, *command, "--format", "jsonl")[1].splitlines()
    whole = json.loads(run(capsys, *command, "--format", "json")[1])
    assert json.loads(line)["summary"] == whole["summary"]
    assert json.loads(line)["schema"] == "spectra.mitigation/1"


@pytest.mark.parametrize(
    ("command", "schema"),
    [
        (["compare", LORA, FULL, "--base", BASE, "--quick"], "comparison.schema.json"),
        (["ranks", LORA], None),
    ],
)
def test_json_lines_of_one_record(capsys, tmp_path, command, schema):
    _, out, _ = run(capsys, *command, *FEW, "--format", "jsonl")
    (line,) = out.splitlines()
    _, whole, _ = run(capsys, *command, *FEW, "--format", "json")

    def settled(text):
        return {name: value for name, value in json.loads(text).items() if name not in ("seconds", "reports")}

    assert settled(line) == settled(whole)
    if schema is not None:
        assert json.loads(line)["schema"] == read_schema(schema)["properties"]["schema"]["const"]
    target = tmp_path / "x.jsonl"
    for _ in range(2):
        assert run(capsys, *command, *FEW, "-o", str(target))[0] == 0
    assert settled(target.read_text()) == settled(line)
