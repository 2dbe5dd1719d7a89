"""``--html`` as people call it."""

from __future__ import annotations

import sys
from pathlib import Path

from spectra.cli import main
from spectra.errors import UsageError
from tests.support.pages import data_of
from tests.support.paths import FIXTURES


def test_without_plotly_that_is_said_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["audit", "nowhere-at-all", "--html", str(tmp_path / "page.html")]) == 2
    assert "in the folder of Spectra, pip install '.[html]'" in capsys.readouterr().err


def test_the_command_writes_a_page_and_replaces_nothing_else(tmp_path, capsys, monkeypatch):
    page, text = tmp_path / "page.html", tmp_path / "mine.html"
    adapter, base = str(FIXTURES / "lora-r4"), str(FIXTURES / "base")
    common = ["audit", adapter, "--base", base, "--include", "*layers.0.*"]
    assert main([*common, "--html", str(page), "--matrices", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Intruder dimensions: ")
    assert f"wrote {page} (html)" in said.err
    assert len(data_of(page.read_text())["reports"][0]["matrices"]) == 2
    text.write_text("<!doctype html>\n<p>mine")
    assert main([*common, "--html", str(text)]) == 2
    assert "no report of spectra's" in capsys.readouterr().err
    assert text.read_text() == "<!doctype html>\n<p>mine"
    first = page.read_bytes()
    assert main([*common, "--html", str(page), "--matrices", "0", "--quiet"]) == 0
    assert page.read_bytes() != first
    assert main([*common, "--html", str(page), "-o", str(page), "--format", "json"]) == 2
    assert "the same file" in capsys.readouterr().err
    assert main([*common, "--matrices", "3"]) == 2
    assert main([*common, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "page.html"]


def test_a_page_without_matrices_where_the_files_went_away(tmp_path, capsys, monkeypatch):
    def gone(*_, **__):
        raise UsageError("fixtures/lora-r4: gone")

    monkeypatch.setattr("spectra.tasks.similarity.similarity_matrices", gone)
    page = tmp_path / "page.html"
    assert main(["audit", str(FIXTURES / "lora-r4"), "--include", "*layers.0.*", "--html", str(page)]) == 0
    assert "gone" in capsys.readouterr().err
    assert data_of(page.read_text())["reports"][0]["matrices"] == {}


def test_several_fine_tunes_make_one_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    names = [str(FIXTURES / name) for name in ("lora-r4", "lora-r1", "not-there")]
    code = main(["audit", *names, "--base", str(FIXTURES / "base"), "--include", "*layers.0.*", "--html", str(page)])
    assert code == 2
    html = page.read_text()
    assert [one["label"] for one in data_of(html)["reports"]] == ["lora-r4", "lora-r1"]
    assert "1 fine-tune could not be read" in html
    assert "not-there: no such file" in html


def test_a_comparison_brings_its_overlaps_and_weights(tmp_path):
    page = tmp_path / "page.html"
    names = [str(FIXTURES / name) for name in ("lora-r4", "lora-r1")]
    command = [
        "compare",
        *names,
        "--base",
        str(FIXTURES / "base"),
        "--include",
        "*layers.0.self_attn.*",
        "--draws",
        "2",
    ]
    assert main([*command, "--merge", *names, "--html", str(page), "--quiet"]) == 0
    data = data_of(page.read_text())
    assert len(data["reports"]) == 3
    assert len(data["overlaps"]) == 3
    assert data["reports"][0]["p"]
    assert data["reports"][0]["weights"]
    assert data["reports"][2]["matrices"] == {}  # a merge has no files of its own


def test_no_output_replaces_another_of_the_same_run(tmp_path, capsys):
    common = ["audit", str(FIXTURES / "lora-r4"), "--base", str(FIXTURES / "base"), "--include", "*layers.0.*q_proj"]
    journal, page = str(tmp_path / "run.jsonl"), str(tmp_path / "new.md")
    assert main([*common, "--resume", journal]) == 0
    kept = Path(journal).read_bytes()
    for more in (["--resume", journal, "--html", journal], ["--resume", journal, "-o", journal], ["-o", journal]):
        assert main([*common, *more]) == 2
        assert Path(journal).read_bytes() == kept
    assert main([*common, "--html", page, "--model-card", page]) == 2
    assert not Path(page).exists()
    notes = tmp_path / "notes.txt"
    notes.write_text("Intruders: guilty, my notes")
    assert main([*common, "-o", str(notes)]) == 2
    assert notes.read_text() == "Intruders: guilty, my notes"
    capsys.readouterr()
