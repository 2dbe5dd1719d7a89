"""GGUF files that are broken or made to harm: one line, at once, in little memory."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from spectra.adapters import plan_updates
from spectra.errors import SpectraError
from spectra.files.checkpoint import open_checkpoint
from tests.support import hostile
from tests.support.gguf_files import LORA
from tests.support.hostile_gguf import CASES, a_file


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return hostile.outcomes_of("hostile_gguf", tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file(outcomes, name):
    found = outcomes[name]
    assert found["code"] == 2, found["err"]
    assert found["err"].startswith("spectra: error: ")
    assert found["err"][:-1].isprintable()
    for word in CASES[name].words:
        assert word in found["err"]
    assert found["seconds"] <= hostile.SECONDS
    assert found["mib"] <= hostile.MIB
    assert found["events"] == []
    assert found["changed"] == []


def test_the_builders_own_file_is_read(tmp_path):
    (tmp_path / LORA).write_bytes(a_file())
    theirs = gguf.GGUFReader(tmp_path / LORA)
    assert [item.name for item in theirs.tensors] == list(open_checkpoint(tmp_path).tensors)
    assert len(plan_updates(open_checkpoint(tmp_path)).updates) == 1


def test_any_bytes_after_the_magic(tmp_path):
    rng = np.random.default_rng(0)
    good, place = a_file(), tmp_path / LORA
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            content[int(rng.integers(4, len(content)))] = int(rng.integers(256))
        place.write_bytes(
            bytes(content[: int(rng.integers(20, len(content) + 1))]) if rng.integers(3) == 0 else content
        )
        said = str(place)
        try:
            plan_updates(open_checkpoint(place))
        except SpectraError as error:
            said = str(error)
        assert said.startswith(str(place))
