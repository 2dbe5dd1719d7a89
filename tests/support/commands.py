"""Commands as people call them, in this process."""

from __future__ import annotations

from typing import Any

from spectra.cli import main


def run(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err
