"""The sweep over scales: each variant against its definition done literally in float64, in a model and by name."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spectra.errors import UsageError, WrongBaseError
from spectra.repairs.repair import repair
from spectra.repairs.sweep import BASE, COLUMNS, CONTROLS, REPAIR, neighbours, sweep
from spectra.runs.jobs import Job
from spectra.runs.run import open_run
from spectra.runs.settings import checked_settings
from tests.support.paths import FIXTURES
from tests.support.problems import trained_like
from tests.support.reference import max_cosines

SCALES = (1, 0.5, 0)
SHAPES = {"model.layers.0.mlp.up": (40, 24), "model.layers.0.mlp.down": (24, 40), "model.layers.1.mlp.up": (24, 24)}
K = 6


class Block(nn.Module):
    """Modules by name, with nothing that could be called."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def network(up=(40, 24), second=(24, 24), bias=False):
    """A model with the names of SHAPES, filled with noise."""

    def linear(shape):
        return nn.Linear(shape[1], shape[0], bias=bias)

    first = Block(mlp=Block(up=linear(up), down=linear(up[::-1])), norm=nn.LayerNorm(up[1]))
    return Block(model=Block(layers=nn.ModuleList([first, Block(mlp=Block(up=linear(second)))])))


def weights_of(rng, shapes=SHAPES):
    return {f"{name}.weight": trained_like(rng, *shape).astype(np.float32) for name, shape in shapes.items()}


def factors(rng, shapes=SHAPES, r=3, size=4.0):
    """Strong random updates: each has intruders."""
    return {
        name: tuple(
            (size * rng.normal(size=shape) / np.sqrt(max(m, n))).astype(np.float32) for shape in ((m, r), (r, n))
        )
        for name, (m, n) in shapes.items()
    }


@pytest.fixture
def lora(rng, make_base, make_adapter):
    base = make_base(weights_of(rng))
    return make_adapter(factors(rng)), base


class Seen:
    """An evaluation that keeps what it was given and returns the number of the call."""

    def __init__(self):
        self.calls: list[dict[str, np.ndarray]] = []

    def __call__(self, subject):
        tensors = subject.state_dict() if isinstance(subject, nn.Module) else subject
        self.calls.append({name: value.numpy().copy() for name, value in tensors.items()})
        return float(len(self.calls) - 1)

    def of(self, row):
        return self.calls[int(row["value"])]


def norm(W):
    return float(np.linalg.norm(W))


def read_weights(folder):
    from safetensors.torch import load_file

    return {name: value.double().numpy() for name, value in load_file(next(folder.glob("*.safetensors"))).items()}


