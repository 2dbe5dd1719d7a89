"""VeRA whose projections were not stored, against peft's own merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectra
from spectra.errors import WrongBaseError
from tests.support.peft_methods import all_accounted_for
from tests.support.peft_models import DTYPES, check_against_merge, randomise
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's remarks on what is asked of it


class Sized(nn.Module):
    def __init__(self, rng: np.random.Generator):
        super().__init__()
        sizes = [int(x) for x in rng.integers(4, 40, size=6)]
        self.query, self.key = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[2], sizes[3])
        self.c_attn = transformers.pytorch_utils.Conv1D(sizes[4] + 40, sizes[4])
        self.huge = nn.Linear(90, 90)


@each_seed(range(20))
def test_projections_that_were_not_stored(tmp_path, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = Sized(rng).to(DTYPES[seed % 4])
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    targets = [["query", "key"], ["query", "c_attn"], ["huge", "key"], ["c_attn"]][seed % 3]
    config = peft.VeraConfig(
        r=int(rng.integers(1, 20)), target_modules=targets, save_projection=False,
        projection_prng_key=int(rng.integers(1 << 40)),
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3, include=targets[:1])
    assert all("torch's generator" in " ".join(layer.notes) for layer in report.layers)
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


def test_projections_of_a_wrong_base_are_not_made(tmp_path):
    net = Sized(np.random.default_rng(0))
    model = peft.get_peft_model(net, peft.VeraConfig(r=2, target_modules=["query"], save_projection=False))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({"query.weight": torch.ones(3, 3)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(WrongBaseError, match=r"query\.vera_lambda"):
        spectra.audit(tmp_path / "adapter", tmp_path / "base")
