"""The trained family and a published model, against the definition in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers
from tests.support import reference
from tests.support.paths import FIXTURES, MEMBERS
from tests.support.published import MINILM, article_batches, published


def check_against_the_definition(tuned_path, base_path, side="left", include=()):
    """Counts at three thresholds and every cosine of every layer equal the float64 twin's."""
    reports = {
        epsilon: spectra.audit(tuned_path, base_path, epsilon=epsilon, side=side, include=include)
        for epsilon in (0.3, 0.5, 0.7)
    }
    base, tuned = open_checkpoint(base_path), open_checkpoint(tuned_path)
    pairing = pair_layers(base, tuned, plan_updates(tuned), include=include)
    assert not reports[0.5].failed
    for position, pair in enumerate(pairing.pairs):
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        layers = {epsilon: report.layers[position] for epsilon, report in reports.items()}
        assert layers[0.5].name == pair.name
        if torch.equal(W0, W1):
            assert layers[0.5].status == "unchanged"
            continue
        values = reference.max_cosines(W0.numpy(), W1.numpy(), 10, side)
        for epsilon, layer in layers.items():
            expected = [i for i, value in enumerate(values) if value is not None and value < epsilon]
            assert list(layer.intruder_indices) == expected, f"{pair.name} at {epsilon}"
            for vector, value in zip(layer.vectors, values, strict=True):
                assert value is not None
                assert vector.max_cosine is not None
                lower, upper = vector.max_cosine_bounds
                assert lower <= value <= upper
                assert abs(vector.max_cosine - value) <= max(1e-4, upper - lower)
    return reports


@pytest.mark.parametrize(
    ("member", "side"), [*((member, "left") for member in MEMBERS), ("lora-r4", "right"), ("full", "right")]
)
def test_member_of_the_family(member, side):
    check_against_the_definition(FIXTURES / member, FIXTURES / "base", side)


def test_the_family_is_what_it_says():
    record = json.loads((FIXTURES / "family.json").read_text())
    folders = {str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.rglob("*.safetensors")}
    assert set(record) == folders
    assert set(MEMBERS) < folders
    assert record["base"].keys() == {"pretraining_loss"}
    members = [entry for name, entry in record.items() if name != "base" and not name.startswith("run-r4")]
    accuracies = [entry["test_accuracy"] for entry in members]
    assert min(accuracies) > 0.9
    assert max(accuracies) - min(accuracies) < 0.03, "comparable accuracy"
    assert all(entry["pretraining_loss"] > record["base"]["pretraining_loss"] for entry in members)
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    assert size < 32e6


def test_lora_plants_intruders_and_full_fine_tuning_hardly_any():
    totals = {r.tuned["path"]: r for r in spectra.audit_many([FIXTURES / m for m in MEMBERS], FIXTURES / "base")}
    counts = {Path(path).name: report.total() for path, report in totals.items()}
    assert counts["full"] * 3 < min(count for name, count in counts.items() if name != "full")


def test_auditing_together_is_auditing_one_by_one():
    together = spectra.audit_many([FIXTURES / "lora-r1", FIXTURES / "full"], FIXTURES / "base", threads=1)
    for report, member in zip(together, ("lora-r1", "full"), strict=True):
        alone = spectra.audit(FIXTURES / member, FIXTURES / "base", threads=1)
        assert report.to_json(canonical=True) == alone.to_json(canonical=True)


def test_same_bytes_whatever_the_number_of_workers():
    reports = [spectra.audit(FIXTURES / "dora-r16", workers=workers, threads=1) for workers in (1, 2, 3)]
    assert len({report.to_json(canonical=True) for report in reports}) == 1


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 as published, a LoRA and a full fine-tune of it on real articles."""
    assert MINILM is not None
    assert MINILM.submodule_search_locations
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = Path(MINILM.submodule_search_locations[0]) / "model"
    folder = tmp_path_factory.mktemp("minilm")
    batches = list(article_batches(transformers.AutoTokenizer.from_pretrained(base), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rate in (("lora", 1e-3), ("full", 5e-5)):
            torch.manual_seed(0)
            model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=5)
            if name == "lora":
                targets = ["query", "value", "dense"]
                config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
                model = peft.get_peft_model(model, config)
            train(model, batches, rate)
            model.save_pretrained(folder / name)
            if name == "lora":
                merged = model.double().merge_and_unload().state_dict()
    return base, folder, merged


def train(model, batches, rate):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@published
def test_lora_of_a_published_model(minilm):
    base, folder, merged = minilm
    reports = check_against_the_definition(folder / "lora", base)
    report = reports[0.5]
    assert report.summary["layers_analysed"] == 6 * 5 + 1
    assert {layer.name for layer in report.layers if layer.noise_like_base} == {"bert.pooler.dense"}
    opened, tuned = open_checkpoint(base), open_checkpoint(folder / "lora")
    for pair in pair_layers(opened, tuned, plan_updates(tuned)).pairs:
        W0 = pair.read_base(opened, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        expected = merged[f"{pair.name}.weight"]
        assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected)


@published
def test_full_fine_tune_of_a_published_model(minilm):
    base, folder, _ = minilm
    # For time: every kind of weight, but the words (two float64 decompositions of 384 × 30522), in two of six layers.
    reports = check_against_the_definition(folder / "full", base, include=["*.layer.[05].*", "pooler", "position"])
    assert reports[0.5].summary["layers_analysed"] == 2 * 6 + 2
