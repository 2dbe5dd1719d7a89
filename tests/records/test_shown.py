"""Records show themselves: in one line, in a notebook, and by their layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import spectra
from spectra.errors import UsageError
from spectra.records.comparison import Comparison
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report

HOSTILE = "<script>alert(1)</script>"


def made():
    return report([layer("model.layers.0.q_proj", (0, 2)), layer("model.layers.1.q_proj"), layer("model.layers.1.up")])


def test_layers_by_name_and_place():
    one = made()
    assert len(one) == 3
    assert [item.name for item in one] == [item.name for item in one.layers]
    assert one["model.layers.0.q_proj"] is one[0] is one.layers[0]
    assert one[-1].name == "model.layers.1.up"
    with pytest.raises(UsageError, match=r"no layer is called 'q_proj'; did you mean 'model.layers.0.q_proj' or"):
        one["q_proj"]
    with pytest.raises(KeyError, match=r"no layer is called 'q_proj'"):
        one["q_proj"]
    with pytest.raises(IndexError):
        one[3]


def test_a_record_without_layers_is_true():
    empty = report([])
    assert empty
    assert len(empty) == 0


def test_a_comparison_by_label():
    both = Comparison((made(), report([layer("a")], tuned={**made().tuned, "path": "other"})), (), "0")
    assert len(both) == 2
    assert both["other"] is both[1]
    assert [one.tuned["path"] for one in both] == ["tuned", "other"]
    with pytest.raises(KeyError, match="no fine-tune is called 'third'; there are tuned, other"):
        both["third"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A record of each kind, of the fixtures."""
    lora, base = FIXTURES / "lora-r4", FIXTURES / "base"
    few: Any = {"include": "*.v_proj"}
    out = tmp_path_factory.mktemp("records") / "out"
    return {
        "report": spectra.audit(lora, base, **few),
        "comparison": spectra.compare([lora, FIXTURES / "full"], base, quick=True, **few),
        "ranks": spectra.ranks(lora, base, **few),
        "repair": spectra.repair(lora, base, scale=0.5, to=out, **few),
        "verification": spectra.verify(out, base, source=lora),
        "inspection": spectra.inspect(lora, base),
    }


KINDS = ("report", "comparison", "ranks", "repair", "verification", "inspection")


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_line_and_in_a_notebook(records, kind):
    record = records[kind]
    line = repr(record)
    assert line.startswith("<")
    assert "\n" not in line
    assert len(line) < 200
    shown = record._repr_html_()
    assert shown.startswith("<p>")
    assert shown.count("<table>") == shown.count("</table>") == (kind != "verification")
    assert "<script" not in shown
    assert len(shown) < 10_000
    text = record.to_text()
    assert text.endswith("\n")
    assert len(record.to_text(verbose=True)) >= len(text)


@pytest.mark.parametrize("kind", ["report", "ranks", "repair", "verification"])
def test_every_kind_has_its_layers(records, kind):
    record = records[kind]
    assert [record[item.name] for item in record] == list(record.layers)


@pytest.mark.parametrize("kind", ["report", "comparison", "ranks", "repair", "verification"])
def test_saved_and_loaded(records, kind, tmp_path):
    file = tmp_path / "record.json"
    file.write_text(records[kind].to_json())
    assert spectra.load(file).to_json() == records[kind].to_json()
    assert spectra.load(str(file)) == spectra.load(file)


@pytest.mark.parametrize("kind", ["report", "ranks", "repair", "verification"])
def test_layers_are_short_in_one_line_however_many(records, kind):
    record = records[kind]
    for item in record:
        assert len(repr(item)) < 200
    assert isinstance(record.layers, tuple)
    assert len(repr(record.layers)) < 800
    many = replace(record, layers=record.layers * 1000)
    assert len(repr(many.layers)) < 800
    assert repr(many.layers).endswith(f"… {len(many) - 3} more)")


def test_a_suggestion_and_an_extraction_in_one_line(records, tmp_path):
    suggestion = repr(records["ranks"].suggestion)
    assert suggestion.startswith("<Suggestion of rank ")
    assert len(suggestion) < 200
    made = repr(spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", include="*.0.*.v_proj"))
    assert made.startswith(f"<Extraction to {tmp_path / 'out'}: rank ")
    assert made.endswith(", 1 layers>")


def test_a_column_of_which_nothing_is_known_is_left_out(records):
    shown = records["comparison"]._repr_html_()  # --quick looks at no other weights
    assert "in all layers" in shown
    assert "weight of the first intruder" not in shown


def test_names_from_files_are_text():
    hostile = report(
        [layer(HOSTILE, (0,))], tuned={**made().tuned, "path": HOSTILE}, base={**made().base, "path": f"b{HOSTILE}"}
    )
    shown = hostile._repr_html_()
    assert HOSTILE not in shown
    assert "&lt;script&gt;" in shown


def test_other_forms_of_a_report(records):
    record = records["report"]
    assert record.to_sarif().startswith("{")
    assert record.to_model_card().startswith("<!-- spectra:begin -->")
    assert record.to_html().startswith("<!doctype html>")
    assert len(record.to_dataframe()) == 40
    assert records["comparison"].to_html().startswith("<!doctype html>")


def test_figures_of_a_record(records):
    pytest.importorskip("matplotlib")
    assert records["report"].plot().axes
    assert records["comparison"].plot("depth").axes
    with pytest.raises(UsageError, match=r"needs singular vectors.*kind='similarity'"):
        records["report"].plot("similarity")
    with pytest.raises(UsageError, match="kind = 'pie'; expected one of"):
        records["report"].plot("pie")
