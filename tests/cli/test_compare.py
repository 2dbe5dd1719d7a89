"""``spectra compare`` as people call it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys

import pytest

from spectra.cli import main
from spectra.cli.options import SETTINGS
from tests.support.commands import run
from tests.support.paths import FIXTURES

BASE = ("--base", str(FIXTURES / "base"))


def of(*members):
    return [FIXTURES / member for member in members]


def test_the_options_are_the_pipelines_own():
    import inspect

    from spectra import audit_many

    assert set(inspect.signature(audit_many).parameters) - {"tuned", "base", "progress", "on_unreadable"} == (
        SETTINGS | {"resume", "executor"}
    )


def test_table(capsys):
    code, out, err = run(capsys, "compare", *of("lora-r1", "lora-r4", "full"), *BASE, "--draws", 2, "--quiet")
    assert (code, err) == (0, "")
    blocks = [block.splitlines() for block in out.split("\n\n")]
    titles = [block[0].split("  ")[0].strip() for block in blocks]
    assert titles == [
        "base", "update", "intruders", "by module type", "at epsilon =", "among the top k =", "of W0 + s·dW, s =",
        "overlap of updates",
    ]  # fmt: skip
    for block in blocks[1:]:
        assert [line.split()[0] for line in block[1:4]] == ["lora-r1", "lora-r4", "full"]
    assert blocks[1][2].split()[:8] == ["lora-r4", "peft-lora", "4", "8", "2", "49,664", "3.9%", "0.957"]
    # Size, distance from the first intruder, count, and the count by chance: in one line.
    assert blocks[2][0].split()[1:6] == ["‖dW‖/‖W0‖", "‖dW‖₂/θ", "total", "by", "chance"]
    assert blocks[2][2].split()[:4] == ["lora-r4", "0.275", "3.61", "35"]
    assert blocks[2][2].split()[5] == "±"
    assert "(2 draws a layer)" in out
    assert max(len(line) for line in out.splitlines()) <= 150


def test_quick_leaves_out_what_takes_long(capsys):
    code, out, _ = run(
        capsys, "compare", *of("lora-r1", "full"), *BASE, "--quick", "--verbose", "--include", "layers.0."
    )
    assert code == 0
    assert "p: how often" not in out
    assert "Free up to" not in out
    assert "intruders by layer" in out
    assert re.search(r"^model\.layers\.0\.self_attn\.v_proj +\d +\d$", out, flags=re.MULTILINE)


def test_ascii_where_the_terminal_knows_no_more(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    members = [str(path) for path in of("lora-r1", "full")]
    assert main(["compare", *members, *BASE, "--draws", "1", "--include", "layers.0."]) == 0
    text = raw.getvalue().decode("ascii")
    assert "?" not in text
    assert "|dW|/|W0|" in text


def test_formats_and_files(capsys, tmp_path):
    arguments = ["compare", *of("lora-r1", "full"), *BASE, "--quick", "--include", "layers.0."]
    code, out, _ = run(capsys, *arguments, "--format", "json")
    assert code == 0
    value = json.loads(out)
    assert value["schema"] == "spectra.comparison/1"
    assert [row["label"] for row in value["summary"]] == ["lora-r1", "full"]
    code, out, _ = run(capsys, *arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row["intruders"]) for row in rows] == [row["intruders"] for row in value["summary"]]
    for name in ("a.json", "a.csv", "a.txt"):
        for _ in range(2):  # the second time over our own
            code, out, err = run(capsys, *arguments, "-o", tmp_path / name)
            assert (code, out) == (0, "")
            assert "wrote" in err
    (tmp_path / "mine.json").write_text('{"precious": true}')
    code, out, err = run(capsys, *arguments, "-o", tmp_path / "mine.json")
    assert code == 2
    assert "not overwritten" in err
    assert (tmp_path / "mine.json").read_text() == '{"precious": true}'


def test_merges(capsys):
    r4, r16 = of("lora-r4", "lora-r16")
    code, out, _ = run(
        capsys,
        "compare",
        r4,
        "--merge",
        f"{r4}=0.5",
        f"{r16}=0.5",
        "--merge",
        r16,
        *BASE,
        "--quick",
        "--include",
        "layers.0.",
    )
    assert code == 0
    assert re.search(r"^0\.5\*lora-r4 \+ 0\.5\*lora-r16 +merged", out, flags=re.MULTILINE)
    assert re.search(r"^1\*lora-r16 +merged", out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "nothing to compare"),
        (["compare", "--merge", "lora-r4=x", *BASE], "'x' is no number"),
        (["compare", FIXTURES / "full"], "--base"),
        (["compare", FIXTURES / "lora-r4", "--draws", "-1"], "draws = -1"),
        (["compare", FIXTURES / "nothing", *BASE], "no such file"),
        (["compare", "--merge", f"{FIXTURES / 'lora-r4'}=nan"], "expected a finite number"),
    ],
)
def test_bad_usage(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_path_with_an_equals_sign(capsys, tmp_path):
    (tmp_path / "x=1").symlink_to(FIXTURES / "lora-r1")
    code, out, err = run(capsys, "compare", "--merge", tmp_path / "x=1", *BASE, "--quick", "--include", "layers.0.")
    assert code == 0, err
    assert "1 fine-tune," in out
