"""What is printed of a repair, from records made by hand."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

from spectra.cli.output import REPORT_MARKS
from spectra.records import repair as repairs
from spectra.render.repair import render_repair, to_csv
from tests.support.repairs import MANY, audit, each, layer, record, vector


def test_text():
    text = render_repair(record())
    first, *_ = text.splitlines()
    assert first == "Repaired: 3 intruder dimensions in 2 of 4 layers scaled by 0.7; 6 intruders before, 6 after."
    assert "\nsource     tuned  (peft-lora, rank 4, alpha 8, scaling 2)\nbase       base\noutput     out" in text
    assert "rank 4 → 5–6, 1,536 → 2,112 values stored" in text
    rows = [line.split() for line in text.splitlines() if "0 → 2" in line or "3 → lower" in line]
    assert rows[0][:5] == ["model.layers.0.self_attn.q_proj", "0", "→", "2", "0.21"]
    assert rows[1][:4] == ["3", "→", "lower", "0.21"]  # the layer's name stands once
    assert "2 → 1.4" in text
    assert "4.00% → 2.02%" in text
    assert "keeps its direction" in text
    assert "optimizer.pt: weights in another format" in text
    assert "note: the adapter's own evaluation results" in text


UNCHANGED = "Unchanged: no singular vector was chosen with a scale other than 1, so every file stays what it is."
STARTS = {
    "dry run": "Dry run: 3 intruder dimensions in 2 of 4 layers would be scaled by 0.7;",
    "no audit": "Dry run: 3 intruder dimensions in 2 layers would be scaled by 0.7; 6 intruders before, 6 after.",
    "nothing chosen": UNCHANGED,
    "scale 1": UNCHANGED,
    "removed": "Repaired: 1 intruder dimension in 1 of 4 layers removed;",
    "not only intruders": "Repaired: 2 singular vectors, 1 of them intruder dimensions, in 1 of 4 layers scaled",
}


@each
def test_every_text(made):
    plain, verbose = render_repair(made), render_repair(made, verbose=True)
    assert plain.startswith(STARTS.get(next(name for name, item in MANY.items() if item is made), "Repaired: "))
    for text in (plain, verbose):
        assert text.encode().startswith(REPORT_MARKS)
        assert text.endswith("\n")
        assert "\n\n\n" not in text
        assert "None" not in text
        assert max(len(line) for line in text.splitlines()) <= 150
        assert not any(line != line.rstrip() for line in text.splitlines())
    ascii_only = render_repair(made, verbose=True, ascii_only=True)
    assert ascii_only.isascii()
    assert "?" not in ascii_only


def test_what_the_text_says_of_odd_cases():
    def of(name):
        return render_repair(MANY[name])

    assert "a dry run writes nothing" in of("dry run")
    assert "by index: layers.0.: 0,3" in of("by pattern")
    assert "scale      *: 0.7; q_proj: 0.5" in of("by pattern")
    assert "  rank  " not in of("whole")
    assert "BF16" in of("whole")
    assert "whole instead of as factors" in of("merged")
    assert "the base of 1 layer (*) is plain noise" in of("noise")
    assert "q_proj *" in of("noise")
    assert "0.742" in of("keep rank")
    assert "reached" in of("keep rank")
    assert "reached" not in of("plain")
    assert "4 → whole" in of("merged")
    assert re.search(r" 0 → gone +0\.21 +0 +2 → 0 ", of("removed"))
    assert "nothing that was measured" in of("unknown")
    assert "\nlayer" not in of("nothing chosen")


def test_the_note_on_the_count_says_what_happened():
    def notes(**changes):
        text = render_repair(record(**changes))
        return "keeps its direction" in text, "moved up into them" in text

    gone = [layer(0, [vector(index_after=None), vector(1, index_after=10)])]
    assert "2 of 3 scaled intruders are still among the top 10" in render_repair(record()).replace("\n", " ")
    assert notes() == notes(audit=audit(2)) == (True, False)
    assert notes(audit=audit(7)) == (True, True)
    assert notes(layers=gone) == (False, True)
    assert notes(layers=gone, audit=audit(4)) == (False, False)
    others = [layer(0, [vector(intruder=False)])]
    assert notes(layers=others, audit=audit(0), intruders_before=0) == (False, False)


def test_layers_that_failed_are_named():
    bad = replace(audit().layers[0], status="non_finite", error="NaN in W1")
    text = render_repair(record(audit=replace(audit(), layers=(bad,))))
    assert "non_finite: model.layers.0.self_attn.q_proj: NaN in W1" in text


def test_of_many_layers_those_that_changed_most():
    layers = [layer(number, update_change=number / 100, notes=("a convolution",)) for number in range(40)]
    text = render_repair(record(layers))
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("model.layers.")]
    assert shown == [f"model.layers.{number}.self_attn.q_proj" for number in range(16, 40)]
    assert "16 more layers" in text
    assert "a convolution" not in text
    text = render_repair(record(layers), verbose=True)
    assert sum(line.startswith("model.layers.") for line in text.splitlines()) == 40
    assert "note: model.layers.3.self_attn.q_proj: a convolution" in text


def test_files_left_behind_are_listed_by_reason():
    files = {f"model-{number}.bin": "weights in another format" for number in range(5)}
    text = render_repair(record(left_behind=files))
    assert "left behind: 5 files of the source\n  model-0.bin, model-1.bin, model-2.bin, … (2 more): weights" in text
    assert "model-4.bin" in render_repair(record(left_behind=files), verbose=True)
    assert "left behind" not in render_repair(record(left_behind={}))


def test_csv():
    rows = list(csv.DictReader(io.StringIO(to_csv(record()))))
    assert tuple(rows[0]) == repairs.ROW_COLUMNS
    assert [row["index_after"] for row in rows] == ["2", "", "2"]
    assert {row["tuned"] for row in rows} == {"tuned"}
    assert to_csv(record()).encode().startswith(REPORT_MARKS)
