"""Trainable tokens against peft's own merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError, UsageError
from spectra.files.checkpoint import open_checkpoint
from tests.support.peft_folders import same_updates, save_raw
from tests.support.peft_methods import all_accounted_for
from tests.support.peft_models import DTYPES, check_against_merge, llama, randomise, read_all
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's remarks on what is asked of it


class Worded(nn.Module):
    """An embedding and a head, neither tied to the other."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        vocabulary, d = (int(x) for x in rng.integers(16, 50, size=2))
        self.words = nn.Embedding(vocabulary, d)
        self.more = nn.ModuleDict({"others": nn.Embedding(vocabulary + 1, d)})
        self.query = nn.Linear(d, d + 1)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def get_input_embeddings(self):
        return self.words


@each_seed(range(20))
@pytest.mark.parametrize("how", ["lora, list", "lora, dict", "method"])
def test_trainable_tokens_equal_the_merge(tmp_path, how, seed):
    rng = np.random.default_rng([len(how), seed])
    torch.manual_seed(seed)
    net = Worded(rng).to(DTYPES[seed % 4])
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")

    def some() -> list[int]:
        most = int(rng.integers(2, 16))
        return [int(x) for x in rng.permutation(net.words.num_embeddings)[:most]]

    config = {
        "lora, list": lambda: peft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=some()),
        "lora, dict": lambda: peft.LoraConfig(
            r=2, target_modules=["query"], trainable_token_indices={"more.others": some(), "lm_head": some()}
        ),
        "method": lambda: peft.TrainableTokensConfig(token_indices=some(), target_modules=["words", "lm_head"]),
    }[how]()
    model = peft.get_peft_model(net, config)
    randomise(model, seed)
    model.save_pretrained(tmp_path / "adapter")
    all_accounted_for(tmp_path / "adapter")
    clean, _ = read_all(tmp_path / "base", tmp_path / "adapter")
    assert len(clean) == {"lora, list": 2, "lora, dict": 3, "method": 2}[how]
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4)
    assert "replaced_rows" in {layer.update["kind"] for layer in report.layers}
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    save_raw(model, raw)
    all_accounted_for(raw)
    same_updates(clean, read_all(tmp_path / "base", raw)[0])
    check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


TOKENS = "base_model.model.words.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trainable_token_indices": None}, "expected the indices of 'words'"),
        ({"trainable_token_indices": [1]}, "holds 2 rows, but the config names 1"),
        ({"trainable_token_indices": [1, 1]}, "twice"),
        ({"trainable_token_indices": [1, -1]}, "expected the indices"),
        ({"trainable_token_indices": {"head": [1, 2]}}, "none could be 'words'"),
    ],
)
def test_tokens_that_the_config_contradicts(make_base, make_adapter, config, words):
    make_base({"words.weight": np.zeros((9, 4), np.float32)})
    folder = make_adapter({}, extra={TOKENS: np.ones((2, 4), np.float32)}, **config)
    with pytest.raises(AdapterError, match=words):
        plan_updates(open_checkpoint(folder))


def test_tokens_that_the_base_does_not_have(make_base, make_adapter, rng):
    words = rng.normal(size=(20, 16)).astype(np.float32)
    base = make_base({"words.weight": words})
    new = rng.normal(size=(2, 16)).astype(np.float32)
    folder = make_adapter({}, extra={TOKENS: new}, trainable_token_indices=[3, 20])
    found, _ = read_all(base, folder)
    expected = words.astype(np.float64)
    expected[3] = new[0]
    np.testing.assert_array_equal(found["words.weight"][0].T.numpy(), expected)
    (layer,) = spectra.audit(folder, base, top_k=2).layers
    assert "1 others are rows that the base does not have" in " ".join(layer.notes)
    with pytest.raises(UsageError, match="rows that the base does not have"):
        spectra.repair(folder, base, to=folder.parent / "new", scale=1.0, merged=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "tokens"])
def test_trainable_tokens_are_merged(tmp_path, method, tied):
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    net.save_pretrained(tmp_path / "base")
    config: Any = peft.TrainableTokensConfig(token_indices=[0, 7], target_modules=["embed_tokens"])
    if method == "lora":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[0, 7])
    model = peft.get_peft_model(net, config)
    randomise(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0, merged=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    expected = model.double().merge_and_unload().state_dict()
    for name, value in written.items():
        assert torch.linalg.norm(value.double() - expected[name]) <= 1e-6 * torch.linalg.norm(expected[name]), name
    assert ("lm_head.weight" in written) == (not tied)
    assert spectra.verify(tmp_path / "new").holds


@pytest.fixture
def with_tokens(tmp_path):
    """A LoRA with trainable tokens that are intruders, as saved and as a raw state."""
    torch.manual_seed(0)
    net = llama(3)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    randomise(model, 2)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].mul_(50)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "adapter_config.json").write_bytes((tmp_path / "saved" / "adapter_config.json").read_bytes())
    save_raw(model, tmp_path / "raw")
    return tmp_path


@pytest.mark.parametrize("kind", ["saved", "raw"])
def test_lora_beside_trainable_tokens_is_repaired(with_tokens, kind):
    source, base, out = with_tokens / kind, with_tokens / "base", with_tokens / "out"
    with pytest.raises(UsageError, match=r"embed_tokens: it is stored as the rows of some tokens.*--merged"):
        spectra.repair(source, base, to=out, scale=0.5, epsilon=0.99)
    spectra.repair(source, base, to=out, scale=0.5, epsilon=0.99, exclude=["embed_tokens"])
    assert spectra.verify(out, source=source).holds
    before, after = load_file(source / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {n for n in before if "lora" in n}
