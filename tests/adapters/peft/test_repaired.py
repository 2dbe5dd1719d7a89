"""Adapters written again with other factors, as peft itself loads, runs and merges them."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectra.adapters import plan_updates
from spectra.adapters.peft.lora import LoraUpdate
from spectra.adapters.peft.naming import ModuleNames
from spectra.adapters.peft.repaired import alpha_of, stored_ranks, why_not_writable, write_repaired
from spectra.errors import CorruptFileError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.folders import RECORD, companions, write_record
from spectra.files.orientation import as_stored
from spectra.pairing.pairs import pair_layers
from spectra.updates.algebra import LowRank, RowScaled
from tests.support.peft_folders import adapted, loaded, opened, same
from tests.support.peft_models import OPTIONS, Net, option, tiny_gpt2, tiny_llama
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def altered(pair, tuned, rng, more=2, dtype=torch.float32):
    """New factors of a pair, whose rank is ``more`` than before and whose product is another."""
    old = pair.read_update(tuned, torch.float64, "cpu")
    B = torch.cat([old.B * 0.9, torch.from_numpy(rng.normal(size=(old.B.shape[0], more)))], 1).to(dtype)
    A = torch.cat([old.A, torch.from_numpy(rng.normal(size=(more, old.A.shape[1])))], 0).to(dtype)
    if isinstance(old, LowRank):
        return LowRank(B, A, old.scaling)
    return RowScaled(B, A, old.scaling, (1.25 * old.magnitude).to(dtype))


def new_ranks(changed):
    return {module: update.A.shape[0] for module, update in changed.items()}


def expected_of(model, adapter, base, pairs, changed):
    """What merging must give: peft's merge of the old adapter, with W0 and the new factors put together here."""
    expected = loaded(model, adapter).merge_and_unload().state_dict()
    for pair in pairs:
        if pair.update.module in changed:
            W0 = pair.read_base(base, torch.float64, "cpu")
            W1 = changed[pair.update.module].tuned(W0).dense()
            name = next(n for n in expected if n == pair.base.name or n == f"transformer.{pair.base.name}")
            expected[name] = as_stored(W1, pair.layout, pair.stored_shape)
    return expected


@pytest.mark.parametrize("which", ["first", "all"])
@each_seed(range(3))
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_merges_what_was_meant(tmp_path, name, seed, which):
    rng = np.random.default_rng([OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    net = Net(rng).to((torch.float32, torch.bfloat16, torch.float64)[seed])
    adapter = adapted(tmp_path, net, seed, **option(name, rng))
    base, tuned, plan, pairing = opened(tmp_path)
    pairs = [pair for pair in pairing.pairs if isinstance(pair.update, LoraUpdate)]
    chosen = pairs if which == "all" else pairs[:1]
    changed = {pair.update.module: altered(pair, tuned, rng, 1 + at) for at, pair in enumerate(chosen)}
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed, remarks=["## Section", "text"])
    write_record(tmp_path / "out", "{}")
    expected = expected_of(net, adapter, base, pairs, changed)
    merged = loaded(net, tmp_path / "out").merge_and_unload()
    same(merged.state_dict(), expected)

    again = opened(tmp_path, "out")[3]
    ranks = {pair.update.module: pair.update.rank for pair in again.pairs}
    before = {pair.update.module: pair.update for pair in pairs}
    stored = stored_ranks(tuned, plan, new_ranks(changed))
    assert changed.keys() <= stored.keys()
    assert {module: ranks[module] for module in stored} == stored
    assert all(ranks[module] == update.rank for module, update in before.items() if module not in stored)
    for pair in again.pairs:
        if pair.update.module in before:
            assert pair.update.scaling == pytest.approx(before[pair.update.module].scaling, rel=4e-16)
    untouched(tuned, open_checkpoint(tmp_path / "out"), changed, before)
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "out"))
    assert list(old) == list(new)
    for key in old.keys() - {"rank_pattern", "alpha_pattern"}:
        assert old[key] == new[key]
    forward_agrees(net, tmp_path / "out", merged, chosen)


def untouched(old, new, changed, updates):
    """Everything but the factors that were given, or filled with zeros, is what it was; in the same order."""
    shared = {updates[module].options for module in changed}
    free = {name for update in updates.values() if update.options in shared for name in update.tensors}
    assert list(new.tensors) == list(old.tensors) or {info.dtype for info in old.tensors.values()} != {"F32"}
    assert new.tensors.keys() == old.tensors.keys()
    for name, info in old.tensors.items():
        if name not in free:
            assert (new.tensors[name].dtype, new.tensors[name].shape) == (info.dtype, info.shape)
            assert torch.equal(new.read(name), old.read(name))
    (before,), (after,) = old.files, new.files
    with safe_open(before, "pt") as one, safe_open(after, "pt") as two:
        assert one.metadata() == two.metadata()


