"""Completion: scripts that shells take, and that complete what there is to complete."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from spectra.cli import command_line, main
from spectra.cli.completion import PATHS, SHELLS, arguments_of
from tests.support.paths import ROOT

# Values that are no files and no choices.
FREE = ("N", "NAME", "SHARE", "K", "E", "R", "A", "PATTERN", "ADDRESS", "[PATTERN=]S", "PATTERN=I,J")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        made = subprocess.run(
            [sys.executable, "-m", "spectra", "completion", shell], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert made.stderr == ""
        (folder / shell).write_text(made.stdout)
    return folder


def completed(scripts, folder, *words):
    """What bash offers for the last of these words, as a person who presses the tab key would see it."""
    script = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "how=$(complete -p spectra); function=${how##*-F }; ${function% spectra}\n"
        '[ ${#COMPREPLY[@]} -eq 0 ] || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", script, "bash", str(scripts / "bash"), "spectra", *words]
    made = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert made.stderr.replace("bash: line 1: compopt: not currently executing completion function\n", "") == ""
    return set(made.stdout.splitlines())


def test_every_argument_is_known():
    """A new one is either a path, or it is not; then it goes into one list or the other."""
    for action in arguments_of(command_line()):
        if action.nargs != 0 and not action.choices and action.dest != "device":
            assert action.metavar in (*PATHS, *FREE), action.dest


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_it(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    made = subprocess.run([shell, "-n", str(scripts / shell)], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_it_knows_every_command_and_option(scripts, shell):
    text = (scripts / shell).read_text()
    assert text.endswith("\n")
    for action in arguments_of(command_line()):
        for option in action.option_strings:
            assert option.lstrip("-") in text, option
        if action.nargs != 0:
            for choice in action.choices or ():
                assert choice in text, choice
    for command in (
        "audit",
        "compare",
        "plot",
        "ranks",
        "extract",
        "repair",
        "verify",
        "cache",
        "inspect",
        "completion",
    ):
        assert command in text


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["au"], {"audit"}),
        (["c"], {"compare", "cache", "completion"}),
        (["audit", "--mod"], {"--model-card"}),
        (["audit", "adapter", "--format", ""], {"table", "json", "jsonl", "csv", "parquet", "sarif"}),
        (["audit", "adapter", "--side", "r"], {"right"}),
        (["compare", "--engine", "k"], {"krylov"}),
        (["completion", ""], set(SHELLS)),
        (["audit", "adap"], {"adapter", "adapter two"}),
        (["audit", "adapter", "--base", "adapter/s"], {"adapter/sub"}),
        (["audit", "adapter", "-o", "rep"], {"report.json"}),
        (["audit", "adapter", "--baseline", "rep"], {"report.json"}),
        (["audit", "--model-card", "READ"], {"README.md"}),
        (["plot", "sim"], {"similarity"}),
        (["plot", "similarity", "adapter/"], {"adapter/sub"}),
        (["repair", "adapter", "--to", "adapter/"], {"adapter/sub"}),
        (["cache", "--cache", "adapter/"], {"adapter/sub"}),
    ],
)
def test_bash_completes(scripts, tmp_path, words, offered):
    for folder in ("adapter/sub", "adapter two"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("report.json", "README.md"):
        (tmp_path / file).touch()
    assert completed(scripts, tmp_path, *words) == offered


def test_options_are_offered_for_a_dash_alone(scripts, tmp_path):
    offered = completed(scripts, tmp_path, "ranks", "-")
    assert {"--energy", "--alpha", "--base"} <= offered
    assert "--html" not in offered


def test_without_shtab_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "spectra: error: completion needs shtab: in the folder of Spectra, pip install '.[completion]'\n"
    )


def test_help_loads_none_of_it():
    code = (
        "import sys; from spectra.cli import COMMANDS, command_line; command_line().format_help()\n"
        "assert not {'shtab', 'pandas', 'pyarrow', 'torch', 'importlib.metadata'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
