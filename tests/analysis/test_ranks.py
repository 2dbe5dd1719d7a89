"""Ranks against plain formulas on dense matrices, and the suggested config against peft itself."""

from __future__ import annotations

import itertools
import json
import re
import warnings

import numpy as np
import pytest

from spectra.analysis.ranks import layer_rank
from spectra.errors import UsageError
from spectra.render.ranks import about_alpha, render_ranks
from tests.support.ranks import of_matrix, report, suggested, with_rank
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def truncated(dW, rank):
    U, s, Vh = np.linalg.svd(dW)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("shape", [(30, 30), (50, 20), (20, 50)])
def test_a_dense_layer(rng, shape):
    dW = rng.normal(size=shape) @ np.diag(0.8 ** np.arange(shape[1])) * 1e-3
    layer = of_matrix(dW)
    size = np.linalg.norm(dW)

    def lost(rank):
        return np.linalg.norm(dW - truncated(dW, rank)) / size

    def holding(energy):
        return next(r for r in range(1, min(shape) + 1) if 1 - lost(r) ** 2 >= energy)

    most = max(r for r in range(1, 100) if r * sum(shape) < shape[0] * shape[1])
    assert layer.break_even_rank == most
    assert layer.dense_parameters == dW.size
    assert layer.module_type == "q_proj"
    assert layer.update_norm_fro == pytest.approx(size, rel=1e-12)
    assert layer.update_norm_relative == pytest.approx(size / 10, rel=1e-12)
    assert (layer.rank_90, layer.rank_99) == (holding(0.9), holding(0.99))
    assert layer.stable_rank == pytest.approx((size / np.linalg.norm(dW, 2)) ** 2, rel=1e-9)
    p = np.linalg.svd(dW, compute_uv=False) / np.linalg.norm(dW, "nuc")
    assert layer.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert len(layer.values) == most
    for rank in range(most + 1):
        assert layer.error_at(rank) == pytest.approx(lost(rank), rel=1e-5)
    assert [rank for rank, _ in layer.curve] == [2**i for i in range(10) if 2**i <= most]
    assert dict(layer.curve) == {rank: layer.error_at(rank) for rank, _ in layer.curve}
    for energy in (0.3, 0.7, 0.9, 0.97):
        needed = holding(energy)
        assert layer.rank_at(energy) == (needed if needed <= most else None)
    assert layer.rank_at(1.0) is None
    with pytest.raises(UsageError, match=f"rank {most + 1} is beyond"):
        layer.error_at(most + 1)


def test_a_low_rank_layer_knows_every_rank(rng):
    dW = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 30))
    layer = of_matrix(dW, kind="low_rank", trained_rank=4)
    assert layer.rank_at(1.0) == 4
    assert layer.error_at(4) == layer.error_at(17) == 0
    assert layer.error_at(3) == pytest.approx(np.linalg.norm(dW - truncated(dW, 3)) / np.linalg.norm(dW), rel=1e-5)
    assert layer.noise_rank is layer.noise_edge is None


@pytest.mark.parametrize("spikes", [0, 1, 5])
def test_what_stands_out_of_noise_is_counted(rng, spikes):
    m, n = 200, 120
    U, V = np.linalg.qr(rng.normal(size=(m, 5)))[0], np.linalg.qr(rng.normal(size=(n, 5)))[0]
    edge = 0.01 * (np.sqrt(m) + np.sqrt(n))
    dW = 0.01 * rng.normal(size=(m, n)) + (U[:, :spikes] * 3 * edge) @ V[:, :spikes].T
    layer = of_matrix(dW)
    assert layer.noise_edge == pytest.approx(edge, rel=0.05)
    assert layer.noise_rank in (spikes, spikes + 1)  # the largest of the noise lies about at the edge
    assert of_matrix(dW, kind="row_scaled").noise_rank is None  # its bulk is the base, not noise


def test_nothing_changed():
    layer = layer_rank(
        np.zeros(5), (8, 5), name="a", role="linear", kind="dense", trained_rank=None, parameters=40, base_norm_fro=0.0
    )
    assert (layer.rank_90, layer.rank_99, layer.effective_rank, layer.stable_rank) == (0, 0, 0.0, 0.0)
    assert layer.update_norm_relative is None
    assert layer.error_at(1) == 0
    assert suggested([layer]) is None
    found = suggested([layer, with_rank("b", 2)])
    assert found.left_out == ({"name": "a", "reason": "unchanged"},)
    assert found.target_modules == ("b",)


