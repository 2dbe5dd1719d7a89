"""Fixtures of repairs: the fine-tune without its head."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.support.paths import FIXTURES


@pytest.fixture
def headless(tmp_path):
    """The fixture lora-r4 without its classifier, for which the base has no place."""
    folder = tmp_path / "headless"
    shutil.copytree(FIXTURES / "lora-r4", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: value for name, value in tensors.items() if "lora" in name}, folder / "adapter_model.safetensors")
    return folder
