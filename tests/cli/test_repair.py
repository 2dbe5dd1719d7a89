"""``spectra repair`` as people call it: what reaches the functions behind it, and what comes back."""

from __future__ import annotations

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
from spectra.repairs import repair as repairing
from tests.support.paths import ROOT
from tests.support.repairs import audit, record

WHAT = ("tuned", "--scale", "0.7")


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls the command with the functions behind it replaced; (exit code, out, err, what they were given)."""

    def call(*arguments, made=None):
        given: dict[str, Any] = {}

        def repair(tuned, base=None, **options):
            given.update(options, tuned=tuned, base=base)
            return made or record(output=record().output if options["to"] else None)

        monkeypatch.setattr(repairing, "repair", repair)
        code = main(["repair", *map(str, arguments)])
        return code, *capsys.readouterr(), given

    return call


def test_the_options_are_the_functions_own():
    makes = inspect.signature(repairing.repair).parameters
    assert set(makes) == {"tuned", "base", "scale", "to", "which", "progress", *command.PASSED}


def test_what_is_passed_on(call):
    code, out, err, given = call(*WHAT, "--base", "b", "--to", "out")
    assert (code, err) == (0, "spectra: wrote out (peft-lora)\n")
    assert out.startswith("Repaired: ")
    progress = given.pop("progress")
    assert progress is None
    defaults = {"store_dtype": None, "keep_rank": False, "merged": False, "force": False, "device": "cpu"}
    defaults |= {"allow_pickle": False, "local_files_only": False, "method": "intruders", "dtype": "float32"}
    defaults |= {
        "noise_like": False,
        "threads": None,
        "split_fused": False,
        "initial_adapter": None,
        "hash_contents": False,
    }
    assert given == {
        "tuned": "tuned", "to": "out", "base": "b", "scale": 0.7, "which": "all", "top_k": 10, "epsilon": 0.5,
        "side": "left", "include": [], "exclude": [], "ignore_options": [], "engine": "auto", "workers": 1,
        "cache": None, **defaults,
    }  # fmt: skip
    _, _, err, given = call(
        *WHAT, "--to", "out", "--force", "--which", "top", "--keep-rank", "--store-dtype", "bfloat16", "-k", "5", "-e",
        "0.4", "--side", "right", "--include", "a", "--exclude", "b", "--engine", "exact", "--device", "cuda",
        "--workers", "3", "--threads", "2", "--no-cache", "--quiet",
    )  # fmt: skip
    assert err == ""
    assert (given["which"], given["store_dtype"]) == ("top", "bfloat16")
    assert (given["side"], given["engine"]) == ("right", "exact")
    assert (given["top_k"], given["epsilon"], given["workers"], given["threads"]) == (5, 0.4, 3, 2)
    assert given["force"]
    assert given["keep_rank"]
    assert given["cache"] is False
    assert (given["include"], given["exclude"], given["device"]) == (["a"], ["b"], "cuda")
    assert call(*WHAT, "--to", "out", "--merged")[3]["merged"]
    assert call(*WHAT, "--to", "out", "--noise-like")[3]["noise_like"]


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        (["0.7"], 0.7),
        (["0"], 0.0),
        (["-0.0"], 0.0),
        (["1"], 1.0),
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
    code, out, err, given = call(*WHAT, "--dry-run", "--to", "out")
    assert (code, err, given["to"]) == (0, "", None)
    assert out.startswith("Dry run: ")


def test_formats(call):
    _, out, _, _ = call(*WHAT, "--to", "out", "--format", "json")
    assert json.loads(out)["schema"] == "spectra.repair/1"
    _, out, err, _ = call(*WHAT, "--to", "out", "--format", "csv", "--quiet")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 3
    assert err.splitlines() == [
        "spectra: note: the adapter's own evaluation results are those of the source",
        "spectra: left behind: optimizer.pt: weights in another format",
        "spectra: left behind: runs: a folder",
    ]
    short, long = (call(*WHAT, "--to", "out", *more, made=many())[1] for more in ((), ("--verbose",)))
    assert len(short) < len(long)


def many():
    layers = [replace(record().layers[1], name=f"model.layers.{number}.q_proj") for number in range(50)]
    return record(layers)


def test_ascii_where_the_terminal_knows_no_more(call, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    call(*WHAT, "--to", "out", "--verbose")
    text = raw.getvalue().decode("ascii")
    assert "?" not in text
    assert "0 -> 2" in text


def test_layers_that_could_not_be_analysed(call):
    bad = replace(audit().layers[0], status="non_finite", error="NaN in W1")
    code, out, err, _ = call(*WHAT, "--to", "out", made=record(audit=replace(audit(), layers=(bad,))))
    assert code == 2
    assert out.startswith("Repaired: ")
    assert "spectra: error: model.layers.0.self_attn.q_proj: non_finite: NaN in W1" in err
    assert call(*WHAT, "--dry-run", made=record(output=None, audit=None))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tuned", "--to", "out"], "--scale is missing"),
        (["tuned", "--scale", "0.7"], "--to OUT is missing"),
        (["tuned", "--scale", "x", "--dry-run"], "--scale x: 'x' is no number"),
        (["tuned", "--scale", "", "--dry-run"], "'' is no number"),
        (["tuned", "--scale=-1", "--dry-run"], "expected a number from 0 (removed) to 1 (no change)"),
        (["tuned", "--scale", "1.5", "--dry-run"], "expected a number from 0 (removed) to 1 (no change)"),
        (["tuned", "--scale", "nan", "--dry-run"], "expected a number from 0"),
        (["tuned", "--scale", "q=inf", "--dry-run"], "--scale q=inf: expected a number from 0"),
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
        ([*WHAT, "--to", "out", "--merged", "--keep-rank"], "--keep-rank is about an adapter's rank"),
        ([*WHAT, "--to", "out", "--merged", "--store-dtype", "float16"], "--store-dtype is about an adapter's factors"),
    ],
)
def test_bad_usage(call, arguments, message):
    code, out, err, given = call(*arguments)
    assert (code, out, given) == (2, "", {})
    assert message in err
    assert err.startswith("spectra: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "option", [["--scale"], ["--which", "some"], ["--store-dtype", "int8"], ["--cache", "d", "--no-cache"]]
)
def test_options_that_do_not_exist(call, option):
    with pytest.raises(SystemExit) as caught:
        call(*WHAT, "--to", "out", *option)
    assert caught.value.code == 2


def test_a_dry_run_needs_no_strength(call):
    code, _, err, given = call("tuned", "--dry-run")
    assert (code, given["scale"], given["to"]) == (0, 0.0, None)
    assert err == "spectra: note: without --scale this shows what 0, their removal, would do\n"
    assert call("tuned", "--dry-run", "--quiet")[2] == ""


def test_errors_are_one_line(capsys, monkeypatch):
    def refuses(*_, **__):
        raise UsageError("out: exists")

    monkeypatch.setattr(repairing, "repair", refuses)
    assert main(["repair", *WHAT, "--to", "out"]) == 2
    assert capsys.readouterr().err == "spectra: error: out: exists\n"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(repairing, "repair", interrupted)
    assert main(["repair", *WHAT, "--to", "out"]) == 130


def test_help_and_bad_usage_load_nothing_heavy():
    for arguments, code in ((["--help"], 0), (["tuned"], 2)):
        script = (
            "import sys\nfrom spectra.cli import main\n"
            f"try: code = main(['repair', *{arguments!r}])\n"
            "except SystemExit as exit: code = exit.code\n"
            f"assert code == {code}, code\n"
            "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_is_ascii(capsys):
    with pytest.raises(SystemExit):
        main(["repair", "--help"])
    assert capsys.readouterr().out.isascii()
