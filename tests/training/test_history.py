"""The history of a training in its file: gone on with, and appended to no other."""

from __future__ import annotations

import pytest
import torch

from spectra.errors import UsageError
from spectra.training import Monitor, load_history


def test_a_killed_training_goes_on_in_its_history(tmp_path):
    """A line that was cut is cut off, and what an earlier attempt found beyond where it went on is left out."""
    file = tmp_path / "history.jsonl"
    for steps in ((1, 2, 3), (2, 3, 4)):
        model = torch.nn.Linear(24, 16)
        watch = Monitor(model, every=1, max_share=None, history_file=file)
        for step in steps:
            model.weight.data += 0.1
            watch.step(step)
        file.write_bytes(file.read_bytes()[:-20])
    assert [record.step for record in load_history(file)] == [1, 2, 3]


def test_a_history_is_appended_to_no_other_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("my data")
    with pytest.raises(UsageError, match="no history of a training"):
        Monitor(torch.nn.Linear(8, 8), history_file=file)
    assert file.read_text() == "my data"