def test_the_smallest_rank_that_holds_the_energy(rng):
    layers = [
        of_matrix(rng.normal(size=(60, 40)) * 0.7 ** np.arange(40), f"layers.{i}.{kind}_proj")
        for i, kind in itertools.product(range(3), "qv")
    ]
    found = suggested(layers, energy=0.8)
    assert [choice.name for choice in found.choices] == [layer.name for layer in layers]
    for choice, layer in zip(found.choices, layers, strict=True):
        assert layer.error_at(choice.rank) ** 2 <= 0.2 + 1e-6 < layer.error_at(choice.rank - 1) ** 2 + 2e-6
        assert choice.relative_error == layer.error_at(choice.rank)
        assert choice.parameters == choice.rank * (60 + 40)
        assert (choice.alpha, choice.scaling, choice.capped) == (2 * choice.rank, 2, None)
    assert found.parameters == sum(choice.rank for choice in found.choices) * 100
    assert found.dense_parameters == found.trained_parameters == 6 * 2400
    squares = [layer.update_norm_fro**2 for layer in layers]
    lost = [choice.relative_error**2 * square for choice, square in zip(found.choices, squares, strict=True)]
    assert found.relative_error == pytest.approx(np.sqrt(sum(lost) / sum(squares)), rel=1e-12)
    assert [choice.rank for choice in suggested(layers).choices] == [layer.rank_90 for layer in layers]


def test_caps_are_said(rng):
    flat = of_matrix(rng.normal(size=(40, 30)), "layers.0.q_proj")  # would need about 25, and 17 breaks even
    steep = of_matrix(rng.normal(size=(40, 30)) * 0.3 ** np.arange(30), "layers.1.q_proj")
    found = suggested([flat, steep])
    assert [choice.capped for choice in found.choices] == ["break_even", None]
    assert found.choices[0].rank == flat.break_even_rank == 17
    capped = suggested([flat, steep], max_rank=1)
    assert [(choice.rank, choice.capped) for choice in capped.choices] == [(1, "max_rank"), (1, "max_rank")]
    assert suggested([flat, steep], max_rank=17).choices[0].capped == "max_rank"
    assert suggested([flat, steep], max_rank=18).choices[0].capped == "break_even"
    text = render_ranks(report(layers=(flat, steep), suggestion=found))
    assert "1 layer capped at the break-even rank" in text
    assert "2 layers capped at the largest rank allowed, 1" in render_ranks(report((flat, steep), capped))


def test_only_linear_layers_get_a_suggestion():
    layers = [
        with_rank("layers.0.q_proj", 2),
        with_rank("embed_tokens", 2, role="embedding"),
        with_rank("score", 2, role="head"),
        with_rank("patches", 2, role="conv"),
        with_rank("layers.0.attn.in_proj_weight", 2),
        with_rank("layers.0.experts.0.up", 2, unnamed="a part"),
        with_rank("layers.0.gate", 1, shape=(1, 64)),
    ]
    found = suggested(layers)
    assert [choice.name for choice in found.choices] == ["layers.0.q_proj"]
    assert [item["name"] for item in found.left_out] == [layer.name for layer in layers[1:]]
    assert found.left_out_share == pytest.approx(11 / 13)  # of the squares 2, 2, 2, 2, 2, 2 and 1
    assert suggested(layers[1:]) is None


def test_one_rank_for_several_layers():
    layers = [with_rank(f"layers.{i}.{kind}_proj", rank) for i, kind, rank in [(0, "q", 3), (1, "q", 5), (0, "v", 9)]]
    assert [choice.rank for choice in suggested(layers, by="layer").choices] == [3, 5, 9]
    by_type = suggested(layers, by="type")
    assert [choice.rank for choice in by_type.choices] == [5, 5, 9]
    assert not any(key.startswith("^") for key in by_type.rank_pattern)
    whole = suggested(layers, by="model")
    assert [choice.rank for choice in whole.choices] == [9, 9, 9]
    assert whole.rank_pattern == whole.alpha_pattern == {}
    thin = with_rank("layers.1.v_proj", 2, shape=(8, 64))  # where 7 breaks even
    assert [choice.rank for choice in suggested([*layers, thin], by="model").choices] == [9, 9, 9, 7]
    assert suggested([*layers, thin], by="model").choices[-1].capped is None  # it has what it needs


