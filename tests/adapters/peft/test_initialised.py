"""Adapters whose initialisation changed the base: what is read from the original base, against peft's own model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.updates.initialisation import UNDECIDED, as_saved, leading, surer
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft.tuners.lora.config import CordaConfig  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

SEEDS = range(20)
OPTIONS = ("plain", "rslora", "rank pattern", "alpha pattern", "both, rslora", "dora", "conv1d")


class Net(nn.Module):
    """Two blocks with wide, tall and square weights."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        a, b, c = (int(x) for x in rng.integers(9, 24, size=3))
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "up": nn.Linear(a, b),
                "down": nn.Linear(c, a, bias=False),
                "square": nn.Linear(b, b),
                "c_attn": Conv1D(c + 25, a),
            })
            for _ in range(2)
        )  # fmt: skip
        self.words = nn.Embedding(30, a)
        self.conv = nn.Conv2d(a, b, 3)


def config_of(name: str, init: str, rng: np.random.Generator, **more: Any) -> Any:
    r, some, layer = int(rng.integers(1, 7)), float(rng.uniform(0.5, 40)), int(rng.integers(2))
    common = {"r": r, "lora_alpha": int(rng.integers(1, 33)), "target_modules": ["up", "down", "square"]}
    specific: dict[str, dict] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "rank pattern": {"rank_pattern": {f"layers.{layer}.up": int(rng.integers(1, 7)), r".*\d\.down": 2}},
        "alpha pattern": {"alpha_pattern": {"up": some, f"^layers.{layer}.down": some / 3}},
        "both, rslora": {"rank_pattern": {"down": 3}, "alpha_pattern": {f"{layer}.up": some}, "use_rslora": True},
        "dora": {"use_dora": True},
        "conv1d": {"target_modules": ["c_attn", "up", *more.pop("others", [])], "fan_in_fan_out": True},
    }
    return peft.LoraConfig(**common | specific[name] | {"init_lora_weights": init} | more)


def train(model: nn.Module, seed: int, amount: float = 0.2) -> None:
    """Moves every trainable parameter by about a part of its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                size = float(parameter.double().square().mean().sqrt()) or 0.1
                parameter.add_((amount * size * noise).to(parameter.dtype))


def made(folder, net: Any, config, seed, *, prepare=None):
    """Saves the base, the initial adapter and the trained one; the trained model."""
    save_base(folder, net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if prepare is not None:
            prepare(net, config)
        model = peft.get_peft_model(net, config)
        model.save_pretrained(folder / "initial")
        train(model, seed)
        model.save_pretrained(folder / "adapter")
    return model


def save_base(folder, net):
    (folder / "base").mkdir()
    save_file({name: value.clone() for name, value in net.state_dict().items()}, folder / "base" / "model.safetensors")


def spread(net: nn.Module) -> nn.Module:
    """The network with singular values that are well apart, as float32 can tell them."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                U, S, V = torch.linalg.svd(parameter.double(), full_matrices=False)
                parameter.copy_((U * (S[0] * 0.7 ** torch.arange(S.numel()))) @ V)
    return net


