"""Replicated layers against peft's own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft.replication import copies
from spectra.errors import AdapterError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from tests.support.peft_methods import all_accounted_for
from tests.support.peft_models import llama, randomise
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's remarks on what is asked of it


@each_seed(range(20))
def test_replicated_layers_equal_the_merge(tmp_path, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    ranges = [sorted(int(x) for x in rng.choice(4, size=2, replace=False)) for _ in range(int(rng.integers(2, 4)))]
    targets = ["q_proj", "down_proj"] + ["embed_tokens"] * (seed % 2)
    pattern = {"layers.1.self_attn.q_proj": 5} if seed % 3 else {}
    config = peft.LoraConfig(r=3, target_modules=targets, layer_replication=ranges, rank_pattern=pattern)
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    pairs = pair_layers(base, tuned, plan_updates(tuned)).pairs
    layers = [layer for start, end in ranges for layer in range(start, end)]
    assert len(pairs) == 2 * len(layers) + seed % 2
    # Peft's merge would add all copies' updates to the one weight that they share.
    modules = dict(model.double().base_model.model.named_modules())
    for pair in pairs:
        lora = modules[pair.name]
        expected = lora.base_layer.weight.detach() + lora.get_delta_weight("default")
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        assert torch.linalg.norm(W1 - as_matrix(expected, pair.layout)) <= 1e-6 * torch.linalg.norm(W1)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=3)
    assert len({layer.name for layer in report.layers}) == len(pairs)
    for layer in report.layers:
        if ".layers." in layer.name:
            index = int(layer.name.split(".")[2])
            note = f"layer {index} of the model is layer {layers[index]} of the base"
            assert any(note in one for one in layer.notes)
    with pytest.raises(UsageError, match="layer_replication"):
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=0.5, merged=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[0, 1]], "too few"), ([[1, 0]], "expected"), ([0, 1], "expected"), ("all", "expected"),
        ([[0, 10**9]], "expected"), ([[False, True]], "expected"),
    ],
)  # fmt: skip
def test_ranges_that_are_none(make_adapter, rng, given, words):
    factors = {"model.layers.1.q": (rng.normal(size=(4, 2)), rng.normal(size=(2, 4)))}
    with pytest.raises(AdapterError, match=f"layer_replication.*{words}"):
        plan_updates(open_checkpoint(make_adapter(factors, layer_replication=given)))


def test_replicated_layers_are_repaired_and_compared_each_by_itself(tmp_path):
    torch.manual_seed(0)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        net, peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    )
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", scale=0.5)
    assert spectra.verify(tmp_path / "out").holds
    with pytest.raises(UsageError, match="layer_replication"):
        spectra.compare([tmp_path / "adapter"], tmp_path / "base", merge=[[(0.5, tmp_path / "adapter")]], quick=True)
    found = spectra.compare([tmp_path / "adapter", tmp_path / "out"], tmp_path / "base", quick=True)
    assert [row["layers_analysed"] for row in found.rows()] == [4, 4]
    assert all(overlap["a"] != overlap["b"] for overlap in found.overlaps)


def test_the_names_of_replicated_layers_are_kept_apart():
    assert copies(["layers.1.up", "layers.0.up", "head"], ((1, 3), (1, 2))) == {"layers.0.up", "layers.2.up"}
    assert copies(["layers.1.up"], ()) == set()
