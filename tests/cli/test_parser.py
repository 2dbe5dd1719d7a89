"""What the command line says of words that it does not know: two lines, with the nearest that it does."""

from __future__ import annotations

from typing import Any

import pytest

from spectra.cli import COMMANDS, command_line, main


@pytest.mark.parametrize(
    ("arguments", "message", "advice"),
    [
        (["audti", "x"], "invalid choice: 'audti'", "did you mean audit? `spectra --help`"),
        (
            ["audit", "x", "--epsilom", "3"],
            "unrecognized arguments: --epsilom 3",
            "did you mean --epsilon? `spectra audit",
        ),
        (["audit", "x", "--epsilom=3"], "unrecognized arguments: --epsilom=3", "did you mean --epsilon?"),
        (["audit", "x", "--side", "lefft"], "invalid choice: 'lefft'", "did you mean left? `spectra audit --help`"),
        (["audit", "x", "--zzzz"], "unrecognized arguments: --zzzz", "`spectra audit --help` tells more"),
        (["ranks"], "the following arguments are required: TUNED", "`spectra ranks --help` tells more"),
        (["plot", "simlarity", "x"], "invalid choice: 'simlarity'", "did you mean similarity?"),
        (["audit", "x", "--eps", "0.3"], "unrecognized arguments: --eps 0.3", "`spectra audit --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_two_lines(capsys, arguments, message, advice):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith("spectra: error: ")
    assert message in first
    assert advice in second


def test_without_a_word_it_shows_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: spectra COMMAND ...")
    assert err == ""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_help_begins_with_its_main_use(capsys, command):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit):
        main([name, "--help"])
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith(f"usage: spectra {name} ")
    assert usage.endswith("[options]")


def test_one_word_for_what_is_named():
    """TUNED, BASE, OUT and FILE: no command calls them otherwise."""
    parser: Any = command_line()
    (commands,) = (action for action in parser._actions if action.choices and "audit" in action.choices)
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.dest in ("tuned", "source"):
                assert action.metavar == "TUNED", name
            if action.dest == "to":
                assert action.metavar == "OUT", name
            if action.dest == "output":
                assert (action.metavar, action.option_strings) == ("FILE", ["-o", "--output"]), name