def forward_agrees(net, folder, merged, pairs):
    """The adapter as it runs, not merged."""
    model = loaded(net, folder).base_model.model
    for pair in pairs:
        if ".attn" in pair.name:
            continue
        mine, plain = model.get_submodule(pair.name), merged.get_submodule(pair.name)
        weight = plain.weight
        if pair.layout == "embedding":
            x = torch.arange(weight.shape[0])
        elif pair.layout == "conv":
            x = torch.randn(2, weight.shape[1], 6, 6, dtype=torch.float64)
        else:
            x = torch.randn(7, pair.shape[1], dtype=torch.float64)
        torch.testing.assert_close(mine(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_gpt2_with_square_transposed_weights(tmp_path, rng, use_dora):
    torch.manual_seed(0)
    model = tiny_gpt2()
    adapter = adapted(
        tmp_path, model, 1, r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc", "wte"], use_dora=use_dora
    )
    base, tuned, plan, pairing = opened(tmp_path)
    changed = {pair.update.module: altered(pair, tuned, rng) for pair in pairing.pairs[::2]}
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed)
    expected = expected_of(model, adapter, base, pairing.pairs, changed)
    del expected["lm_head.weight"]  # tied, and peft's own business
    merged = loaded(model, tmp_path / "out")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logits = merged(input_ids=tokens).logits
    state = merged.merge_and_unload().state_dict()
    head = state.pop("lm_head.weight")
    same(state, expected)
    plain = copy.deepcopy(model).double().eval()
    plain.load_state_dict(expected | {"lm_head.weight": head})
    if not any(pair.layout == "embedding" for pair in pairing.pairs[::2] + pairing.pairs):
        torch.testing.assert_close(plain(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
def test_ranks_that_peft_would_not_load_are_filled_with_zeros(tmp_path, rng, init):
    torch.manual_seed(0)
    net = Net(rng)
    adapter = adapted(
        tmp_path, net, r=2, lora_alpha=3, target_modules=["query", "square"], init_lora_weights=init, use_rslora=True
    )
    base, tuned, plan, pairing = opened(tmp_path)
    changed = {pairing.pairs[0].update.module: altered(pairing.pairs[0], tuned, rng, 1)}
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed)
    assert new_ranks(changed) == dict.fromkeys(changed, 3)
    stored = stored_ranks(tuned, plan, new_ranks(changed))
    assert stored == dict.fromkeys(changed, 4 if init == "orthogonal" else 3)
    found = {pair.update.module: pair.update.rank for pair in opened(tmp_path, "out")[3].pairs}
    assert found == {pair.update.module: 2 for pair in pairing.pairs} | stored
    same(loaded(net, tmp_path / "out").merge_and_unload().state_dict(), expected_of(
        net, adapter, base, pairing.pairs, changed
    ))  # fmt: skip


def test_fewer_columns_keep_the_rank_and_the_config(tmp_path, rng):
    torch.manual_seed(0)
    net = Net(rng)
    adapter = adapted(tmp_path, net, r=5, lora_alpha=3, target_modules=["query", "square"])
    base, tuned, plan, pairing = opened(tmp_path)
    pair = pairing.pairs[0]
    old = pair.read_update(tuned, torch.float64, "cpu")
    changed = {pair.update.module: LowRank(old.B[:, :3].half(), old.A[:3].half(), old.scaling)}
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed)
    assert stored_ranks(tuned, plan, new_ranks(changed)) == dict.fromkeys(changed, 5)
    assert (tmp_path / "out" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    infos = open_checkpoint(tmp_path / "out").tensors
    assert {info.dtype for info in infos.values()} == {"F16", "F32"}
    same(loaded(net, tmp_path / "out").merge_and_unload().state_dict(), expected_of(
        net, adapter, base, pairing.pairs, changed
    ))  # fmt: skip


def test_with_nothing_changed_every_file_is_copied(tmp_path, rng):
    adapter = adapted(tmp_path, Net(rng), r=2, target_modules=["query"])
    (adapter / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    (adapter / "training_args.bin").write_bytes(b"x")
    _, tuned, plan, _ = opened(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_repaired(out, tuned, plan, {}, remarks=["never said"])
    copied = {path.name for path in adapter.iterdir()} - {"training_args.bin"}
    assert {path.name for path in out.iterdir()} == copied
    for name in copied:
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert stored_ranks(tuned, plan, {}) == {}
    assert list(companions(tuned).left_behind) == ["training_args.bin"]
    write_record(out, '{"a": 1}')
    assert (out / RECORD).read_text() == '{"a": 1}\n'
    assert {path.name for path in out.iterdir()} == {*copied, RECORD}


def test_the_file_may_have_been_named(tmp_path, rng):
    """A file under another name, among whatever else lies there."""
    adapter = adapted(tmp_path, Net(rng), r=2, target_modules=["query"])
    (adapter / WEIGHTS).rename(adapter / "epoch3.safetensors")
    (adapter / "holiday.jpg").write_bytes(b"x")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(adapter / "epoch3.safetensors")
    plan = plan_updates(tuned)
    pair = pair_layers(base, tuned, plan).pairs[0]
    for name, changed in [("same", {}), ("out", {pair.update.module: altered(pair, tuned, rng)})]:
        (tmp_path / name).mkdir()
        write_repaired(tmp_path / name, tuned, plan, changed, remarks=["# A card"])
        assert {path.name for path in (tmp_path / name).iterdir()} - {"README.md"} == {CONFIG, WEIGHTS}
        assert plan_updates(open_checkpoint(tmp_path / name)).updates
    assert companions(tuned).left_behind == {}
    assert (tmp_path / "out" / "README.md").read_text().endswith("---\n\n# A card\n")


def test_the_model_card_gets_a_section(tmp_path, rng):
    adapter = adapted(tmp_path, Net(rng), r=2, target_modules=["query"])
    named = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": 'a"b'}
    (adapter / CONFIG).write_text(json.dumps(named))
    (adapter / "README.md").write_bytes("---\nlicense: mit\n---\n\n# Mine · é\n\n\n".encode())
    _, tuned, plan, pairing = opened(tmp_path)
    changed = {pairing.pairs[0].update.module: altered(pairing.pairs[0], tuned, rng)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_repaired(tmp_path / name, tuned, plan, changed, remarks=["## Repaired", "By 0.5 · λ."])
        (adapter / "README.md").unlink(missing_ok=True)
    assert (tmp_path / "one" / "README.md").read_text(encoding="utf-8") == (
        "---\nlicense: mit\n---\n\n# Mine · é\n\n## Repaired\n\nBy 0.5 · λ.\n"
    )
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "a\\"b"\nlibrary_name: peft\n')
    assert card.endswith("---\n\n## Repaired\n\nBy 0.5 · λ.\n")


# Patterns


def test_patterns_by_regular_expressions_are_rebuilt(tmp_path, rng):
    """The first that matches wins, so new entries cannot just be put beside old ones."""
    torch.manual_seed(0)
    net = Net(rng)
    adapter = adapted(
        tmp_path, net, r=2, lora_alpha=3, target_modules=["query", "square", "classifier"],
        rank_pattern={r".*\d\.(square|query)": 3, "classifier": 4, r"layers\.[01]\.classifier": 1},
        alpha_pattern={"^layers.0.query": 0.7, "query": 9},
    )  # fmt: skip
    base, tuned, plan, pairing = opened(tmp_path)
    changed = {
        pair.update.module: altered(pair, tuned, rng, 2) for pair in pairing.pairs if pair.name.startswith("layers.1")
    }
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed)
    same(loaded(net, tmp_path / "out").merge_and_unload().state_dict(), expected_of(
        net, adapter, base, pairing.pairs, changed
    ))  # fmt: skip
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (values["r"], values["lora_alpha"]) == (2, 3)
    assert {
        pair.name: (pair.update.rank, pair.update.scaling) for pair in opened(tmp_path, "out")[3].pairs
    } == {
        pair.name: (pair.update.rank + 2 * (pair.name in changed), pytest.approx(pair.update.scaling))
        for pair in pairing.pairs
    }  # fmt: skip


def test_a_given_default_stays():
    names = ModuleNames({f"layers.{i}.{kind}": kind for i in range(3) for kind in "qk"}, ())
    every = {f"layers.{i}.{kind}": 8 for i in range(3) for kind in "qk"}
    assert names.pattern(every) == (8, {})
    assert names.pattern(every, 8) == (8, {})
    assert names.pattern(every, 4) == (4, {"q": 8, "k": 8})
    some = every | {"layers.1.q": 9}
    default, pattern = names.pattern(some, 4)
    assert default == 4
    for name, value in some.items():
        key = next(key for key in pattern if re.match(rf"(.*\.)?({key})$", name))
        assert pattern[key] == value


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_keep_the_scaling_to_the_last_digit(tmp_path, rng, rslora):
    adapted(tmp_path, Net(rng), r=6, lora_alpha=16, target_modules=["query"], use_rslora=rslora)
    update = opened(tmp_path)[2].updates[0]
    assert isinstance(update, LoraUpdate)
    exact = 0
    for rank in range(1, 200):
        alpha = alpha_of(update, rank, rslora)
        scaling = alpha / (math.sqrt(rank) if rslora else rank)
        exact += scaling == update.scaling
        assert scaling == pytest.approx(update.scaling, rel=4e-16)
    assert exact > 130  # no alpha gives the others
    assert [alpha_of(update, rank, False) for rank in (6, 9, 12)] == [16, 24, 32]
    assert type(alpha_of(update, 9, False)) is int


# What cannot be written


def resized(home, rng, rows, columns, dtype=torch.float32, **config):
    base, tuned = home / "base", home / "adapter"
    base.mkdir()
    tuned.mkdir()
    save_file({"embed_tokens.weight": torch.randn(rows, 8)}, base / "model.safetensors")
    prefix = "base_model.model.embed_tokens.lora_embedding_"
    tensors = {f"{prefix}A": torch.randn(2, columns).to(dtype), f"{prefix}B": torch.randn(8, 2).to(dtype)}
    if config.get("use_dora"):
        tensors["base_model.model.embed_tokens.lora_magnitude_vector"] = torch.rand(8).to(dtype)
        tensors["base_model.model.embed_tokens.base_layer.weight"] = torch.randn(columns, 8).to(dtype)
    save_file(tensors, tuned / WEIGHTS)
    (tuned / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return opened(home)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resized_vocabulary_keeps_what_is_added_beyond_the_base(tmp_path, rng, dtype):
    _, tuned, plan, pairing = resized(tmp_path, rng, 30, 35, dtype)
    pair = pairing.pairs[0]
    new = altered(pair, tuned, rng, 1, torch.float64)
    U, s, Vh = torch.linalg.svd(new.B @ new.A, full_matrices=False)
    root = s[:3].sqrt()
    balanced = LowRank((U[:, :3] * root).to(dtype), (root[:, None] * Vh[:3]).to(dtype), new.scaling)
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, {pair.update.module: balanced})
    found = load_file(tmp_path / "out" / WEIGHTS)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)

    def product(tensors):
        A, B = (next(v for k, v in tensors.items() if k.endswith(x)).double() for x in "AB")
        return B @ A

    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(product(found)[:, :30], balanced.B.double() @ balanced.A.double())
    lost = (product(found) - product(stored))[:, 30:].norm() / product(stored)[:, 30:].norm()
    assert lost <= 4 * eps
    assert opened(tmp_path, "out")[3].pairs[0].rows == 30


def test_columns_that_cannot_be_kept_are_refused(tmp_path, rng):
    _, tuned, plan, pairing = resized(tmp_path, rng, 30, 35)
    pair = pairing.pairs[0]
    old = pair.read_update(tuned, torch.float64, "cpu")
    less = LowRank(old.B[:, :1].float(), old.A[:1].float(), old.scaling)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="the 5 rows that the base's vocabulary does not have"):
        write_repaired(tmp_path / "out", tuned, plan, {pair.update.module: less})


def test_dora_on_a_resized_vocabulary_is_refused(tmp_path, rng):
    _, tuned, plan, pairing = resized(tmp_path, rng, 30, 35, use_dora=True)
    pair = pairing.pairs[0]
    assert "all 35 rows" in str(why_not_writable(tuned, pair.update, pair.rows))
    assert why_not_writable(tuned, pair.update) is None
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="embed_tokens: DoRA's magnitudes"):
        write_repaired(tmp_path / "out", tuned, plan, {pair.update.module: altered(pair, tuned, rng)})


def test_tied_factors_are_refused(tmp_path, rng):
    torch.manual_seed(0)
    adapted(tmp_path, tiny_llama(), r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    _, tuned, plan, _ = opened(tmp_path)
    reasons = {update.module.split(".")[-1]: why_not_writable(tuned, update) for update in plan.updates}
    assert reasons["q_proj"] is None
    assert "ensure_weight_tying" in str(reasons["embed_tokens"])


def test_factors_of_another_adapter_are_no_input(tmp_path, rng):
    adapted(tmp_path, Net(rng), r=2, target_modules=["query"])
    _, tuned, plan, pairing = opened(tmp_path)
    pair = pairing.pairs[0]
    new = altered(pair, tuned, rng)
    dora = RowScaled(new.B, new.A, new.scaling, torch.ones(new.B.shape[0]))
    for wrong in (LowRank(new.B, new.A, new.scaling * 2), dora):
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="another scaling or kind"):
            write_repaired(tmp_path / "out", tuned, plan, {pair.update.module: wrong})
        shutil.rmtree(tmp_path / "out")


# The file


def test_names_metadata_and_odd_dtypes_stay(tmp_path, rng, make_base):
    make_base({"q.weight": torch.randn(6, 5)})
    home = tmp_path / "adapter"
    home.mkdir()
    tensors = {
        "base_model.model.z.modules_to_save.default.weight": torch.arange(3, dtype=torch.int64),
        "base_model.model.q.lora_B.default.weight": torch.randn(6, 2).bfloat16(),
        "base_model.model.q.lora_A.default.weight": torch.randn(2, 5).bfloat16(),
        "base_model.model.a.bias": torch.randn(7).to(torch.float8_e4m3fn),
        "base_model.model.flag": torch.tensor(True),
        "base_model.model.empty": torch.zeros(0, 3, dtype=torch.int64),
    }
    save_file(tensors, home / WEIGHTS, metadata={"format": "pt", "trained": "é"})
    (home / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "unknown": None, "revision": "é"}) + "\n")
    _, tuned, plan, pairing = opened(tmp_path)
    pair = pairing.pairs[0]
    new = altered(pair, tuned, rng, 3)
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, {"q": new})
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.dtype == (torch.float32 if "lora" in name else tensors[name].dtype)
        if "lora" not in name:
            assert torch.equal(value.view(-1).float(), tensors[name].view(-1).float())
            assert value.shape == tensors[name].shape
    assert torch.equal(found["base_model.model.q.lora_A.default.weight"], new.A)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "trained": "é"}
    text = (tmp_path / "out" / CONFIG).read_text()
    assert list(json.loads(text)) == ["peft_type", "r", "unknown", "revision", "rank_pattern", "alpha_pattern"]
    assert json.loads(text)["rank_pattern"] == {"q": 5}
    assert text.endswith("}\n")


