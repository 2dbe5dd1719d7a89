"""Adapters extracted from full fine-tunes, against peft itself."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft.writing import adapter_config, factor_tensors, tied_head, whole_modules, write_adapter
from spectra.analysis.measures import update_singular_values
from spectra.analysis.ranks import layer_rank, suggest
from spectra.analysis.truncation import low_rank_factors
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.updates.algebra import Dense
from tests.support.paths import FIXTURES
from tests.support.peft_models import classifier

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def extracted(base, tuned, out, *, energy=0.9, whole=True, full_rank=False, task_type=None, **options):
    """What a command does with the parts: ranks, suggestion, factors, folder.  Returns (suggestion, dW by module)."""
    base, tuned = open_checkpoint(base, as_base=True), open_checkpoint(tuned)
    pairing = pair_layers(base, tuned, plan_updates(tuned))
    weights, layers, changes = {}, [], {}
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float32, "cpu")
        weights[pair.name] = pair.read_update(tuned, torch.float32, "cpu").tuned(W0)
        changes[pair.name] = weights[pair.name].block(slice(None), slice(None)) - W0.double()
        made = layer_rank(
            update_singular_values(weights[pair.name]), pair.shape, name=pair.name, role=pair.role,
            kind=pair.update.kind, trained_rank=None, parameters=pair.update.parameters, base_norm_fro=float(W0.norm()),
        )  # fmt: skip
        layers.append(made)
    found = suggest(layers, energy=energy, other_modules=[item.name for item in pairing.skipped], **options)
    assert found is not None
    config = found.peft_config()
    choices = {choice.name: (choice.rank, choice.scaling) for choice in found.choices}
    if full_rank:  # beyond break-even, where no suggestion goes
        choices = {name: (min(changes[name].shape), 1.0) for name in choices}
        ranks = {f"^{name}": rank for name, (rank, _) in choices.items()}
        config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    tensors, errors = dict[str, torch.Tensor](), {}
    for name, (rank, scaling) in choices.items():
        factors = low_rank_factors(weights[name], rank, scaling)
        errors[name] = factors.relative_error
        tensors |= factor_tensors(name, factors.B, factors.A)
    along = None
    if whole:
        differ = [
            name for name in tuned.tensors
            if name.removesuffix(".weight") not in choices
            and (name not in base.tensors or not torch.equal(tuned.read(name).float(), base.read(name).float()))
        ]  # fmt: skip
        along = whole_modules(differ, tuned.tensors, choices, tied_head(tuned.config, tuned.tensors))
        assert not along.refused
        tensors |= {key: tuned.read(name) for key, name in along.keys.items()}
    conv1d = any(pair.layout == "conv1d" for pair in pairing.pairs)
    config = adapter_config(config, base=str(base.path), task_type=task_type, whole=along, fan_in_fan_out=conv1d)
    write_adapter(out, config=config, tensors=tensors.items())
    return found, changes, errors


def loaded(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("options", [{}, {"by": "type", "max_rank": 16, "use_rslora": True, "alpha": "2r"}])
def test_the_adapter_of_the_full_fine_tune_is_its_truncated_change(tmp_path, options):
    found, changes, errors = extracted(FIXTURES / "base", FIXTURES / "full", tmp_path / "out", **options)
    before = {name: value.double().clone() for name, value in classifier(FIXTURES / "base").state_dict().items()}
    model = loaded(classifier(FIXTURES / "base").double(), tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    written_by_peft = load_file(tmp_path / "again" / "adapter_model.safetensors")
    written_by_us = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in written_by_us.items()} == {
        name: value.shape for name, value in written_by_peft.items()
    }
    merged = model.merge_and_unload().state_dict()
    assert len(found.choices) == 28
    for choice in found.choices:
        dW = changes[choice.name].numpy()
        U, s, Vh = np.linalg.svd(dW, full_matrices=False)
        best = (U[:, : choice.rank] * s[: choice.rank]) @ Vh[: choice.rank]
        written = (merged[f"{choice.name}.weight"] - before[f"{choice.name}.weight"]).numpy()
        assert np.linalg.norm(written - best) <= 1e-5 * np.linalg.norm(best)
        error = np.linalg.norm(dW - best) / np.linalg.norm(dW)
        assert errors[choice.name] == pytest.approx(error, abs=1e-6)
        assert choice.relative_error == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_at_full_rank_with_all_that_goes_along_it_is_the_full_fine_tune(tmp_path, task_type):
    extracted(FIXTURES / "base", FIXTURES / "full", tmp_path / "out", full_rank=True, task_type=task_type)
    torch.manual_seed(0)
    tokens = torch.randint(4, 3000, (6, 40))
    adapted, full = loaded(classifier(FIXTURES / "base"), tmp_path / "out"), classifier(FIXTURES / "full")
    with torch.no_grad():
        expected = full.eval()(input_ids=tokens).logits
        got = adapted.eval()(input_ids=tokens).logits
        alone = classifier(FIXTURES / "base").eval()(input_ids=tokens).logits
    assert (got - expected).abs().max() <= 1e-4
    assert (alone - expected).abs().max() > 0.1
    # Without what goes along, it is another model.
    shutil.rmtree(tmp_path / "out")
    extracted(FIXTURES / "base", FIXTURES / "full", tmp_path / "out", full_rank=True, whole=False)
    with torch.no_grad():
        less = loaded(classifier(FIXTURES / "base"), tmp_path / "out").eval()(input_ids=tokens).logits
    assert (less - expected).abs().max() > 0.1


def test_we_read_what_we_wrote(tmp_path):
    found, changes, _ = extracted(FIXTURES / "base", FIXTURES / "full", tmp_path / "out", energy=0.5)
    base, adapter = open_checkpoint(FIXTURES / "base", as_base=True), open_checkpoint(tmp_path / "out")
    pairs = {pair.name: pair for pair in pair_layers(base, adapter, plan_updates(adapter)).pairs}
    for choice in found.choices:
        pair = pairs[choice.name]
        assert pair.update.rank == choice.rank
        W0 = pair.read_base(base, torch.float64, "cpu")
        delta = pair.read_update(adapter, torch.float64, "cpu").tuned(W0).delta()
        lost = float((changes[choice.name] - delta).norm() / changes[choice.name].norm())
        assert lost == pytest.approx(choice.relative_error, abs=1e-5)


def perturbed(model, scale=0.02):
    """A full fine-tune of everything: weights, biases, norms, embeddings."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_biases_and_transposed_weights_go_along(tmp_path, kind):
    """With every bias trained, and with GPT-2's (in, out) weights, square ones among them."""
    torch.manual_seed(1)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        )
        cls, task = transformers.BertForSequenceClassification, "SEQ_CLS"
    else:
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2)
        cls, task = transformers.GPT2LMHeadModel, "CAUSAL_LM"
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "base")
    perturbed(model).save_pretrained(tmp_path / "full")
    tokens = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    found, _, _ = extracted(tmp_path / "base", tmp_path / "full", tmp_path / "out", full_rank=True, task_type=task)
    assert len(found.choices) == {"bert": 2 * 6 + 1, "gpt2": 2 * 4}[kind]
    adapted = loaded(cls.from_pretrained(tmp_path / "base").eval(), tmp_path / "out")
    with torch.no_grad():
        got = adapted(input_ids=tokens).logits
    assert (got - expected).abs().max() <= 1e-5
    if kind == "gpt2":
        tied = {"lm_head": "transformer.wte.weight"}
        names = open_checkpoint(tmp_path / "full").tensors
        assert tied_head(json.loads((tmp_path / "full" / "config.json").read_text()), names) == tied
        assert not tied_head({"architectures": ["GPT2Model"]}, names)
        assert not tied_head({"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}, names)
        assert not tied_head({"architectures": ["GPT2LMHeadModel"]}, [*names, "lm_head.weight"])


def test_an_embedding_as_factors(tmp_path, rng):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).double()
    W0 = as_matrix(model.model.embed_tokens.weight.detach().clone(), "embedding")
    dW = torch.from_numpy(rng.normal(size=(12, 3)) @ rng.normal(size=(3, 40)))
    factors = low_rank_factors(Dense(W0 + dW).tuned(W0), 3, 2.0)
    fragment = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens"]}
    tensors = factor_tensors("model.embed_tokens", factors.B, factors.A, embedding=True)
    write_adapter(tmp_path / "out", config=adapter_config(fragment, base=None), tensors=tensors.items())
    merged = loaded(model, tmp_path / "out").merge_and_unload().model.embed_tokens.weight.detach()
    assert float((merged.T - W0 - dW).norm()) <= 1e-6 * float(dW.norm())


@pytest.fixture(scope="module")
def changes():
    """W1 − W0 of every layer of the full fine-tune, in float64."""
    base, tuned = (load_file(FIXTURES / name / "model.safetensors") for name in ("base", "full"))
    return {name: tuned[name].double() - base[name].double() for name in base}


@pytest.mark.parametrize(
    "options", [{}, {"by": "type", "energy": 0.5}, {"by": "model", "use_rslora": True, "max_rank": 8}]
)
def test_an_extracted_adapter_is_the_truncation_that_it_says(tmp_path, changes, options):
    made = spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", **options)
    assert made.report.suggestion is not None
    assert not made.left_out
    model = peft.PeftModel.from_pretrained(classifier(FIXTURES / "base"), tmp_path / "out")
    merged = model.double().merge_and_unload().state_dict()
    base = classifier(FIXTURES / "base").state_dict()
    for choice in made.report.suggestion.choices:
        name = f"{choice.name}.weight"
        dW = changes[name]
        learnt = merged[name] - base[name].double()
        error = float(torch.linalg.norm(dW - learnt) / torch.linalg.norm(dW))
        s = torch.linalg.svdvals(dW)
        best = float(s[choice.rank :].norm() / s.norm())
        assert error == pytest.approx(best, abs=1e-5)
        assert made.relative_errors[choice.name] == pytest.approx(best, abs=1e-5)
        assert choice.relative_error == pytest.approx(best, abs=1e-5)
        assert int(torch.linalg.matrix_rank(learnt, rtol=1e-5)) <= choice.rank
    # What factors do not carry is there whole, the new head included.
    tuned = load_file(FIXTURES / "full" / "model.safetensors")
    for name in ("model.norm.weight", "score.weight", "model.embed_tokens.weight"):
        assert torch.equal(merged[name].float(), tuned[name].float()), name


def test_an_extracted_adapter_is_audited_as_what_it_is(tmp_path):
    spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", energy=0.999)
    full = spectra.audit(FIXTURES / "full", FIXTURES / "base", exclude=["embed"])
    again = spectra.audit(tmp_path / "out")
    assert not again.failed
    assert {layer.name for layer in again.layers} >= {layer.name for layer in full.layers}
    counts = {layer.name: layer.intruders for layer in again.layers}
    # What the break-even rank cuts off may move a vector across epsilon.
    assert max(abs(counts[layer.name] - layer.intruders) for layer in full.layers) <= 1
    assert abs(again.total("paper") - full.total("paper")) <= 2


def test_factors_alone(tmp_path):
    made = spectra.extract(FIXTURES / "full", FIXTURES / "base", to=tmp_path / "out", whole=False)
    assert made.whole == ()
    assert {"model.norm.weight", "score.weight"} <= made.left_out.keys()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert all(".lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