def lora_weights(adapter, base, scaling):
    """W1 of a LoRA's layers, in float64."""
    stored = read_weights(adapter)
    found = read_weights(base)
    for key in [key for key in stored if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = stored[key.replace("lora_A", "lora_B")]
        found[f"{module}.weight"] = found[f"{module}.weight"] + scaling * B @ stored[key]
    return found


def literal(W0, W1, variant, scale, k=K):
    """(W', vectors scaled) by the definition."""
    U, s, Vh = np.linalg.svd(W1, full_matrices=False)
    found = max_cosines(W0, W1, k, "left")
    intruders = [i for i, value in enumerate(found) if value is not None and value < 0.5]

    def scaled(indices):
        return W1 + (scale - 1) * sum((s[i] * np.outer(U[:, i], Vh[i]) for i in indices), np.zeros_like(W1))

    if not intruders:
        return W1, 0
    if variant == "neighbour":
        near = neighbours(intruders, [i for i in range(min(k, s.size)) if i not in intruders])
        return scaled(near), len(near)
    if variant == "shrink":
        t = np.linalg.norm(scaled(intruders) - W0) / np.linalg.norm(W1 - W0)
        return W0 + t * (W1 - W0), 0
    if variant == "weight":
        return W0 + scale * (W1 - W0), 0
    return scaled(intruders), len(intruders)


def check_literally(frame, seen, W0, W1):
    """Every row's weights and numbers, but those of the random control, which is checked for what it keeps."""
    changed = [name for name in W1 if W0[name].ndim == 2 and literal(W0[name], W1[name], REPAIR, 0.0)[1]]
    assert changed
    for _, row in frame[frame.variant != BASE].iterrows():
        got = seen.of(row)
        vectors = layers = 0
        change = update = size = 0.0
        for name in changed:
            mine = got[name].astype(np.float64)
            size += norm(W1[name] - W0[name]) ** 2
            wanted, count = literal(W0[name], W1[name], row.variant, row.scale)
            if row.variant == "random":
                target = np.linalg.svd(wanted - W1[name], compute_uv=False)
                made = np.linalg.svd(mine - W1[name], compute_uv=False)
                assert made == pytest.approx(target, abs=2e-6 * norm(W1[name]))
                wanted = mine
            assert norm(mine - wanted) < 1e-6 * norm(wanted), (row.variant, name)
            change += norm(wanted - W1[name]) ** 2
            update += norm(wanted - W0[name]) ** 2
            vectors, layers = vectors + count, layers + (count > 0 or row.variant in ("shrink", "weight"))
        assert (row.vectors, row.layers) == (vectors, layers)
        numbers = [row.change_norm, row.update_norm, row.update_change]
        assert numbers == pytest.approx([change**0.5, update**0.5, (change / size) ** 0.5], rel=1e-4, abs=1e-6)
        for name in W1.keys() - set(changed):
            assert np.allclose(got.get(name, W1[name]), W1[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("in_model", [False, True])
def test_every_variant_is_what_it_says(lora, in_model):
    adapter, base = lora
    seen, model = Seen(), network() if in_model else None
    frame = sweep(adapter, base, evaluate=seen, model=model, scales=SCALES, controls=CONTROLS, seeds=2, top_k=K)
    assert tuple(frame.columns) == (*COLUMNS, "value")
    order = [(REPAIR, 0), ("neighbour", 0), ("random", 0), ("random", 1), ("shrink", 0), ("weight", 0)]
    rows = list(zip(frame.variant, frame.scale, frame.seed, strict=True))
    by_scale = sorted(itertools.product(range(6), SCALES), key=lambda x: ([0, 1, 2, 2, 3, 4][x[0]], -x[1], x[0]))
    assert rows[:-1] == [(order[place][0], scale, order[place][1]) for place, scale in by_scale]
    assert rows[-1][0] == BASE
    assert len(seen.calls) == 6 * 2 + 2, "the fine-tune itself is evaluated once"
    assert (frame[frame.scale == 1].value == 0).all()
    W0, W1 = read_weights(base), lora_weights(adapter, base, 2 / 3)
    check_literally(frame, seen, W0, W1)
    last = frame.iloc[-1]
    assert np.isnan(last.scale)
    assert (last.vectors, last.layers, last.update_norm, last.update_change) == (0, 3, 0.0, 1.0)
    for name, value in W0.items():
        assert np.array_equal(seen.of(last)[name], value.astype(np.float32))


@pytest.mark.parametrize("which", ["top", {"layers.0.mlp.up": [1, 3]}])
def test_chosen_vectors(lora, which):
    adapter, base = lora
    seen = Seen()
    frame = sweep(adapter, base, evaluate=seen, which=which, scales=[0], top_k=K, include_base=False)
    W0, W1 = read_weights(base), lora_weights(adapter, base, 2 / 3)
    for name, value in W1.items():
        U, s, Vh = np.linalg.svd(value)
        found = max_cosines(W0[name], value, K, "left")
        intruders = [i for i, cosine in enumerate(found) if cosine is not None and cosine < 0.5]
        chosen = intruders[:1] if which == "top" else [1, 3] if "0.mlp.up" in name else []
        free = [i for i in range(min(K, s.size)) if i not in intruders and i not in chosen]
        for variant, indices in ((REPAIR, chosen), ("neighbour", neighbours(chosen, free))):
            wanted = value - sum((s[i] * np.outer(U[:, i], Vh[i]) for i in indices), np.zeros_like(value))
            made = seen.of(frame[frame.variant == variant].iloc[0])[name]
            assert norm(made - wanted) < 1e-6 * norm(value)


def test_random_changes_depend_on_the_name_and_the_seed_alone(lora):
    adapter, base = lora
    runs = []
    for controls in (["random"], ["shrink", "random"]):
        seen = Seen()
        frame = sweep(adapter, base, evaluate=seen, scales=[0.5], controls=controls, seeds=2, top_k=K)
        rows = frame[frame.variant == "random"]
        assert list(rows.seed) == [0, 1]
        runs.append([seen.of(row) for _, row in rows.iterrows()])
    name = "model.layers.0.mlp.up.weight"
    assert np.array_equal(runs[0][0][name], runs[1][0][name])
    assert np.array_equal(runs[0][1][name], runs[1][1][name])
    assert not np.allclose(runs[0][0][name], runs[0][1][name], atol=1e-3)


def test_dora(rng, make_base, make_adapter):
    W0 = weights_of(rng)
    parts = factors(rng)
    extra = {
        f"base_model.model.{name}.lora_magnitude_vector": rng.uniform(1, 2, size=SHAPES[name][0]).astype(np.float32)
        for name in parts
    }
    base, adapter = make_base(W0), make_adapter(parts, extra=extra, use_dora=True)
    seen = Seen()
    frame = sweep(adapter, base, evaluate=seen, scales=SCALES, controls=["neighbour", "shrink", "weight"], top_k=K)
    before, after = read_weights(base), {}
    for name, (B, A) in parts.items():
        plain = before[f"{name}.weight"] + 2 / 3 * B.astype(np.float64) @ A
        magnitude = extra[f"base_model.model.{name}.lora_magnitude_vector"].astype(np.float64)
        after[f"{name}.weight"] = (magnitude / np.linalg.norm(plain, axis=1))[:, None] * plain
    check_literally(frame, seen, before, after)


@pytest.mark.parametrize("in_model", [False, True])
def test_a_whole_checkpoint(rng, make_base, in_model):
    """Norms go along, and what only the fine-tune has; what is the same in both need have no place."""
    W0 = weights_of(rng)
    W1 = {name: W0[name] + 2 / 3 * B @ A for name, (B, A) in ((f"{n}.weight", p) for n, p in factors(rng).items())}
    norm, same = "model.layers.0.norm.weight", "model.old.inv_freq"
    base = make_base(W0 | {norm: np.ones(24, np.float32), same: np.arange(3, dtype=np.float32)})
    head = {"head.weight": rng.normal(size=(5, 24)).astype(np.float32), "head.bias": np.ones(5, np.float32)}
    own = {norm: np.full(24, 2, np.float32), same: np.arange(3, dtype=np.float32)}
    tuned = make_base(W1 | head | own, folder="tuned")
    model = None
    if in_model:
        model = network()
        model.add_module("head", nn.Linear(24, 5))
    seen = Seen()
    frame = sweep(tuned, base, evaluate=seen, model=model, scales=SCALES, controls=CONTROLS[:2], top_k=K)
    before = read_weights(base) | {name: value.astype(float) for name, value in head.items()}
    check_literally(frame, seen, before, read_weights(tuned))
    for call in seen.calls[:-1]:
        assert (call[norm] == 2).all()
        assert np.array_equal(call["head.weight"], head["head.weight"])
        assert same not in call
    last = seen.calls[-1]
    assert (last[norm] == 1).all()
    assert np.array_equal(last["head.weight"], head["head.weight"]), "the base has none"
    assert np.array_equal(last["model.layers.1.mlp.up.weight"], W0["model.layers.1.mlp.up.weight"])


def test_what_an_adapter_carries(rng, make_base, make_adapter):
    """A saved module, a trained bias, a bias of lora_B, and one that is both."""
    W0 = weights_of(rng)
    biases = {f"{name}.bias": np.full(shape[0], 1.0, np.float32) for name, shape in SHAPES.items()}
    base = make_base(W0 | biases)
    up, down, second = SHAPES
    adapter = make_adapter(
        factors(rng),
        extra={
            "base_model.model.score.modules_to_save.weight": np.full((3, 24), 7.0, np.float32),
            f"base_model.model.{up}.base_layer.bias": np.full(40, 5.0, np.float32),
            f"base_model.model.{up}.lora_B.bias": np.full(40, 3.0, np.float32),
            f"base_model.model.{down}.lora_B.bias": np.full(24, 3.0, np.float32),
        },
        bias="lora_only",
        lora_bias=True,
    )
    model = network(bias=True)
    model.add_module("score", nn.Linear(24, 3, bias=False))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for subject in (None, model):
        seen = Seen()
        sweep(adapter, base, evaluate=seen, model=subject, scales=[0.5], controls=[], top_k=K)
        tuned, before = seen.calls
        assert (tuned["score.weight"] == 7).all()
        assert (before["score.weight"] == 7).all()
        assert tuned[f"{up}.bias"] == pytest.approx(np.full(40, 5 + 2 / 3 * 3))
        assert tuned[f"{down}.bias"] == pytest.approx(np.full(24, 1 + 2 / 3 * 3))
        assert (before[f"{up}.bias"] == 1).all()
        assert (before[f"{down}.bias"] == 1).all()
        if subject is None:
            assert f"{second}.bias" not in tuned
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_sweep_evaluates_what_a_repair_writes(lora, tmp_path):
    adapter, base = lora
    seen = Seen()
    sweep(adapter, base, evaluate=seen, scales=[0.5], controls=[], top_k=K)
    repair(adapter, base, to=tmp_path / "out", scale=0.5, top_k=K)
    run = open_run(tmp_path / "out", base, checked_settings())
    for pair in run.pairs:
        W0 = Job(((run, pair),)).read_base()
        written = run.weight(pair, W0)[0].dense().numpy()
        assert norm(written - seen.calls[0][f"{pair.name}.weight"]) < 1e-6 * norm(written)


def test_layers_left_out_stay_as_the_fine_tune_has_them(lora):
    adapter, base = lora
    seen = Seen()
    frame = sweep(adapter, base, evaluate=seen, exclude=["layers.0"], scales=[0], top_k=K, controls=["weight"])
    W0, W1 = read_weights(base), lora_weights(adapter, base, 2 / 3)
    for call in seen.calls[:2]:
        for name in ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.down.weight"):
            assert np.allclose(call[name], W1[name], rtol=1e-6, atol=1e-6)
    assert list(frame.layers) == [1, 1, 3]
    weight = seen.of(frame[frame.variant == "weight"].iloc[0])["model.layers.1.mlp.up.weight"]
    assert np.array_equal(weight, W0["model.layers.1.mlp.up.weight"].astype(np.float32))


def test_other_layouts(rng, make_base):
    """An embedding, whose vocabulary grew, and a Conv1D come out as they are stored."""
    shapes = {"wte": (80, 48), "h.0.attn.c_attn": (48, 64)}
    W0 = weights_of(rng, shapes) | {"h.0.attn.c_attn.bias": np.zeros(64, np.float32)}
    parts = factors(rng, shapes, size=6.0)
    W1 = {name: W0[name] + 2 / 3 * B @ A for name, (B, A) in ((f"{n}.weight", p) for n, p in parts.items())}
    grown = {"wte.weight": np.concatenate([W1["wte.weight"], np.ones((3, 48), np.float32)])}
    config = {"model_type": "gpt2"}
    base = make_base(W0, config=config)
    tuned = make_base(W0 | W1 | grown, folder="tuned", config=config)
    model = Block(
        transformer=Block(wte=nn.Embedding(83, 48), h=nn.ModuleList([Block(attn=Block(c_attn=nn.Linear(64, 48)))]))
    )
    for subject, prefix in ((None, ""), (model, "transformer.")):
        seen = Seen()
        frame = sweep(tuned, base, evaluate=seen, model=subject, scales=SCALES, top_k=K, controls=[])
        for _, row in frame[frame.variant == REPAIR].iterrows():
            got = seen.of(row)
            for name, rows in (("wte.weight", 80), ("h.0.attn.c_attn.weight", 48)):
                made = got[prefix + name][:rows].T
                wanted, count = literal(W0[name].T.astype(float), W1[name].T.astype(float), REPAIR, row.scale)
                assert count
                assert norm(made - wanted) < 1e-6 * norm(wanted)
            assert (got[prefix + "wte.weight"][80:] == 1).all()
        assert np.array_equal(seen.calls[-1][prefix + "wte.weight"][:80], W0["wte.weight"])
        assert (seen.calls[-1][prefix + "wte.weight"][80:] == 1).all()


def test_precisions(rng, make_base):
    """float64 stays float64 by name; a model in half precision gets each value rounded once."""
    W0 = {name: value.astype(np.float64) for name, value in weights_of(rng).items()}
    parts = factors(rng)
    W1 = {f"{name}.weight": W0[f"{name}.weight"] + 2 / 3 * B.astype(float) @ A for name, (B, A) in parts.items()}
    base, tuned = make_base(W0), make_base(W1, folder="tuned")
    seen = Seen()
    sweep(tuned, base, evaluate=seen, scales=[0.5], controls=[], top_k=K)
    for name, value in W1.items():
        wanted = literal(W0[name], value, REPAIR, 0.5)[0]
        assert seen.calls[0][name].dtype == np.float64
        assert np.linalg.norm(seen.calls[0][name] - wanted) < 1e-12 * np.linalg.norm(wanted)
    exact = dict(seen.calls[0])
    model = network().to(torch.bfloat16)
    got: list[dict[str, torch.Tensor]] = []

    def keep(subject):
        got.append({name: value.clone() for name, value in subject.state_dict().items()})
        return 0

    sweep(tuned, base, evaluate=keep, model=model, scales=[0.5], controls=[], top_k=K)
    for name, value in exact.items():
        assert torch.equal(got[0][name], torch.from_numpy(value).to(torch.bfloat16))


# --- the model


@pytest.mark.parametrize("prefix", ["", "module", "model.text"])
def test_the_names_of_model_classes_are_tolerated(lora, prefix):
    """The base's "model.layers…" in models that call it otherwise."""
    adapter, base = lora
    model = network().model
    for part in reversed([part for part in prefix.split(".") if part]):
        model = Block(**{part: model})
    seen = Seen()
    sweep(adapter, base, evaluate=seen, model=model, scales=[1], controls=[], include_base=False, top_k=K)
    W1 = lora_weights(adapter, base, 2 / 3)
    for name, value in W1.items():
        own = ".".join(part for part in (prefix, name.removeprefix("model.")) if part)
        assert np.allclose(seen.calls[0][own], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3])
def test_the_models_values_come_back_whatever_happens(lora, stop, after):
    adapter, base = lora
    model = network()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    calls = itertools.count()

    def evaluate(subject):
        assert not torch.equal(subject.model.layers[1].mlp.up.weight, kept["model.layers.1.mlp.up.weight"])
        if next(calls) == after:
            raise stop
        return 1.0

    with pytest.raises(stop):
        sweep(adapter, base, evaluate=evaluate, model=model, top_k=K)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    sweep(adapter, base, evaluate=lambda subject: 1.0, model=model, top_k=K, scales=[0.5])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_layer_that_cannot_be_analysed(rng, make_base, make_adapter):
    W0, parts = weights_of(rng), factors(rng)
    parts["model.layers.1.mlp.up"][0][0, 0] = np.nan
    adapter, base = make_adapter(parts), make_base(W0)
    model = network()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"lora_B.*NaN or infinity; exclude 'model\.layers\.1\.mlp\.up' to keep"):
        sweep(adapter, base, evaluate=Seen(), model=model, top_k=K)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def twice(model):
    return Block(a=model.model, b=network().model)


def tied(model):
    model.model.layers[0].mlp.add_module("again", nn.Linear(24, 40, bias=False))
    model.model.layers[0].mlp.again.weight = model.model.layers[0].mlp.up.weight
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: network(second=(24, 20)), r"its shape is \[24, 24\], that of the model's '.*' \[24, 20\]"),
        (lambda model: Block(model=Block(layers=nn.ModuleList([model.model.layers[0]]))), "not in the model; expected"),
        (twice, r"could be any of the model's 'a\.layers.*', 'b\.layers"),
        (tied, r"the model's 'model\.layers\.0\.mlp\.up\.weight' and '.*again\.weight' share their values"),
        (lambda model: model.to("meta"), "holds nothing"),
        (lambda model: {"weight": 1}, "model is of dict; expected a torch.nn.Module"),
    ],
)
def test_a_model_that_does_not_fit(lora, change, message):
    adapter, base = lora
    seen = Seen()
    with pytest.raises(UsageError, match=message) as caught:
        sweep(adapter, base, evaluate=seen, model=change(network()), top_k=K)
    assert not seen.calls
    if "dict" not in message:
        assert "adapter: tensor 'model.layers." in str(caught.value)


