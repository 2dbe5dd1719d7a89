"""Saved records, loaded whatever they are."""

from __future__ import annotations

import pytest

import spectra
from spectra.errors import CorruptFileError, MissingFileError
from tests.support.paths import FIXTURES

LORA, BASE = FIXTURES / "lora-r4", FIXTURES / "base"


def test_several_as_lines(tmp_path):
    reports = spectra.audit_many([LORA, FIXTURES / "full"], BASE, include="*.v_proj")
    file = tmp_path / "reports.jsonl"
    file.write_text("".join(report.to_json(indent=None) + "\n" for report in reports))
    assert [report.to_json() for report in spectra.load(file)] == [report.to_json() for report in reports]


def test_the_folder_of_a_repair(tmp_path):
    made = spectra.repair(LORA, BASE, scale=0.5, to=tmp_path / "out", include="*.v_proj")
    assert spectra.load(tmp_path / "out").to_json() == made.to_json()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[1]", "null", '"text"', '{"schema": "spectra.report/9"}', '{"schema": []}', "{}\n{}\n"]
)
def test_what_is_no_record(tmp_path, content):
    file = tmp_path / "made.json"
    file.write_text(content)
    with pytest.raises(CorruptFileError, match="not a record of Spectra's in JSON"):
        spectra.load(file)


def test_what_is_not_there(tmp_path):
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(MissingFileError):
            spectra.load(place)
