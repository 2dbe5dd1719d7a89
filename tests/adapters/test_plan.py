"""Which dialect reads what."""

from __future__ import annotations

import pytest

from spectra.adapters import DIALECTS
from spectra.files.checkpoint import open_checkpoint
from tests.support.paths import FIXTURES, MEMBERS


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_checkpoint_has_exactly_one_first_dialect(dialect):
    for member in (*MEMBERS, "base"):
        checkpoint = open_checkpoint(FIXTURES / member)
        first = next(d for d in DIALECTS if d.recognises(checkpoint))
        assert first.name == ("peft" if checkpoint.adapter_config else "full")
    assert dialect.name