def test_a_model_with_the_adapter_in_it_does_not_fit(lora):
    peft = pytest.importorskip("peft")
    adapter, base = lora
    config = peft.LoraConfig(r=3, target_modules=["up", "down"])
    with pytest.raises(UsageError, match=r"mlp.*not in the model; expected the base's architecture"):
        sweep(adapter, base, evaluate=Seen(), model=peft.PeftModel(network(), config), top_k=K)


def test_tied_weights_of_a_whole_model(rng, make_base):
    """An embedding that is the head, too: one tensor in the file stands for both."""
    shapes = {"model.embed_tokens": (40, 16), "model.layers.0.up": (24, 16)}
    W0, parts = weights_of(rng, shapes), factors(rng, shapes)
    W1 = {name: W0[name] + 2 / 3 * B @ A for name, (B, A) in ((f"{n}.weight", p) for n, p in parts.items())}
    base, tuned = make_base(W0), make_base(W1, folder="tuned")
    embedding, head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    head.weight = embedding.weight
    body = Block(embed_tokens=embedding, layers=nn.ModuleList([Block(up=nn.Linear(16, 24, bias=False))]))
    model = Block(model=body, lm_head=head)
    seen = Seen()
    sweep(tuned, base, evaluate=seen, model=model, scales=[1], controls=[], top_k=K)
    for call in seen.calls:
        assert np.array_equal(call["lm_head.weight"], call["model.embed_tokens.weight"])
    assert np.array_equal(seen.calls[0]["lm_head.weight"], W1["model.embed_tokens.weight"])
    both = make_base(W1 | {"lm_head.weight": W1["model.embed_tokens.weight"].copy()}, folder="both")
    with pytest.raises(UsageError, match="share their values; give each its own"):
        sweep(both, base, evaluate=seen, model=model, top_k=K)