def test_values_of_saved_modules(tmp_path, rng):
    torch.manual_seed(0)
    adapted(tmp_path, Net(rng), r=2, target_modules=["query"], modules_to_save=["classifier"])
    _, tuned, plan, pairing = opened(tmp_path)
    pair = next(pair for pair in pairing.pairs if pair.update.kind == "dense")
    name = pair.update.tensors[0]
    old = tuned.read(name)
    for rows in (1, old.shape[0]):
        out = tmp_path / f"out{rows}"
        out.mkdir()
        write_repaired(out, tuned, plan, {}, whole={name: torch.ones(rows, old.shape[1], dtype=torch.float64)})
        found = open_checkpoint(out).read(name)
        assert found.dtype == old.dtype
        assert torch.equal(found[:rows], torch.ones(rows, old.shape[1]))
        assert torch.equal(found[rows:], old[rows:])
        assert (out / CONFIG).read_bytes() == (tmp_path / "adapter" / CONFIG).read_bytes()
    with pytest.raises(ValueError, match="for a tensor of"):
        write_repaired(tmp_path / "out1", tuned, plan, {}, whole={name: torch.ones(1, 1)})


def test_a_source_that_shrinks_is_an_error(tmp_path, rng):
    adapter = adapted(tmp_path, Net(rng), r=2, target_modules=["query", "square"])
    _, tuned, plan, pairing = opened(tmp_path)
    changed = {pair.update.module: altered(pair, tuned, rng) for pair in pairing.pairs if pair.name.endswith("query")}
    content = (adapter / WEIGHTS).read_bytes()
    (tmp_path / "out").mkdir()

    (adapter / WEIGHTS).write_bytes(content[:-8])
    with pytest.raises(CorruptFileError, match="the file changed while it was being read"):
        write_repaired(tmp_path / "out", tuned, plan, changed)


def test_everything_in_a_net_at_once(tmp_path, rng):
    torch.manual_seed(0)
    net = Net(rng)
    adapter = adapted(
        tmp_path, net, r=3, lora_alpha=5, use_rslora=True, bias="all", modules_to_save=["classifier"],
        target_modules=["query", "square", "words", "conv3", "attn"],
    )  # fmt: skip
    base, tuned, plan, pairing = opened(tmp_path)
    pairs = [pair for pair in pairing.pairs if isinstance(pair.update, LoraUpdate)]
    changed = {pair.update.module: altered(pair, tuned, rng, 1 + at % 3) for at, pair in enumerate(pairs) if at % 3}
    (tmp_path / "out").mkdir()
    write_repaired(tmp_path / "out", tuned, plan, changed)
    same(loaded(net, tmp_path / "out").merge_and_unload().state_dict(), expected_of(
        net, adapter, base, pairs, changed
    ))  # fmt: skip
