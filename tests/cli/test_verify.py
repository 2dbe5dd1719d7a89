"""``spectra verify`` as people call it."""

from __future__ import annotations

import csv
import inspect
import io
import json
from typing import Any

import pytest

from spectra.cli import main
from spectra.cli import verify as command
from spectra.repairs import verify as checking
from tests.support.repairs import AMISS, check


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls the command with the function behind it replaced; (exit code, out, err, what it was given)."""

    def call(*arguments, verified=None):
        given: dict[str, Any] = {}

        def verify(tuned, base=None, **options):
            given.update(options, tuned=tuned, base=base)
            return verified or check()

        monkeypatch.setattr(checking, "verify", verify)
        code = main(["verify", *map(str, arguments)])
        return code, *capsys.readouterr(), given

    return call


def test_the_options_are_the_functions_own():
    assert set(inspect.signature(checking.verify).parameters) == {
        "tuned", "base", "source", "progress", *command.PASSED,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "made"), AMISS.items())
def test_verdict(call, name, made):
    code, out, err, given = call("out", verified=made)
    assert code == (0 if made.holds else 1), name
    assert err == ""
    assert out.startswith("Verified: " if made.holds else "NOT verified: ")
    assert given == {
        "tuned": "out", "source": None, "base": None, "dtype": "float32", "device": "cpu", "threads": None,
        "progress": None, "allow_pickle": False, "local_files_only": False,
    }  # fmt: skip


def test_where_the_source_moved(call, tmp_path):
    arguments = ("out", "--source", "moved", "--base", "b", "--threads", "2")
    _, out, _, given = call(*arguments, "--format", "json")
    assert (given["source"], given["base"], given["threads"]) == ("moved", "b", 2)
    assert json.loads(out)["schema"] == "spectra.verification/1"
    _, out, _, _ = call(*arguments, "--format", "csv")
    assert [row["holds"] for row in csv.DictReader(io.StringIO(out))] == ["True", "True"]
    assert "a " not in call(*arguments)[1].partition("\n\n")[2]
    assert "holds" in call(*arguments, "--verbose")[1]
    _, out, _, _ = call(*arguments, "-o", tmp_path / "check.txt")
    assert out == ""
    assert (tmp_path / "check.txt").read_text().startswith("Verified: ")


def test_options_of_a_repair_are_unknown(call, capsys):
    with pytest.raises(SystemExit) as caught:
        call("out", "--scale", "0.5")
    assert caught.value.code == 2
    assert "unrecognized arguments: --scale" in capsys.readouterr().err
