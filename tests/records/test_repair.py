"""The record of a repair, and of its verification, from records made by hand."""

from __future__ import annotations

import csv
import io
import json

import jsonschema
import pytest
import referencing

from spectra.cli.output import REPORT_MARKS
from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.records import repair as repairs
from spectra.records import report
from spectra.records.repair import Repair
from spectra.render.repair import render_verification, to_csv
from spectra.sources.saved import load_repair
from tests.support.repairs import AMISS, audit, check, each, layer, record, vector


def validator(schema):
    registry = referencing.Registry().with_resources(
        [
            (name, referencing.Resource.from_contents(home.json_schema()))
            for name, home in (("spectra.report/1", report), ("spectra.repair/1", repairs))
        ]
    )
    return jsonschema.Draft202012Validator(schema, registry=registry)


@each
@pytest.mark.parametrize("canonical", [False, True])
def test_json_follows_the_schema_and_comes_back(made, canonical, tmp_path):
    text = made.to_json(canonical=canonical)
    validator(repairs.json_schema()).validate(json.loads(text))
    path = tmp_path / "spectra-repair.json"
    path.write_text(text)
    again = load_repair(path)
    assert load_repair(tmp_path) == again
    assert (again.layers, again.summary) == (made.layers, made.summary)
    if not canonical:
        assert again.to_json() == text
        assert again.rows() == made.rows()


def test_the_schema_lists_every_field():
    schema = repairs.json_schema()
    value = record().to_dict()
    assert schema["properties"].keys() == value.keys()
    assert set(schema["required"]) == value.keys() - {"seconds"}
    assert schema["properties"]["summary"]["properties"].keys() == value["summary"].keys()
    for name, item in (("layer", value["layers"][0]), ("vector", value["layers"][0]["vectors"][0])):
        assert set(schema["$defs"][name]["required"]) == schema["$defs"][name]["properties"].keys() == item.keys()
    assert schema["$defs"]["verification"]["properties"].keys() == check().to_dict().keys()


def test_the_canonical_form_holds_nothing_of_this_machine():
    here, there = record(), record(
        base={**record().base, "path": "/a/base", "changed_since_cached": True},
        source={**record().source, "path": "/a/tuned"}, output={**(record().output or {}), "path": "/a/out"},
        settings={**record().settings, "workers": 7}, seconds=9.0, audit=audit(seconds=8.0),
    )  # fmt: skip
    assert here.to_json() != there.to_json()
    assert here.to_json(canonical=True) == there.to_json(canonical=True)
    assert here.source["path"] == "tuned"
    assert here.to_json(canonical=True) != record(layers=()).to_json(canonical=True)


def test_fields_may_be_added():
    value = record().to_dict()
    value["new"] = value["layers"][0]["new"] = value["layers"][0]["vectors"][0]["new"] = 1
    assert Repair.from_dict(value).to_dict() == record().to_dict()


def without(*path):
    value = record().to_dict()
    place = value
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[1]", '{"schema": "spectra.repair/1"}', '{"schema": "spectra.repair/2"}',
        audit().to_json(), without("settings", "scale"), without("layers", 0, "vectors", 0, "sigma"),
        without("layers", 0, "name"), without("source"), without("audit"), "[" * 9999,
    ],
)  # fmt: skip
def test_what_is_no_record(text, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=r"record\.json"):
        load_repair(path)
    for nothing in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(MissingFileError):
            load_repair(nothing)


def test_another_schema_is_named():
    with pytest.raises(UsageError, match=r"spectra\.report/1"):
        Repair.from_dict(audit().to_dict())


def test_totals():
    made = record([
        layer(0, [vector(), vector(1, scale=0.5, scale_achieved=0.52)], update_norm=3.0, update_change=0.4),
        layer(1, update_norm=4.0, update_change=0.1, update_error=None, noise_like_base=True),
        layer(2, [vector(scale=1.0)], update_change=9.0, update_error=1.0),
    ])  # fmt: skip
    found = made.summary
    assert found["vectors_scaled"] == found["intruders_scaled"] == 3
    assert (found["layers_changed"], found["layers_decided"], found["layers_noise_like_base"]) == (2, 4, 1)
    assert (found["intruders_before"], found["intruders_after"]) == (6, 6)
    assert found["update_change"] == pytest.approx((1.2**2 + 0.4**2) ** 0.5 / 5)
    assert found["scale_error"] == pytest.approx(0.02)
    assert (found["update_error"], found["weight_error"]) == (2.5e-8, 3e-9)
    assert (found["parameters"], found["parameters_after"]) == (2 * 768, 192 * (6 + 5))
    assert repr(made) == "<Repair of tuned: 3 vectors in 2 layers>"


def test_totals_of_nothing():
    found = record(layers=()).summary
    assert [found[key] for key in ("update_change", "scale_error", "update_error", "weight_error")] == [None] * 4
    assert found["parameters"] == 0
    assert record([layer(update_norm=0.0, update_change=None)]).summary["update_change"] is None


def test_without_an_audit_the_layers_say_how_many_are_left():
    made = record([layer(0, intruders_after=1)], audit=None)
    assert (made.intruders_after, made.layers_decided) == (4, None)


def test_dataframe():
    pytest.importorskip("pandas")
    frame = record().to_dataframe()
    assert list(frame.columns) == list(repairs.ROW_COLUMNS)
    assert list(frame["index"]) == [0, 3, 0]
    assert list(frame["layer_intruders_before"]) == [3, 3, 3]
    assert set(frame["rows"]) == {128}
    assert list(record(layers=()).to_dataframe().columns) == list(repairs.ROW_COLUMNS)


@pytest.mark.parametrize("made", AMISS.values(), ids=AMISS)
def test_verifications(made):
    value = json.loads(made.to_json())
    validator({"$ref": "spectra.repair/1#/$defs/verification"}).validate(value)
    assert value["schema"] == "spectra.verification/1"
    holds = made in (AMISS["holds"], AMISS["empty"])
    assert made.holds == value["holds"] == holds
    text = render_verification(made)
    assert text.startswith("Verified: out matches" if holds else "NOT verified: out")
    for problem in made.problems:
        assert f"problem: {problem}" in text
    assert [line.split()[0] for line in text.splitlines() if "DIFFERS" in line] == [item.name for item in made.failed]
    verbose = render_verification(made, verbose=True, ascii_only=True)
    assert verbose.isascii()
    assert sum(line.endswith(("holds", "DIFFERS")) for line in verbose.splitlines()) == len(made.layers)
    assert text.encode().startswith(REPORT_MARKS)
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert [row["layer"] for row in rows] == [item.name for item in made.layers]
    assert to_csv(made).encode().startswith(REPORT_MARKS)
    assert ("holds" if holds else "does not hold") in repr(made)