# --- bad input


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("good", "evaluate returned str for 'value'; expected a number"),
        (None, "NoneType for 'value'"),
        (True, "bool for 'value'"),
        ({"accuracy": torch.ones(1)}, "Tensor for 'accuracy'"),
        ({}, "evaluate returned nothing"),
        ({"scale": 1.0}, "evaluate returned 'scale'; expected other names than variant, scale"),
        ({1: 1.0}, "evaluate returned 1; expected other names"),
    ],
)
def test_what_evaluate_may_return(lora, found, message):
    adapter, base = lora
    with pytest.raises(UsageError, match=message):
        sweep(adapter, base, evaluate=lambda weights: found, top_k=K)


def test_numbers_by_name(lora):
    adapter, base = lora
    made = iter(range(100))

    def evaluate(weights):
        return {"loss": np.float32(next(made)), "accuracy": 1}

    frame = sweep(adapter, base, evaluate=evaluate, scales=[1, 0.5], controls=[], top_k=K)
    assert tuple(frame.columns) == (*COLUMNS, "loss", "accuracy")
    assert list(frame.loss) == [0, 1, 2]
    assert (frame.accuracy == 1).all()
    answers = iter([{"a": 1}, {"b": 1}])
    with pytest.raises(UsageError, match="evaluate returned b, and before that a"):
        sweep(adapter, base, evaluate=lambda weights: next(answers), top_k=K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": []}, "no scales"),
        ({"scales": [1, -0.5]}, "scale = -0.5"),
        ({"scales": [float("nan")]}, "scale = nan"),
        ({"controls": ["nothing"]}, "control 'nothing'; expected some of neighbour, random, shrink, weight"),
        ({"seeds": 0}, "seeds = 0"),
        ({"which": {"no such layer": [0]}}, "'no such layer' matches no layer"),
        ({"which": {"layers.1": [24]}}, r"vector 24; a weight of \[24, 24\] has 24"),
        ({"top_k": 0}, "top-k = 0"),
        ({"epsilon": 0.01}, "no intruder dimensions, so there is nothing to scale"),
    ],
)
def test_bad_options(lora, options, message):
    adapter, base = lora
    seen = Seen()
    with pytest.raises(UsageError, match=message):
        sweep(adapter, base, evaluate=seen, **{"top_k": K, **options})
    assert not seen.calls