def check(model, folder, *, initial=False, tolerance=1e-6, bound=None, half=False):
    """Every weight that the trained model has differs from what was read by no more than the tolerance.

    ``bound(W0, update)`` is added to it.  In ``half`` precision some entries may be rounded the other way.
    """
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")
    plan = plan_updates(tuned, open_checkpoint(folder / "initial") if initial else None)
    pairs: Any = pair_layers(base, tuned, plan).pairs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.double().merge_and_unload().state_dict()
    for pair in pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        tuned_weight = pair.read_update(tuned, torch.float64, "cpu").tuned(W0)
        expected = as_matrix(merged[pair.base.name], pair.layout)
        W1 = tuned_weight.dense()
        # OLoRA takes s times the first columns, which lies at times half way between two values of the base's dtype.
        taken = max(1.0, abs(pair.update.scaling)) if getattr(pair.update, "how", "") == "olora" else 1.0
        size = torch.linalg.norm(expected) + (taken - 1) * torch.linalg.norm(W0)
        apart = (W1 - expected).abs() > 1e-5 * size if half else torch.zeros_like(W1, dtype=torch.bool)
        assert apart.double().mean() < (0.25 if taken > 1 else 0.03), pair.name
        assert not half or (W1 - expected).abs().max() <= 2**-7 * taken * expected.abs().max(), pair.name
        W1[apart] = expected[apart]
        more = 0.0 if bound is None else bound(W0, pair.update)
        assert torch.linalg.norm(W1 - expected) <= tolerance * size + more, pair.name
        assert torch.linalg.norm(W0 - expected) > 1e-3 * torch.linalg.norm(expected), pair.name
        if tuned_weight.low_rank() is not None:
            B, A = tuned_weight.low_rank()
            torch.testing.assert_close(W0 + B @ A, W1)
            assert B.shape[1] <= 2 * pair.update.rank
            assert not half
    return pairs