@pytest.mark.parametrize(
    ("alpha", "use_rslora", "expected", "scalings"),
    [
        (None, False, [8, 8, 32], [2, 2, 2]),
        ("2r", False, [8, 8, 32], [2, 2, 2]),
        ("r", False, [4, 4, 16], [1, 1, 1]),
        ("0.5 r", False, [2, 2, 8], [0.5, 0.5, 0.5]),
        (16, False, [16, 16, 16], [4, 4, 1]),
        ("24", False, [24, 24, 24], [6, 6, 1.5]),
        (None, True, [4, 4, 4], [2, 2, 1]),  # 2√4, as 4 is the most common rank
        ("2r", True, [8, 8, 32], [4, 4, 8]),
        (16, True, [16, 16, 16], [8, 8, 4]),
    ],
)
def test_alpha(alpha, use_rslora, expected, scalings):
    layers = [with_rank("layers.0.q", 4), with_rank("layers.1.k", 4), with_rank("layers.0.v", 16)]
    found = suggested(layers, alpha=alpha, use_rslora=use_rslora, energy=1)
    assert [choice.alpha for choice in found.choices] == expected
    assert [choice.scaling for choice in found.choices] == scalings
    assert isinstance(found.lora_alpha, int)
    assert ("not a law" in about_alpha(found)) == (found.alpha_rule == "2r")
    assert ("2312.03732" in about_alpha(found)) == use_rslora


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"energy": 0}, "energy = 0"),
        ({"energy": 1.1}, "energy = 1.1"),
        ({"energy": float("nan")}, "energy = nan"),
        ({"max_rank": 0}, "max_rank = 0"),
        ({"by": "name"}, "by = 'name'"),
        ({"alpha": "2x"}, "alpha = '2x'"),
        ({"alpha": ""}, "alpha = ''"),
        ({"alpha": 0}, "alpha = 0"),
        ({"alpha": "-2r"}, "alpha = '-2r'"),
        ({"alpha": float("inf")}, "alpha = inf"),
    ],
)
def test_what_makes_no_sense_is_refused(option, match):
    with pytest.raises(UsageError, match=re.escape(match)):
        suggested([with_rank("a", 2)], **option)


def resolved(config, name):
    """Rank and alpha as peft resolves them for one module."""
    values = []
    for pattern, default in ((config["rank_pattern"], config["r"]), (config["alpha_pattern"], config["lora_alpha"])):
        values.append(pattern.get(peft.utils.other.get_pattern_key(pattern.keys(), name), default))
    return tuple(values)


KINDS = ("self_attn.q_proj", "attention.output.dense", "output.dense", "intermediate.dense", "mlp.up-proj")


@each_seed(range(40))
def test_patterns_mean_what_was_meant(seed):
    """Names that end alike, layers 1 and 11, a second tower: whatever ranks they get."""
    rng = np.random.default_rng(seed)
    names = [f"{tower}layers.{i}.{kind}" for tower in ("", "vision.") for i in range(12) for kind in KINDS]
    names = [name for name in names if rng.random() < 0.9]
    choices = rng.integers(1, 20, size=int(rng.integers(1, 6)))
    by_kind = {kind: rng.choice(choices) for kind in KINDS}
    free = rng.random()
    ranks = {
        name: int(
            rng.choice(choices) if rng.random() < free else by_kind[name.split(".", 2 + name.count("vision"))[-1]]
        )
        for name in names
    }
    meant = {name: rank for name, rank in ranks.items() if rng.random() < (1 if seed % 2 else 0.7)}
    others = [name for name in ranks if name not in meant]
    found = suggested([with_rank(name, rank, (99, 99)) for name, rank in meant.items()], energy=1, other_modules=others)
    config = found.peft_config()
    made = peft.LoraConfig(**config)
    for name in ranks:
        assert (peft.tuners.tuners_utils.check_target_module_exists(made, name) is True) == (name in meant), name
    for name, rank in meant.items():
        assert resolved(config, name) == (rank, 2 * rank), name


def test_a_name_that_ends_in_a_targets_name_is_excluded():
    found = suggested([with_rank("layers.0.q", 2)], other_modules=["vision.layers.0.q", "layers.1.q"])
    assert found.target_modules == ("layers.0.q",)
    assert found.exclude_modules == ("vision.layers.0.q",)
    config = peft.LoraConfig(**found.peft_config())
    exists = peft.tuners.tuners_utils.check_target_module_exists
    assert exists(config, "layers.0.q") is True
    assert not exists(config, "vision.layers.0.q")


def tiny(kind):
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=11, num_attention_heads=2
            )
        )
    if kind == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2
            )
        )
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=24, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize("by", ["layer", "type"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_peft_builds_what_was_meant(rng, kind, use_rslora, by):
    model = tiny(kind)
    linear = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name not in ("lm_head", "classifier"):
            shape = tuple(module.weight.shape)
            linear[name] = shape[::-1] if type(module).__name__ == "Conv1D" else shape
    everything = [name for name, _ in model.named_modules() if name]
    layers = [with_rank(name, int(rng.integers(1, 7)), shape) for name, shape in linear.items()][1:]  # one stays out
    found = suggested(layers, use_rslora=use_rslora, by=by, energy=1, other_modules=everything)
    assert json.loads(json.dumps(found.peft_config())) == found.peft_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remark on Conv1D's orientation
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**found.peft_config()))
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(adapted) == {layer.name for layer in layers}
    for choice in found.choices:
        module = adapted[choice.name]
        assert module.r["default"] == choice.rank
        assert module.lora_alpha["default"] == choice.alpha
        assert module.scaling["default"] == pytest.approx(choice.scaling, rel=1e-12)
        count = sum(value.numel() for name, value in module.named_parameters() if "lora_" in name)
        assert count == choice.parameters
    trainable = sum(value.numel() for value in wrapped.parameters() if value.requires_grad)
    assert trainable == found.parameters
