"""Messages: one line each."""

from __future__ import annotations

from spectra.cli.options import complain
from spectra.errors import in_one_line


def test_messages_are_one_line_each(capsys):
    assert in_one_line("plain: café ΔW 'x'") == "plain: café ΔW 'x'"
    assert in_one_line("a\nb\x1b\u202e\udcff") == "a\\nb\\x1b\\u202e\\udcff"
    long = in_one_line("s" * 5000 + "end", 300)
    assert len(long) < 310
    assert long.endswith("end")
    complain("a\nb")
    assert capsys.readouterr().err == "spectra: error: a\\nb\n"
