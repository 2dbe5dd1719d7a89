"""Low-rank factors against plain SVDs, and the folders they are written to against peft itself."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectra.adapters import plan_updates
from spectra.adapters.peft.writing import (
    adapter_config,
    check_folder,
    factor_tensors,
    tied_head,
    whole_modules,
    write_adapter,
)
from spectra.analysis import truncation
from spectra.analysis.measures import update_singular_values
from spectra.analysis.ranks import layer_rank, suggest
from spectra.analysis.truncation import low_rank_factors
from spectra.errors import ConvergenceError, NonFiniteError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.svd import decompose
from spectra.updates.algebra import Dense, LowRank, RowScaled
from tests.support.paths import FIXTURES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPES = [(40, 40), (70, 30), (30, 70), (1, 20)]


def updates(rng, m, n, dtype=torch.float32):
    """One tuned weight of each kind, with its dW in float64."""
    W0 = torch.from_numpy(rng.normal(size=(m, n))).to(dtype)
    W1 = W0 + torch.from_numpy(0.1 * rng.normal(size=(m, n)) * 0.8 ** np.arange(n)).to(dtype)
    B, A = torch.from_numpy(rng.normal(size=(m, 3))), torch.from_numpy(rng.normal(size=(3, n)))
    magnitude = torch.from_numpy(rng.uniform(1, 2, size=m))
    whole = W0.double() + 0.5 * B @ A
    dora = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    return {
        "dense": (Dense(W1).tuned(W0), W1.double() - W0.double()),
        "low rank": (LowRank(B, A, 0.5).tuned(W0), 0.5 * B @ A),
        "dora": (RowScaled(B, A, 0.5, magnitude).tuned(W0), dora - W0.double()),
    }


@pytest.mark.parametrize("gram", [False, True], ids=["svd", "gram"])
@pytest.mark.parametrize("kind", ["dense", "low rank", "dora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_the_best_of_their_rank(rng, monkeypatch, shape, kind, gram):
    if gram:
        monkeypatch.setattr(truncation, "SVD_UP_TO", 0)
    tuned, dW = updates(rng, *shape)[kind]
    s = np.linalg.svd(dW.numpy(), compute_uv=False)
    size = np.linalg.norm(s)
    for rank, scaling in [(1, 2.0), (3, 0.25), (12, 2.0), (min(shape), 1.0), (max(shape) + 5, 3.0)]:
        found = low_rank_factors(tuned, rank, scaling)
        assert found.B.shape == (shape[0], rank)
        assert found.A.shape == (rank, shape[1])
        assert found.B.dtype == found.A.dtype == torch.float32
        product = scaling * found.B.double() @ found.A.double()
        best = np.linalg.norm(s[rank:]) / size
        lost = float((dW - product).norm()) / size
        assert lost == pytest.approx(best, abs=1e-6)
        assert found.relative_error == pytest.approx(lost, abs=1e-12)
        U, sigma, Vh = np.linalg.svd(dW.numpy(), full_matrices=False)
        np.testing.assert_allclose(product, (U[:, :rank] * sigma[:rank]) @ Vh[:rank], atol=1e-6 * s[0])
        kept = min(rank, s.size)
        mine = found.singular_values  # of a low-rank update, its three
        np.testing.assert_allclose(mine, s[: mine.size], atol=1e-7 * s[0])
        alike = min(kept, 3)  # where the values are not rounding
        np.testing.assert_allclose(found.B.norm(dim=0)[:alike], found.A.norm(dim=1)[:alike], rtol=1e-4)


def test_factors_of_a_float64_weight_are_no_worse_than_float32(rng):
    tuned, dW = updates(rng, 30, 20, torch.float64)["dense"]
    found = low_rank_factors(tuned, 20, 1.0)
    assert 0 < found.relative_error < 1e-7
    assert float((dW - found.B.double() @ found.A.double()).norm() / dW.norm()) == pytest.approx(found.relative_error)


def test_a_low_rank_update_is_never_decomposed_whole(rng, monkeypatch):
    seen = []

    def watched(matrix, *args, original=torch.linalg.svd, **options):
        seen.append(tuple(matrix.shape))
        return original(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    monkeypatch.setattr(truncation, "_difference", lambda tuned: pytest.fail("dW was formed"))
    low_rank_factors(updates(rng, 70, 30)["low rank"][0], 2, 1.0)
    assert seen == [(3, 3)]


def test_the_gram_path_is_taken_beyond_its_size(rng, monkeypatch):
    tuned = updates(rng, 30, 20)["dense"][0]
    monkeypatch.setattr(truncation, "SVD_UP_TO", 19)
    monkeypatch.setattr(truncation, "decompose", lambda *_: pytest.fail("a full SVD"))
    low_rank_factors(tuned, 2, 1.0)


def test_no_change_has_zero_factors(rng):
    W0 = torch.from_numpy(rng.normal(size=(9, 6))).float()
    for tuned in (Dense(W0.clone()).tuned(W0), LowRank(torch.zeros(9, 2), torch.ones(2, 6), 1.0).tuned(W0)):
        found = low_rank_factors(tuned, 2, 2.0)
        assert not found.B.any()
        assert not found.A.any()
        assert found.relative_error == 0


def test_what_cannot_be_factored_is_an_error(rng, monkeypatch):
    W0 = torch.zeros(9, 6)
    bad = W0.clone()
    bad[2, 3] = torch.nan
    for tuned in (Dense(bad).tuned(W0), LowRank(bad, torch.ones(6, 6), 1.0).tuned(torch.zeros(9, 6))):
        with pytest.raises(NonFiniteError):
            low_rank_factors(tuned, 2, 1.0)
    good = updates(rng, 30, 20)["dense"][0]
    for rank, scaling in [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("inf")), (2, float("nan"))]:
        with pytest.raises(UsageError, match=r"expected (at least 1|a positive number)"):
            low_rank_factors(good, rank, scaling)

    def wrong(dW, side, original=decompose):
        found = original(dW, side)
        found.vectors[:, :2] = found.vectors[:, -2:]
        return found

    monkeypatch.setattr(truncation, "decompose", wrong)
    with pytest.raises(ConvergenceError, match="rank 2 should lose"):
        low_rank_factors(good, 2, 1.0)


# What goes along whole


def test_norms_heads_and_embeddings_go_along_whole():
    names = [
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.q_proj.weight", "score.weight", "score.bias",
        "model.layers.0.norm.weight", "model.layers.1.norm.weight",
    ]  # fmt: skip
    changed = ["score.weight", "model.layers.0.norm.weight", "model.embed_tokens.weight"]
    found = whole_modules(changed, names, ["model.layers.0.q_proj"])
    assert found.modules == ("score", "model.layers.0.norm", "model.embed_tokens")
    assert found.keys == {
        f"base_model.model.{name}": name
        for name in names
        if name in changed or name == "score.bias"  # a module is saved with all it has
    }
    assert not found.biases
    assert not found.refused


def test_biases_of_targets_need_no_module_of_their_own():
    found = whole_modules(["a.q.bias"], ["a.q.bias", "a.q.weight"], ["a.q"])
    assert found.keys == {"base_model.model.a.q.base_layer.bias": "a.q.bias"}
    assert found.biases
    assert found.modules == ()


def test_what_would_take_a_layer_from_its_factors_is_refused():
    names = ["scale", "a.gate", "a.q.weight", "a.q.extra", "b.norm.weight", "c.a.q.weight"]
    found = whole_modules(["scale", "a.gate", "a.q.extra", "b.norm.weight"], names, ["a.q"])
    assert set(found.refused) == {"scale", "a.gate", "a.q.extra"}
    assert found.modules == ("b.norm",)
    # peft saves every module whose name only ends alike, and adapts none whose name has it inside
    for saved, target in [("q", "layers.0.seq"), ("a", "model.a.q"), ("layers.0", "model.layers.0.q")]:
        assert whole_modules([f"{saved}.weight"], [f"{saved}.weight"], [target]).refused
        assert whole_modules([f"z{saved}.weight"], [f"z{saved}.weight"], [target]).modules == (f"z{saved}",)


# Writing


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
TENSORS = {
    "base_model.model.q.lora_A.weight": torch.ones(2, 4),
    "base_model.model.q.lora_B.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
}


def write(folder, **changes):
    return write_adapter(folder, **{"config": CONFIG, "tensors": TENSORS.items(), **changes})


def test_a_folder_is_written(tmp_path):
    home = write(
        tmp_path / "deep" / "out", remarks=["It loses 3%."], config=CONFIG | {"base_model_name_or_path": 'a"b'}
    )
    assert sorted(path.name for path in home.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(path.name for path in home.parent.iterdir()) == ["out"]
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 2
    stored = load_file(home / "adapter_model.safetensors")
    for name, value in TENSORS.items():
        torch.testing.assert_close(stored[name], torch.as_tensor(value), rtol=0, atol=0)
    card = (home / "README.md").read_text()
    assert card.startswith('---\nbase_model: "a\\"b"\nlibrary_name: peft\n')
    assert "It loses 3%." in card
    assert (open_checkpoint(home).adapter_config or {})["lora_alpha"] == 4


def test_one_value_under_two_names(tmp_path):
    value = torch.ones(2, 3)
    home = write(tmp_path / "out", tensors=[("a", value), ("b", value), ("c", value[:1])])
    assert {name: tuple(item.shape) for name, item in load_file(home / "adapter_model.safetensors").items()} == {
        "a": (2, 3),
        "b": (2, 3),
        "c": (1, 3),
    }


def test_nothing_is_overwritten(tmp_path):
    home = write(tmp_path / "out")
    before = (home / "adapter_config.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write(home, config=CONFIG | {"r": 3})
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("x")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "model", "link", "dangling"):
        for force in (False, True):
            with pytest.raises(UsageError, match="not overwritten"):
                write(tmp_path / name, force=force)
    (home / "checkpoint-100").mkdir()
    with pytest.raises(UsageError, match="holds more than an adapter"):
        check_folder(home, force=True)
    assert (home / "adapter_config.json").read_bytes() == before
    (home / "checkpoint-100").rmdir()
    write(home, config=CONFIG | {"r": 3}, force=True)
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link", "model", "out"]


def test_a_failure_leaves_nothing_behind_and_nothing_gone(tmp_path, monkeypatch):
    def interrupted():
        yield next(iter(TENSORS.items()))
        raise ConvergenceError("no")

    home = tmp_path / "out"
    with pytest.raises(ConvergenceError):
        write(home, tensors=interrupted())
    with pytest.raises(UsageError, match="'a' was given twice"):
        write(home, tensors=[("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(UsageError, match="without tensors"):
        write(home, tensors=[])
    with pytest.raises(ValueError, match="JSON compliant"):
        write(home, config=CONFIG | {"lora_alpha": float("nan")})
    assert list(tmp_path.iterdir()) == []

    write(home)
    rename = type(home).rename

    def failing(self, target):
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(home), "rename", failing)
    with pytest.raises(UsageError, match="out: could not be written: No space left"):
        write(home, config=CONFIG | {"r": 3}, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 2


# From the files of a full fine-tune to an adapter that peft loads


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


def classifier(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.LlamaForSequenceClassification.from_pretrained(folder, num_labels=5, dtype=torch.float32)


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