@each_seed(SEEDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_pissa_equals_the_trained_model(tmp_path, name, seed):
    rng = np.random.default_rng([1, OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    net = Net(rng)
    model = made(tmp_path, spread(net) if seed % 2 else net, config_of(name, "pissa", rng), seed)
    # Where the singular values are close, float32 tells the leading vectors no better than the gap allows.
    assert check(model, tmp_path, bound=None if seed % 2 else lambda W0, update: leading(W0, update.rank).error)


@each_seed(SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_pissa_of_a_base_in_half_precision_is_rounded_as_peft_rounds_it(tmp_path, dtype, seed):
    rng = np.random.default_rng([2, seed])
    torch.manual_seed(seed)
    net = spread(Net(rng)).to(dtype)
    model = made(tmp_path, net, config_of(OPTIONS[seed % len(OPTIONS)], "pissa", rng), seed)
    pairs = check(model, tmp_path, half=True, tolerance=1e-4)
    assert {pair.update.stored for pair in pairs} == {"BF16" if dtype == torch.bfloat16 else "F16"}


@each_seed(SEEDS)
@pytest.mark.parametrize("name", OPTIONS[:-1])
def test_olora_equals_the_trained_model(tmp_path, name, seed):
    rng = np.random.default_rng([3, OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    net = Net(rng).to((torch.float32, torch.bfloat16)[seed % 4 == 3])
    config = config_of(name, "olora" if seed % 2 else "OLoRA", rng)
    half = seed % 4 == 3
    assert check(made(tmp_path, net, config, seed), tmp_path, half=half, tolerance=1e-4 if half else 1e-6)


@each_seed(SEEDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_randomised_pissa_equals_the_trained_model(tmp_path, name, seed):
    rng = np.random.default_rng([4, OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    model = made(tmp_path, Net(rng), config_of(name, f"pissa_niter_{seed % 3}", rng), seed)
    assert check(model, tmp_path, initial=True)


def with_gradients(net, config):
    """What preprocess_loraga leaves behind: a gradient at every module."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] in config.target_modules:
            module._peft_loraga_grad = torch.randn_like(module.weight)


@each_seed(range(8))
@pytest.mark.parametrize("name", [option for option in OPTIONS if option != "dora"])
def test_lora_ga_equals_the_trained_model(tmp_path, name, seed):
    rng = np.random.default_rng([5, OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    # Embeddings and convolutions have no LoRA-GA, and their base stays.
    scale = ("stable", "gd_scale", "weight_svd")[seed % 3]
    more = {"others": ["words", "conv"]} if name == "conv1d" else {}
    config = config_of(name, "lora_ga", rng, lora_ga_config=peft.LoraGAConfig(scale=scale), **more)
    config.r = min(config.r, 4)  # peft takes 2r singular vectors of the gradient
    config.rank_pattern = {key: min(value, 4) for key, value in config.rank_pattern.items()}
    pairs = check(made(tmp_path, Net(rng), config, seed, prepare=with_gradients), tmp_path, initial=True)
    assert name != "conv1d" or {pair.layout for pair in pairs} == {"linear", "conv1d", "embedding", "conv"}


def with_eigens(net, config):
    """What preprocess_corda leaves behind: singular vectors of W·C and C⁻¹ of a covariance C."""
    from types import SimpleNamespace

    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or name.rpartition(".")[2] not in config.target_modules:
            continue
        W = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        C = torch.eye(W.shape[1]) + 0.1 * torch.randn(W.shape[1], 40) @ torch.randn(40, W.shape[1]) / 40
        U, S, V = torch.linalg.svd(W @ C, full_matrices=False)
        V = (V @ torch.linalg.inv(C)).T
        r = config.r
        vars(module)["eigens"] = SimpleNamespace(U_WC=U[:, :r].clone(), S_WC=S[:r].clone(), V_WC=V[:, :r].clone())


@each_seed(range(8))
@pytest.mark.parametrize("name", ["plain", "rslora", "alpha pattern", "dora", "conv1d"])
def test_corda_equals_the_trained_model(tmp_path, name, seed):
    rng = np.random.default_rng([6, OPTIONS.index(name), seed])
    torch.manual_seed(seed)
    config = config_of(name, "corda", rng, corda_config=CordaConfig())
    assert check(made(tmp_path, Net(rng), config, seed, prepare=with_eigens), tmp_path, initial=True)


def read_in_half(folder, init, dtype, seed, amount, *, initial=True, others=()):
    """Adapts a network in half precision; what was refused, and of each other layer (error of dW, its true dW)."""
    rng = np.random.default_rng([8, seed])
    torch.manual_seed(seed)
    net = spread(Net(rng)).to(dtype)
    save_base(folder, net)
    targets = ["up", "down", "square", *others]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=init, fan_in_fan_out=bool(others)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if init == "corda":
            config.corda_config = CordaConfig()
            with_eigens(net.float(), config)
            net.to(dtype)
        model = peft.get_peft_model(net, config)
        model.save_pretrained(folder / "initial")
        train(model, seed, amount)
        model.save_pretrained(folder / "adapter")
        base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")
        merged = model.double().merge_and_unload().state_dict()
    refused, errors = [], []
    before = open_checkpoint(folder / "initial") if initial else None
    for pair in pair_layers(base, tuned, plan_updates(tuned, before)).pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        expected = as_matrix(merged[pair.base.name], pair.layout)
        try:
            W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        except AdapterError as error:
            refused.append(str(error))
        else:
            errors.append((float((W1 - expected).norm()), float((expected - W0).norm()), float(W0.norm())))
    return refused, errors


@each_seed(range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("init", ["pissa_niter_2", "corda"])
def test_a_saved_adapter_in_half_precision_tells_large_changes(tmp_path, init, dtype, seed):
    refused, errors = read_in_half(tmp_path, init, dtype, seed, 1.0)
    assert not refused
    # The residual is rounded, too, some of it the other way.
    unit = torch.finfo(dtype).eps / 2
    assert all(error <= UNDECIDED * change + unit * size for error, change, size in errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("init", ["pissa_niter_2", "corda"])
def test_a_saved_adapter_in_half_precision_does_not_tell_small_changes(tmp_path, init, dtype):
    refused, errors = read_in_half(tmp_path, init, dtype, 1, 0.002)
    assert not errors
    assert len(refused) == 6
    assert all("rounded to" in one and '"init_lora_weights": true' in one for one in refused)
    assert not any("--initial-adapter" in one for one in refused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_can_be_computed_in_half_precision_is_not_read_from_the_saved_adapter(tmp_path, init, dtype):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    others = ["c_attn"] if init == "pissa" else []
    found = read_in_half(tmp_path / "with", init, dtype, 1, 0.02, others=others)
    assert found == read_in_half(tmp_path / "without", init, dtype, 1, 0.02, initial=False, others=others)
    assert not found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_adapter_of_a_square_conv1d_is_the_other_way_round_as_well(tmp_path, dtype):
    torch.manual_seed(0)
    net = nn.ModuleDict({"c_proj": Conv1D(12, 12)}).to(dtype)
    save_base(tmp_path, net)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, target_modules=["c_proj"], init_lora_weights="olora", fan_in_fan_out=True)
        model = peft.get_peft_model(net, config)
        model.save_pretrained(tmp_path / "initial")
        train(model, 1, 0.02)
        model.save_pretrained(tmp_path / "adapter")
    half = dtype != torch.float32
    assert check(model, tmp_path, initial=True, half=half, tolerance=1e-3 if half else 1e-6)


def test_a_tie_in_half_precision_is_settled_by_the_saved_adapter():
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    B, A = W[:, :3], torch.eye(12, dtype=torch.float64)[:3]
    saved = as_saved(B.bfloat16().double(), A, 1.0)
    assert 0 < float((B @ A - saved.B @ saved.A).norm()) <= saved.error
    assert surer(leading(W, 3), saved) is saved
    assert surer(replace(leading(W, 3), error=0.0), saved) is saved
    computed = replace(leading(W, 3), B=B, A=A, error=1e-6)
    assert surer(computed, saved) is computed


def test_a_saved_adapter_in_float32_is_exact():
    B, A = torch.randn(9, 2).double(), torch.randn(2, 7).double()
    assert as_saved(B, A, 2.0).error == 0
    for dtype in (torch.bfloat16, torch.float16):
        for size in (1.0, 1e-6):
            exact = size * B @ A
            saved = as_saved((size * B).to(dtype).double(), A.to(dtype).double(), 3.0)
            assert float((3 * exact - saved.B @ saved.A).norm()) <= saved.error


def test_olora_takes_a_square_conv1d_the_other_way_round_as_peft_does(tmp_path):
    torch.manual_seed(0)
    net = nn.ModuleDict({"c_proj": Conv1D(12, 12), "c_attn": Conv1D(20, 12)})
    save_base(tmp_path, net)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, target_modules=["c_proj"], init_lora_weights="olora", fan_in_fan_out=True)
        model = peft.get_peft_model(net, config)
        train(model, 1)
        model.save_pretrained(tmp_path / "adapter")
    (pair,) = check(model, tmp_path)
    assert pair.layout == "conv1d"


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", False])
def test_initialisations_that_leave_the_base_alone_are_plain_lora(tmp_path, init):
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=init)
    pairs = check(made(tmp_path, Net(rng), config, 7), tmp_path)
    assert {pair.update.kind for pair in pairs} == {"low_rank"}


def adapted(tmp_path, init="pissa", seed=0, trained=True, net=None, **options):
    """base, initial and adapter folders of one random network."""
    torch.manual_seed(seed)
    net = spread(Net(np.random.default_rng(seed))) if net is None else net
    save_base(tmp_path, net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 3, "target_modules": ["up", "down"], "init_lora_weights": init} | options)
        model = peft.get_peft_model(net, config)
        model.save_pretrained(tmp_path / "initial")
        if trained:
            train(model, seed)
        model.save_pretrained(tmp_path / "adapter")
    return model


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_untrained_adapter_changes_nothing(tmp_path):
    adapted(tmp_path, trained=False)
    assert {layer.status for layer in spectra.audit(tmp_path / "adapter", tmp_path / "base").layers} == {"unchanged"}


def test_the_report_says_what_was_computed(tmp_path):
    adapted(tmp_path)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base")
    assert {layer.status for layer in report.layers} == {"analysed"}
    assert all("pissa took a part out of the base weight" in " ".join(layer.notes) for layer in report.layers)
    assert all("computed from it" in " ".join(layer.notes) for layer in report.layers)


def test_equal_singular_values_are_refused_and_the_initial_adapter_settles_them(tmp_path):
    torch.manual_seed(0)
    net = Net(np.random.default_rng(0))
    with torch.no_grad():  # all singular values of up are 1
        for name, parameter in net.named_parameters():
            if name.endswith("up.weight"):
                U, _, V = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(U @ V)
    model = adapted(tmp_path, net=net)
    failed = spectra.audit(tmp_path / "adapter", tmp_path / "base").failed
    assert {layer.name for layer in failed} == {"layers.0.up", "layers.1.up"}
    for layer in failed:
        assert layer.status == "failed"
        assert layer.error is not None
        assert "nothing like" in layer.error or "singular values 3 and 4 are too close" in layer.error
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", initial_adapter=tmp_path / "initial")
    assert not report.failed
    check(model, tmp_path, initial=True)


def test_dependent_first_columns_are_refused(tmp_path):
    torch.manual_seed(0)
    net = Net(np.random.default_rng(0))
    with torch.no_grad():
        weight = net.get_parameter("layers.0.up.weight")
        weight[:, 1] = weight[:, 0]
    adapted(tmp_path, "olora", net=net)
    (layer,) = spectra.audit(tmp_path / "adapter", tmp_path / "base").failed
    assert layer.name == "layers.0.up"
    assert "first 3 columns are close to dependent" in str(layer.error)


def test_what_was_left_of_the_base_is_not_taken_for_the_base(tmp_path):
    model = adapted(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = model.unload().state_dict()
    save_file({name: value.clone() for name, value in left.items()}, tmp_path / "base" / "model.safetensors")
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base")
    assert len(report.failed) == len(report.layers)
    assert all("nothing like what their initialisation took out" in str(layer.error) for layer in report.failed)
    edit_config(tmp_path / "adapter", init_lora_weights=True)
    assert not spectra.audit(tmp_path / "adapter", tmp_path / "base").failed


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "lora_ga"])
def test_what_cannot_be_computed_is_refused_with_advice(tmp_path, init):
    adapted(tmp_path)
    edit_config(tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(UnsupportedMethodError, match=rf"'{init}'.*--initial-adapter.*\"init_lora_weights\": true"):
        spectra.audit(tmp_path / "adapter", tmp_path / "base")


def test_loftq_is_refused_with_other_advice(tmp_path):
    adapted(tmp_path)
    edit_config(tmp_path / "adapter", init_lora_weights="loftq")
    for initial in (None, tmp_path / "initial"):
        with pytest.raises(UnsupportedMethodError, match=r"LoftQ quantised the base.*as --base"):
            spectra.audit(tmp_path / "adapter", tmp_path / "base", initial_adapter=initial)


@pytest.mark.parametrize("init", ["pizza", 3, "pissa_", ["pissa"], "Corda"])
def test_an_unknown_initialisation_is_refused(tmp_path, init):
    adapted(tmp_path)
    edit_config(tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(UnsupportedMethodError, match=r"init_lora_weights = .* none that this version knows"):
        spectra.audit(tmp_path / "adapter", tmp_path / "base")


def test_an_initial_adapter_that_does_not_fit_is_refused(tmp_path):
    adapted(tmp_path, "pissa_niter_1")

    def audit(initial):
        return spectra.audit(tmp_path / "adapter", tmp_path / "base", initial_adapter=initial)

    with pytest.raises(UsageError, match="this adapter itself"):
        audit(tmp_path / "adapter")
    with pytest.raises(UsageError, match="no PEFT adapter"):
        audit(tmp_path / "base")
    tensors = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    edit_config(tmp_path / "initial", lora_alpha=9)
    with pytest.raises(AdapterError, match="scaling"):
        audit(tmp_path / "initial")
    edit_config(tmp_path / "initial", lora_alpha=8)
    some = {name: value for name, value in tensors.items() if "layers.1.up" not in name}
    save_file(some, tmp_path / "initial" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"has no LoRA of 'layers.1.up'"):
        audit(tmp_path / "initial")
    other = {name: value[:, :-1].clone() if "up.lora_A" in name else value for name, value in tensors.items()}
    save_file(other, tmp_path / "initial" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"its shape is .*, that of the trained one"):
        audit(tmp_path / "initial")


def test_an_initial_adapter_is_of_one_fine_tune(tmp_path):
    adapted(tmp_path, "pissa_niter_1")
    (tmp_path / "plain").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "plain" / file).write_bytes((tmp_path / "adapter" / file).read_bytes())
    paths, initial = [tmp_path / "adapter", tmp_path / "plain"], tmp_path / "initial"
    with pytest.raises(UsageError, match="2 need one"):
        spectra.audit_many(paths, tmp_path / "base", initial_adapter=initial)
    edit_config(tmp_path / "plain", init_lora_weights=True)
    assert len(spectra.audit_many(paths, tmp_path / "base", initial_adapter=initial)) == 2
    for call in (spectra.audit, spectra.ranks):
        with pytest.raises(UsageError, match="no fine-tune here"):
            call(tmp_path / "plain", tmp_path / "base", initial_adapter=initial)


def test_every_command_takes_the_initial_adapter(tmp_path, capsys):
    adapted(tmp_path, "pissa_niter_1")
    paths = [str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    for command in (["audit"], ["compare", "--quick"], ["ranks"], ["inspect"]):
        assert main([*command, *paths]) == 2
        assert "--initial-adapter" in capsys.readouterr().err
        assert main([*command, *paths, "--initial-adapter", str(tmp_path / "initial")]) == 0
        capsys.readouterr()
    several = ["inspect", paths[0], *paths, "--initial-adapter", str(tmp_path / "initial")]
    assert main(several) == 2
    edit_config(tmp_path / "adapter", init_lora_weights=True)
    assert main(["inspect", *paths, "--initial-adapter", str(tmp_path / "initial")]) == 2


def test_a_repair_writes_the_merged_model_and_no_adapter(tmp_path):
    adapted(tmp_path, trained=True)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=5, epsilon=0.99)
    assert report.total("all") > 0
    options: dict[str, Any] = {"scale": 0.5, "top_k": 5, "epsilon": 0.99}
    with pytest.raises(UsageError, match=r"its initialisation \(pissa\) changed the base.*--merged"):
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    found = spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "out", merged=True, **options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    for pair in pair_layers(base, tuned, plan_updates(tuned)).pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        W1 = pair.read_update(tuned, torch.float64, "cpu").tuned(W0).dense()
        U, s, V = torch.linalg.svd(W1, full_matrices=False)
        for layer in found.layers:
            if layer.name == pair.name:
                for vector in layer.vectors:
                    s[vector.index] *= 0.5
        torch.testing.assert_close(written[pair.base.name].double(), (U * s) @ V, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conversion", ["by peft", "by hand"])
def test_a_converted_adapter_gives_the_same_report(tmp_path, conversion):
    model = adapted(tmp_path)
    ours = spectra.audit(tmp_path / "adapter", tmp_path / "base", dtype="float64")
    if conversion == "by peft":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edit_config(tmp_path / "initial", init_lora_weights=True)
            initial = tmp_path / "initial"
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(initial))
    else:
        before = load_file(tmp_path / "initial" / "adapter_model.safetensors")
        after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        joined = {
            name: torch.cat([value, before[name]], 0) if "lora_A" in name else torch.cat([value, -before[name]], 1)
            for name, value in after.items()
        }
        (tmp_path / "plain").mkdir()
        save_file(joined, tmp_path / "plain" / "adapter_model.safetensors")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config |= {"r": 6, "lora_alpha": 16, "init_lora_weights": True}
        (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config))
    theirs = spectra.audit(tmp_path / "plain", tmp_path / "base", dtype="float64")
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.intruder_indices == other.intruder_indices
        for a, b in zip(mine.vectors, other.vectors, strict=True):
            assert a.sigma == pytest.approx(b.sigma, rel=1e-5)
