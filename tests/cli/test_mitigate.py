"""``spectra repair`` as people call it: what reaches the functions behind it, and what comes back."""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from spectra.cli import main
from spectra.cli import repair as command
from spectra.errors import UsageError
from spectra.repairs import repair as mitigating
from spectra.repairs import verify as checking
from tests.support.paths import ROOT
from tests.support.repairs import AMISS, audit, check, record

WHAT = ("tuned", "--scale", "0.7")


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls the command with the functions behind it replaced; (exit code, out, err, what they were given)."""

    def call(*arguments, made=None, verified=None):
        given: dict[str, Any] = {}

        def repair(tuned, output, base=None, **options):
            given.update(options, tuned=tuned, output=output, base=base)
            return made or record(output=record().output if output else None)

        def verify(folder, source=None, base=None, **options):
            given.update(options, folder=folder, source=source, base=base)
            return verified or check()

        monkeypatch.setattr(mitigating, "mitigate", mitigate)
        monkeypatch.setattr(checking, "verify", verify)
        code = main(["mitigate", *map(str, arguments)])
        return code, *capsys.readouterr(), given

    return call


def test_the_options_are_the_functions_own():
    makes, checks = (inspect.signature(f).parameters for f in (mitigating.mitigate, checking.verify))
    assert set(makes) == {"tuned", "output", "base", "scale", "which", "progress", *command.PASSED}
    assert set(checks) == {"folder", "source", "base", "progress", *command.CHECKING}


def test_the_defaults_are_told_apart_from_what_was_given():
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    options = vars(parser.parse_args(["mitigate", "tuned"]))
    assert {name: options[name] for name in command.MAKING} == command.MAKING
    free = {"tuned", "base", "verify", "device", "threads", "format", "quiet", "verbose", "run", "output"}
    free |= {"allow_pickle", "local_files_only"}
    assert options.keys() - command.MAKING.keys() == free
    assert set(command.PASSED) - command.MAKING.keys() == set(command.CHECKING)


def test_what_is_passed_on(call):
    code, out, err, given = call(*WHAT, "--base", "b", "-o", "out")
    assert (code, err) == (0, "spectra: wrote out (peft-lora)\n")
    assert out.startswith("Repaired: ")
    progress = given.pop("progress")
    assert progress is None
    defaults = {"dtype": None, "keep_rank": False, "merged": False, "force": False, "device": "cpu", "threads": None}
    defaults |= {"allow_pickle": False, "local_files_only": False}
    assert given == {
        "tuned": "tuned", "output": "out", "base": "b", "scale": 0.7, "which": "all", "top_k": 10, "epsilon": 0.5,
        "side": "left", "include": [], "exclude": [], "engine": "auto", "workers": 1, "cache": None, **defaults,
    }  # fmt: skip
    _, _, err, given = call(
        *WHAT, "-o", "out", "--force", "--which", "top", "--keep-rank", "--dtype", "bfloat16", "-k", "5", "-e", "0.4",
        "--side", "right", "--include", "a", "--exclude", "b", "--engine", "exact", "--device", "cuda", "--workers",
        "3", "--threads", "2", "--no-cache", "--quiet",
    )  # fmt: skip
    assert err == ""
    assert (given["which"], given["dtype"], given["side"], given["engine"]) == ("top", "bfloat16", "right", "exact")
    assert (given["top_k"], given["epsilon"], given["workers"], given["threads"]) == (5, 0.4, 3, 2)
    assert given["force"]
    assert given["keep_rank"]
    assert given["cache"] is False
    assert (given["include"], given["exclude"], given["device"]) == (["a"], ["b"], "cuda")
    assert call(*WHAT, "-o", "out", "--merged")[3]["merged"]


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        (["0.7"], 0.7),
        (["0"], 0.0),
        (["-0.0"], 0.0),
        (["1.5"], 1.5),
        (["q_proj=0.5"], {"q_proj": 0.5}),
        (["q_proj=0.5", "0.7", "layers.0.=0.6"], {"*": 0.7, "q_proj": 0.5, "layers.0.": 0.6}),
        (["q_proj=0.5", "*=0.6"], {"q_proj": 0.5, "*": 0.6}),
        (["a=b=0.5"], {"a=b": 0.5}),
    ],
)
def test_scales(call, arguments, scale):
    options = [f"--scale={text}" for text in arguments]
    given = call("tuned", "--dry-run", *options)[3]["scale"]
    assert given == scale
    assert str(given) == str(scale)  # in this order, and no -0.0


@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        (["q_proj=0,2"], {"q_proj": [0, 2]}),
        (["q_proj= 3, 0-2 ,2", "layers.1.=7"], {"q_proj": [0, 1, 2, 3], "layers.1.": [7]}),
    ],
)
def test_vectors_by_name(call, arguments, which):
    options = [item for text in arguments for item in ("--vectors", text)]
    assert call(*WHAT, "--dry-run", *options)[3]["which"] == which


def test_a_dry_run_writes_nothing(call):
    code, out, err, given = call(*WHAT, "--dry-run", "-o", "out")
    assert (code, err, given["output"]) == (0, "", None)
    assert out.startswith("Dry run: ")


def test_formats(call):
    _, out, _, _ = call(*WHAT, "-o", "out", "--format", "json")
    assert json.loads(out)["schema"] == "spectra.repair/1"
    _, out, err, _ = call(*WHAT, "-o", "out", "--format", "csv", "--quiet")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 3
    assert err.splitlines() == [
        "spectra: note: the adapter's own evaluation results are those of the source",
        "spectra: left behind: optimizer.pt: weights in another format",
        "spectra: left behind: runs: a folder",
    ]
    short, long = (call(*WHAT, "-o", "out", *more, made=many())[1] for more in ((), ("--verbose",)))
    assert len(short) < len(long)


def many():
    layers = [replace(record().layers[1], name=f"model.layers.{number}.q_proj") for number in range(50)]
    return record(layers)


def test_ascii_where_the_terminal_knows_no_more(call, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    call(*WHAT, "-o", "out", "--verbose")
    text = raw.getvalue().decode("ascii")
    assert "?" not in text
    assert "0 -> 2" in text


def test_layers_that_could_not_be_analysed(call):
    bad = replace(audit().layers[0], status="non_finite", error="NaN in W1")
    code, out, err, _ = call(*WHAT, "-o", "out", made=record(audit=replace(audit(), layers=(bad,))))
    assert code == 2
    assert out.startswith("Repaired: ")
    assert "spectra: error: model.layers.0.self_attn.q_proj: non_finite: NaN in W1" in err
    assert call(*WHAT, "--dry-run", made=record(output=None, audit=None))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0.7", "-o", "out"], "nothing to repair"),
        (["tuned", "-o", "out"], "--scale is missing"),
        (["tuned", "--scale", "0.7"], "-o OUT is missing"),
        (["tuned", "--scale", "x", "--dry-run"], "--scale x: 'x' is no number"),
        (["tuned", "--scale", "", "--dry-run"], "'' is no number"),
        (["tuned", "--scale=-1", "--dry-run"], "expected a finite number, 0 or more"),
        (["tuned", "--scale", "nan", "--dry-run"], "expected a finite number"),
        (["tuned", "--scale", "q=inf", "--dry-run"], "--scale q=inf: expected a finite number"),
        (["tuned", "--scale", "=0.5", "--dry-run"], "expected PATTERN=VALUE"),
        (["tuned", "--scale", "0.5", "--scale", "0.7", "--dry-run"], "a second value for the rest"),
        (["tuned", "--scale", "q=0.5", "--scale", "q=0.7", "--dry-run"], "a second value for q"),
        ([*WHAT, "--dry-run", "--which", "top", "--vectors", "q=0"], "without --which"),
        ([*WHAT, "--dry-run", "--vectors", "0,1"], "--vectors 0,1: expected PATTERN=VALUE"),
        ([*WHAT, "--dry-run", "--vectors", "q="], "'' is no index"),
        ([*WHAT, "--dry-run", "--vectors", "q=-1"], "'-1' is no index"),
        ([*WHAT, "--dry-run", "--vectors", "q=1-"], "'1-' is no index"),
        ([*WHAT, "--dry-run", "--vectors", "q=3-1"], "no rising range"),
        ([*WHAT, "--dry-run", "--vectors", "q=0-99999999999999999999999"], "no rising range"),
        ([*WHAT, "--dry-run", "--vectors", "q=1", "--vectors", "q=2"], "a second value for q"),
        ([*WHAT, "-o", "out", "--merged", "--keep-rank"], "--keep-rank is about an adapter's rank"),
        ([*WHAT, "-o", "out", "--merged", "--dtype", "float16"], "--dtype is about an adapter's factors"),
        (["--verify", "out", *WHAT], "--scale is for making a repair"),
        (["--verify", "out", "-o", "other"], "--output is for making"),
        (["--verify", "out", "--dry-run"], "--dry-run is for making"),
        (["--verify", "out", "--force"], "--force is for making"),
        (["--verify", "out", "--vectors", "q=0"], "--vectors is for making"),
        (["--verify", "out", "-k", "3"], "--top-k is for making"),
        (["--verify", "out", "--no-cache"], "--cache or --no-cache is for making"),
        (["--verify", "out", "--keep-rank"], "--keep-rank is for making"),
    ],
)
def test_bad_usage(call, arguments, message):
    code, out, err, given = call(*arguments)
    assert (code, out, given) == (2, "", {})
    assert message in err
    assert err.startswith("spectra: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "option", [["--scale"], ["--which", "some"], ["--dtype", "int8"], ["--cache", "d", "--no-cache"]]
)
def test_options_that_do_not_exist(call, option):
    with pytest.raises(SystemExit) as caught:
        call(*WHAT, "-o", "out", *option)
    assert caught.value.code == 2


@pytest.mark.parametrize(("name", "made"), AMISS.items())
def test_verify(call, name, made):
    code, out, err, given = call("--verify", "out", verified=made)
    assert code == (0 if made.holds else 1), name
    assert err == ""
    assert out.startswith("Verified: " if made.holds else "NOT verified: ")
    assert given == {
        "folder": "out", "source": None, "base": None, "device": "cpu", "threads": None, "progress": None,
        "allow_pickle": False,
        "local_files_only": False,
    }  # fmt: skip


def test_verify_where_the_source_moved(call):
    arguments = ("--verify", "out", "moved", "--base", "b", "--threads", "2")
    _, out, _, given = call(*arguments, "--format", "json")
    assert (given["source"], given["base"], given["threads"]) == ("moved", "b", 2)
    assert json.loads(out)["schema"] == "spectra.verification/1"
    _, out, _, _ = call(*arguments, "--format", "csv")
    assert [row["holds"] for row in csv.DictReader(io.StringIO(out))] == ["True", "True"]
    assert "a " not in call(*arguments)[1].partition("\n\n")[2]
    assert "holds" in call(*arguments, "--verbose")[1]


def test_errors_are_one_line(capsys, monkeypatch):
    def refuses(*_, **__):
        raise UsageError("out: exists")

    monkeypatch.setattr(mitigating, "mitigate", refuses)
    assert main(["mitigate", *WHAT, "-o", "out"]) == 2
    assert capsys.readouterr().err == "spectra: error: out: exists\n"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mitigating, "mitigate", interrupted)
    assert main(["mitigate", *WHAT, "-o", "out"]) == 130


def test_help_and_bad_usage_load_nothing_heavy():
    for arguments, code in ((["--help"], 0), (["tuned"], 2)):
        script = (
            "import sys\nfrom spectra.cli import main\n"
            f"try: code = main(['mitigate', *{arguments!r}])\n"
            "except SystemExit as exit: code = exit.code\n"
            f"assert code == {code}, code\n"
            "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_is_ascii(capsys):
    with pytest.raises(SystemExit):
        main(["mitigate", "--help"])
    assert capsys.readouterr().out.isascii()
