"""What is written where: lines of JSON, tables, and files that are not ours."""

from __future__ import annotations

import json
import os
import shutil
import sys

import jsonschema
import pandas
import pytest
from safetensors.torch import load_file, save_file

import spectra
from spectra.records.report import json_schema
from spectra.records.schemas import read_schema
from tests.support.commands import run
from tests.support.paths import FIXTURES

LORA, FULL, BASE = (str(FIXTURES / name) for name in ("lora-r4", "full", "base"))
FEW = ["--include", "layers.0.self_attn"]


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
    assert code == 2
    assert err == (
        "spectra: error: parquet needs pandas and pyarrow: in the folder of Spectra, pip install '.[dataframe]'\n"
    )


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
    command = ["repair", LORA, "--scale", "0.5", "--dry-run", *FEW]
    (line,) = run(capsys, *command, "--format", "jsonl")[1].splitlines()
    whole = json.loads(run(capsys, *command, "--format", "json")[1])
    assert json.loads(line)["summary"] == whole["summary"]
    assert json.loads(line)["schema"] == "spectra.repair/1"


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


def test_output_appears_whole_and_replaces_only_reports(capsys, tmp_path):
    target = tmp_path / "report.json"
    code, out, err = run(capsys, "audit", LORA, "-o", str(target))  # its ending says json
    assert (code, out) == (0, "")
    assert err == f"spectra: wrote {target} (json)\n"
    first = json.loads(target.read_text())
    assert first["summary"]["intruders"] == spectra.audit(LORA).total("all")
    assert list(tmp_path.iterdir()) == [target], "no temporary file stays"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert run(capsys, "audit", LORA, "-k", "2", "--format", "json", "-o", str(target))[0] == 0
    assert json.loads(target.read_text())["settings"]["top_k"] == 2
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"precious")
    code, _, err = run(capsys, "audit", LORA, "-o", str(precious))
    assert code == 2
    assert "not overwritten" in err
    assert precious.read_bytes() == b"precious"
    for name in ("one.json", "two.csv", "three.txt"):
        (tmp_path / name).write_text("{}")
        assert run(capsys, "audit", LORA, "-o", str(tmp_path / name))[0] == 2
        assert (tmp_path / name).read_text() == "{}"
    assert run(capsys, "audit", LORA, "-o", str(tmp_path))[0] == 2


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_form_of_report_can_be_written_again(capsys, tmp_path, form, count):
    target = str(tmp_path / "report")
    for _ in range(2):
        assert run(capsys, "audit", *[LORA] * count, "--format", form, "-o", target)[0] == 0
