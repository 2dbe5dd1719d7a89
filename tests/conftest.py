from __future__ import annotations

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # of which there is one a core; threads beyond that wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # numpy's BLAS reads it when it is loaded

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectra.files.checkpoint import open_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SPECTRA_CACHE"] = os.devnull  # what a developer has cached is none of the tests' business
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# The files that take longest, so that no process ends with one of them while the others wait.
LONGEST = (
    "test_benchmarks", "test_notebooks", "test_compare", "test_fixtures", "test_examples", "test_kinds", "test_repair",
    "test_proof", "test_browser", "test_hostile", "test_plot", "test_callback",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first; within them, and after them, the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def make_base(tmp_path):
    """Writes a base checkpoint of {name: array or tensor}; returns its folder."""

    def make(tensors, folder="base", config=None, **options):
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        save_file({name: as_tensor(value) for name, value in tensors.items()}, home / "model.safetensors", **options)
        if config is not None:
            (home / "config.json").write_text(json.dumps(config))
        return home

    return make


@pytest.fixture
def make_adapter(tmp_path):
    """Writes a PEFT LoRA folder of {module: (B, A)} plus ``extra`` tensors; returns it."""

    def make(modules, folder="adapter", extra=None, **config):
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, (B, A) in modules.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = as_tensor(A)
            tensors[f"base_model.model.{module}.lora_B.weight"] = as_tensor(B)
        tensors |= {name: as_tensor(value) for name, value in (extra or {}).items()}
        save_file(tensors, home / "adapter_model.safetensors")
        first = next(iter(modules.values()), None)
        values = {"peft_type": "LORA", "r": int(first[1].shape[0]) if first else 1, "lora_alpha": 2}
        values["base_model_name_or_path"] = "../base"
        (home / "adapter_config.json").write_text(json.dumps(values | config))
        return home

    return make


@pytest.fixture
def transformers():
    """The library, quiet."""
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture
def opened(tmp_path):
    """Writes tensors and a config; returns the checkpoint as opened."""

    def write(tensors, settings=None, folder="base", **config):
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, home / "model.safetensors")
        if settings is not None:
            config["quantization_config"] = settings
        (home / "config.json").write_text(json.dumps(config))
        return open_checkpoint(home)

    return write


@pytest.fixture
def every_factor_of_boft(monkeypatch):
    """Stands for peft's CUDA extension for BOFT; without one it takes a single factor."""
    from tests.support.peft_methods import BlockDiagonal

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)


def as_tensor(value) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return tensor.contiguous()
