"""Many fine-tunes at once: folders and lists of them, broken ones among them, the base's work shared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spectra.cli import main
from spectra.errors import MissingFileError, UsageError
from spectra.files.checkpoint import Checkpoint
from spectra.sources.resolve import fine_tunes_of
from spectra.tasks.audit import audit_many
from tests.support.paths import ROOT

FAMILY, BASE = ROOT / "fixtures", ROOT / "fixtures" / "base"
NAMES = ("lora-r1", "lora-r4", "lora-r16")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        shutil.copytree(FAMILY / name, tmp_path / "all" / name)
    return tmp_path / "all"


def test_a_folder_stands_for_the_adapters_in_it(folder):
    assert [Path(path).name for path in fine_tunes_of([folder])] == sorted(NAMES)
    (folder / "notes").mkdir()
    (folder / ".hidden").mkdir()
    shutil.copytree(BASE, folder / "base")  # what they were trained on often lies beside them
    shutil.copytree(folder / "lora-r1", folder / "run" / "checkpoint-1")
    shutil.copytree(folder / "lora-r1", folder / "run" / "checkpoint-2")
    told: list[str] = []
    assert [Path(path).name for path in fine_tunes_of([folder], told.append)] == sorted(NAMES)
    assert told == [f"{folder}: not audited, as no adapters: base, run; name them to audit them"]


def test_what_holds_weights_itself_stands_for_itself(folder):
    for path in (folder / "lora-r1", folder / "lora-r1" / "adapter_model.safetensors", BASE, folder / "nowhere"):
        assert fine_tunes_of([path]) == [path]
    shutil.copy(BASE / "model.safetensors", folder / "model.safetensors")
    assert fine_tunes_of([folder]) == [folder]


def test_a_training_run_by_its_steps(folder):
    for name, step in zip(NAMES, (200, 50, 1000), strict=True):
        (folder / name).rename(folder / f"checkpoint-{step}")
    assert [Path(path).name for path in fine_tunes_of([folder])] == [
        "checkpoint-50",
        "checkpoint-200",
        "checkpoint-1000",
    ]


def test_a_list(folder, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text(f"# the family\n\n{folder / 'lora-r4'}\n  {folder}  \n")
    assert list(map(str, fine_tunes_of([f"@{file}"]))) == [str(folder / name) for name in ("lora-r4", *sorted(NAMES))]
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names nothing"):
        fine_tunes_of([f"@{file}"])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MissingFileError, match="could not be read"):
        fine_tunes_of([f"@{file}"])
    with pytest.raises(MissingFileError, match="could not be read"):
        fine_tunes_of([f"@{tmp_path / 'nowhere'}"])


def test_the_table_has_the_worst_first_and_what_is_broken_last(folder, capsys):
    (folder / "lora-r1" / "adapter_config.json").write_text("{broken")
    assert main(["audit", str(folder), "--base", str(BASE), "--quiet"]) == 2
    out, err = capsys.readouterr()
    rows = [line.split()[0].rsplit("/")[-1] for line in out.splitlines()[1:4]]
    assert rows == ["lora-r4", "lora-r16", "adapter_config.json"]
    assert "not read" in out.splitlines()[3]
    assert err.count("spectra: error:") == 1


def test_names_forge_no_line(folder, capsys):
    (folder / "lora-r1").rename(folder / "lora\n-r1\x1b[2J")
    assert main(["audit", str(folder), "--base", str(BASE), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 6
    assert all(line.isprintable() for line in out.splitlines())
    assert main(["audit", str(folder / "lora\n-r1\x1b[2J"), "--base", str(BASE), "--quiet", "--verbose"]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_a_line_each(folder, capsys):
    (folder / "lora-r16" / "adapter_model.safetensors").write_bytes(b"")
    assert main(["audit", str(folder), "--base", str(BASE), "--quiet", "--format", "jsonl"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["schema"] for line in lines] == ["spectra.report/1", "spectra.report/1", "spectra.unreadable/1"]
    assert "lora-r16" in lines[-1]["error"]


def test_the_base_is_opened_and_read_once(folder, monkeypatch):
    opened, read = [], []
    from spectra.sources import resolve

    open_base, load = resolve.open_base_at, Checkpoint.load

    def noted_opening(place, access):
        opened.append(place)
        return open_base(place, access)

    monkeypatch.setattr(resolve, "open_base_at", noted_opening)

    def noted(self, weight, **how):
        if self.path.name == "base":
            read.append(getattr(weight, "name", weight))
        return load(self, weight, **how)

    monkeypatch.setattr(Checkpoint, "load", noted)
    reports = audit_many([folder / name for name in NAMES] * 3, BASE)
    assert len(reports) == 9
    assert len(opened) == 1
    assert len(read) == len(set(read)) == 28