def test_fine_tunes_whose_model_cannot_be_had(rng, make_base, make_adapter):
    W0, parts = weights_of(rng), factors(rng)
    base = make_base(W0)
    adapter = make_adapter(parts, alora_invocation_tokens=[1])
    with pytest.raises(UsageError, match="some tokens only"):
        sweep(adapter, base, evaluate=Seen(), top_k=K)
    lost = make_adapter(parts, folder="lost", extra={"base_model.model.model.layers.1.mlp.up.lora_B.bias": np.ones(24)})
    with pytest.raises(UsageError, match=r"lora_B\.bias': the base has no 'model\.layers\.1\.mlp\.up\.bias'"):
        sweep(lost, base, evaluate=Seen(), top_k=K)
    with pytest.raises(WrongBaseError):
        sweep(adapter, make_base({"other.weight": np.eye(3)}, folder="other"), evaluate=Seen())


def test_pandas_is_asked_for_before_any_work(lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    seen = Seen()
    with pytest.raises(UsageError, match="needs pandas"):
        sweep(*lora, evaluate=seen, top_k=K)
    assert not seen.calls


def test_progress(lora):
    steps: list[tuple[float, float, str]] = []
    adapter, base = lora
    sweep(
        adapter, base, evaluate=Seen(), scales=[1, 0], controls=["shrink"], top_k=K,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [what for _, _, what in steps[:3]] == sorted(SHAPES)
    assert steps[3:] == [
        (1, 4, "the fine-tune"), (2, 4, "intruders, scale 0"), (3, 4, "shrink, scale 0"), (4, 4, "the base"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "free", "found"),
    [
        ([0], [1, 2, 3], [1]),
        ([2], [0, 1, 3, 4], [1]),
        ([0, 1], [2, 3], [2, 3]),
        ([0, 1, 2, 3], [4, 5], [4, 5]),
        ([3, 5], [4], [4]),
        ([0], [], []),
    ],
)
def test_neighbours(chosen, free, found):
    assert neighbours(chosen, free) == found


# --- the family


def test_the_stored_sweep_of_the_family_is_of_that_family():
    """``fixtures/repair.csv``: the fine-tunes and the base are those of the family's record."""
    stored = pd.read_csv(FIXTURES / "repair.csv")
    record = json.loads((FIXTURES / "family.json").read_text())
    assert set(stored.member) < set(record)
    for name, rows in stored.groupby("member"):
        (accuracy,) = set(rows[rows.scale == 1].accuracy)
        assert accuracy == pytest.approx(record[name]["test_accuracy"], abs=0.002)
        # On a quarter of the text.
        (loss,) = set(rows[rows.scale == 1].pretraining_loss)
        assert loss == pytest.approx(record[name]["pretraining_loss"], abs=0.05)
        (base,) = rows[rows.variant == BASE].pretraining_loss
        assert base == pytest.approx(record["base"]["pretraining_loss"], abs=0.05)
