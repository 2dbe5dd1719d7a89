"""LyCORIS and the OFT of sd-scripts: tuned weights read from disk against what lycoris itself applies, in float64."""

from __future__ import annotations

import json
import math
from typing import Any
from unittest import mock

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError, SpectraError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.records.report import json_schema
from tests.support.dialects import draw, write
from tests.support.seeds import each_seed

lycoris = pytest.importorskip("lycoris")
from lycoris import modules as written  # noqa: E402  (after the oracle is known to be there)
from lycoris.wrapper import LycorisNetwork  # noqa: E402

SEEDS = range(20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block(nn.Module):
    def __init__(self, rng: np.random.Generator):
        super().__init__()
        a, b = (4 * int(x) for x in rng.choice(np.arange(2, 8), size=2, replace=False))
        self.to_q = nn.Linear(a, b)
        self.square = nn.Linear(a, a, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(b, a)])
        self.proj_in = nn.Conv2d(a, b, 1)
        self.conv1 = nn.Conv2d(b, a, 3)
        self.conv_in = nn.Conv2d(4, b, (3, 2), bias=False)
        self.signal = nn.Conv1d(a, 8, 3)
        self.volume = nn.Conv3d(4, 6, 2)
        self.wide = nn.Linear(48, 40)
        self.norm = nn.LayerNorm(a)


class Net(nn.Module):
    def __init__(self, rng: np.random.Generator, dtype: torch.dtype):
        super().__init__()
        self.blocks = nn.ModuleList([Block(rng), Block(rng)])
        self.head = nn.Linear(20, 12)
        for parameter in self.parameters():
            parameter.data = draw(rng, *parameter.shape, dtype=dtype)


def wrapped(net: nn.Module) -> dict[str, Any]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def store(rng: np.random.Generator, module: Any) -> dict[str, torch.Tensor]:
    """The module's state as its writer saves it, in a dtype drawn at random, from random parameters; and loads it."""
    for name, parameter in module.named_parameters():
        spread = 0.3 if name == "oft_blocks" else 1.0
        parameter.data = draw(rng, *parameter.shape, dtype=torch.float64) * spread
        if name in ("rescale", "dora_scale"):
            parameter.data = parameter.data.abs() + 0.1
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    state = {name: value.detach().to(dtype) for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():  # what was rounded in storing, the scalar already in it
        if name in state:
            parameter.data = state[name].double()
    if isinstance(getattr(module, "scalar", None), nn.Parameter):
        module.scalar.data = torch.ones((), dtype=torch.float64)
    if hasattr(module, "constraint"):
        module.constraint = float(state["alpha"]) * module.dim
    elif hasattr(module, "scale"):
        module.scale = float(state["alpha"]) / module.lora_dim
    return state


def store_difference(rng: np.random.Generator, module: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The same for whole differences, which are taken once the module stands in its host's place."""
    module.apply_to()
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            parameter.data += draw(rng, *parameter.shape).to(parameter.dtype)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.restore()
    again = type(module)(module.lora_name, module.org_module[0])
    again.load_state_dict(dict(state))
    return state, again


def applied(module: Any) -> torch.Tensor:
    """The weight with which a module of lycoris computes, in float64."""
    module.double().eval()
    host = module.org_module[0]
    base = host.weight.data
    host.weight.data = base.double()
    seen = []

    def op(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any) -> torch.Tensor:
        seen.append(weight)
        return torch.zeros((), dtype=torch.float64)

    module.op, module.org_forward = op, lambda x: torch.zeros((), dtype=torch.float64)
    eye = torch.eye

    def wide(*sizes: Any, **options: Any) -> torch.Tensor:
        return eye(*sizes, **options).double()

    # It inverts in float32 whatever the parameters' dtype is; the oracle is to be exact.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch.object(torch, "eye", wide):
        module(torch.zeros(1, dtype=torch.float64))
    tuned = host.weight.data + seen[0]
    host.weight.data = base
    detached: torch.Tensor = tuned.detach()
    return detached


def check(base: Any, tuned: Any, expected: dict[str, torch.Tensor], kinds: set[str]) -> Any:
    """Every weight of ``expected`` (module → W1), and no other, is read with 1e-6 relative error."""
    opened, checkpoint = open_checkpoint(base), open_checkpoint(tuned)
    plan = plan_updates(checkpoint)
    used = [name for update in plan.updates for name in update.tensors] + [item.name for item in plan.skipped]
    assert sorted(used) == sorted(checkpoint.tensors), "a tensor is not accounted for, or is twice"
    pairing = pair_layers(opened, checkpoint, plan)
    assert {pair.name for pair in pairing.pairs} == set(expected)
    for pair in pairing.pairs:
        W0 = pair.read_base(opened, torch.float64, "cpu")
        update = pair.read_update(checkpoint, torch.float64, "cpu").tuned(W0)
        wanted = as_matrix(expected[pair.name], pair.layout)
        assert torch.linalg.norm(update.dense() - wanted) <= 1e-6 * torch.linalg.norm(wanted), pair.name
        torch.testing.assert_close(update.delta(), wanted - W0, rtol=1e-6, atol=1e-9 * float(wanted.norm()))
        assert pair.update.shape in (None, pair.shape)
        assert pair.update.kind in kinds
    return plan


ALGORITHMS: dict[str, tuple[type, set[str]]] = {
    "locon": (written.LoConModule, {"low_rank", "row_scaled", "column_scaled"}),
    "loha": (written.LohaModule, {"hadamard"}),
    "lokr": (written.LokrModule, {"kronecker"}),
    "ia3": (written.IA3Module, {"scaled"}),
    "full": (written.FullModule, {"added"}),
    "diag-oft": (written.DiagOFTModule, {"rotated"}),
    "boft": (written.ButterflyOFTModule, {"rotated"}),
    "glora": (written.GLoRAModule, {"mixed"}),
}


def options(rng: np.random.Generator, algorithm: str, seed: int) -> dict[str, Any]:
    rank = int(rng.integers(1, 6))
    common = {"lora_dim": rank, "alpha": [0.5, 3.0, rank, 0, 7.25][seed % 5], "use_tucker": seed % 3 == 1}
    if algorithm in ("locon", "loha", "lokr"):
        common |= {"use_scalar": seed % 2 == 1, "rs_lora": seed % 4 == 3}
        common |= {"weight_decompose": seed % 5 > 2, "wd_on_out": bool(seed // 5 % 2)}
    if algorithm == "lokr":
        common |= {"factor": [-1, 2, 4][seed % 3], "decompose_both": seed % 2 == 0}
        common |= {"full_matrix": seed % 7 == 6, "unbalanced_factorization": seed % 6 == 5}
    if algorithm == "ia3":
        common |= {"train_on_input": bool(seed % 2)}
    if algorithm in ("diag-oft", "boft"):
        common = {
            "lora_dim": [2, 4, 8][seed % 3],
            "constraint": [0, 0.01, 0.5][seed // 3 % 3],
            "rescaled": seed % 2 == 1,
        }
    return common


NAMES = ("lycoris", "lora_unet", "lora_te2", "diffusion_model.", "transformer.", "")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_seed(SEEDS)
def test_lycoris(tmp_path, algorithm, seed):
    rng = np.random.default_rng([seed, len(algorithm)])
    torch.manual_seed(seed)
    net = Net(rng, DTYPES[seed % 4])
    prefix = NAMES[seed % {"glora": 3, "full": 4}.get(algorithm, 6)]
    keys: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    kind, kinds = ALGORITHMS[algorithm]
    for name, host in wrapped(net).items():
        if algorithm == "boft" and not feasible(host.weight.shape[0], options(rng, algorithm, seed)["lora_dim"]):
            continue
        called = prefix + name if prefix.endswith(".") or not prefix else f"{prefix}_{name.replace('.', '_')}"
        given = options(rng, algorithm, seed)
        module = kind(called.replace(".", "_"), host, **given)
        if algorithm == "full":
            state, module = store_difference(rng, module)
        else:
            state = store(rng, module)
            if algorithm == "lokr" and module.use_w1 and module.use_w2:
                module.scale = 1.0  # what rsLoRA would make of it is not in the file
        keys |= {f"{called}.{tail}": value for tail, value in state.items()}
        expected[name] = applied(module)
    assert expected
    base = write(tmp_path / "base", {name: value.data for name, value in net.named_parameters()})
    lora = write(tmp_path / "lora", keys)
    plan = check(base, lora, expected, kinds)
    vectors = {key for key in keys if key.endswith("diff_b")}
    assert {item.name for item in plan.skipped} == vectors


def feasible(outputs: int, factor: int) -> bool:
    try:
        return written.boft.butterfly_factor(outputs, factor) is not None
    except (ValueError, TypeError):
        return False


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "full", "ia3", "diag-oft", "glora"])
def test_networks_of_lycoris_as_they_save_themselves(tmp_path, rng, algorithm):
    torch.manual_seed(3)
    net = Net(rng, torch.float32)
    LycorisNetwork.apply_preset({"target_module": ["Block", "Linear"], "target_name": [], "enable_conv": True})
    network = lycoris.create_lycoris(
        net, 1.0, linear_dim=4, linear_alpha=2, conv_dim=2, conv_alpha=1, algo=algorithm, train_norm=True
    )
    network.apply_to()
    for parameter in network.parameters():
        parameter.data += 0.1 * draw(rng, *parameter.shape)
    (tmp_path / "lora").mkdir()
    network.save_weights(tmp_path / "lora" / "mine.safetensors", torch.float32, {"ss_network_module": "lycoris.kohya"})
    network.restore()
    base = write(tmp_path / "base", {name: value.data for name, value in net.named_parameters()})
    state = load_file(tmp_path / "lora" / "mine.safetensors")
    modules = {module.lora_name: module for module in network.loras if not isinstance(module, written.NormModule)}
    called = {f"lycoris_{name.replace('.', '_')}": name for name in wrapped(net)}
    expected = {}
    for name, module in modules.items():
        if algorithm == "full":
            again = type(module)(name, module.org_module[0])
            again.load_state_dict(
                {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            )
            module = again
        expected[called[name]] = applied(module)
    assert len(expected) > 10
    plan = check(base, tmp_path / "lora" / "mine.safetensors", expected, ALGORITHMS[algorithm][1])
    assert {key for key in state if "norm" in key.rpartition(".")[2]} <= {item.name for item in plan.skipped}


# The OFT of sd-scripts, which cannot be installed: its formulas once more, module by module.


def sd_scripts_oft(W: torch.Tensor, parts: list[torch.Tensor], alpha: float) -> torch.Tensor:
    rows = []
    start = 0
    for blocks in parts:
        count, size, _ = blocks.shape
        Q = blocks.double() - blocks.double().transpose(1, 2)
        norm = math.sqrt(float((Q * Q).sum()))
        Q = Q * (min(norm, alpha * count * size) + 1e-8) / (norm + 1e-8)
        for block in Q:
            one = torch.eye(size, dtype=torch.float64)
            R = (one + block) @ torch.linalg.inv(one - block)
            rows.append(R.T @ W[start : start + size].double().flatten(1))
            start += size
    return torch.cat(rows).reshape(W.shape)


@each_seed(SEEDS)
def test_oft_of_sd_scripts(tmp_path, seed):
    rng = np.random.default_rng(seed)
    net = Net(rng, DTYPES[seed % 4])
    keys: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, host in wrapped(net).items():
        outputs = host.weight.shape[0]
        split = seed % 3 == 2 and outputs % 4 == 0
        count = 2
        sizes = [outputs // 4] * 2 + [outputs // 2] if split else [outputs]
        parts = [
            0.3 * draw(rng, count, size // count, size // count, dtype=DTYPES[(seed + 1) % 4])
            for size in sizes
            if size >= 2
        ]
        if sum(part.shape[0] * part.shape[1] for part in parts) != outputs:
            continue
        alpha = torch.tensor([0.01, 1e-3, 0.0, 5.0][seed % 4])
        called = f"oft_unet_{name.replace('.', '_')}"
        keys |= {f"{called}.oft_blocks" + (f".{i}" if split else ""): part for i, part in enumerate(parts)}
        keys[f"{called}.alpha"] = alpha
        expected[name] = sd_scripts_oft(host.weight.data, parts, float(alpha))
    assert expected
    check(
        write(tmp_path / "base", {name: value.data for name, value in net.named_parameters()}),
        write(tmp_path / "lora", keys), expected, {"rotated"},
    )  # fmt: skip


def test_oft_of_early_lycoris_stores_its_rotations(tmp_path, rng):
    W, R = draw(rng, 6, 5), draw(rng, 2, 3, 3)
    write(tmp_path / "lora", {"lycoris_a_b.oft_diag": R})
    wanted = torch.cat([R[k].double().T @ W[3 * k : 3 * k + 3].double() for k in range(2)])
    check(write(tmp_path / "base", {"a.b.weight": W}), tmp_path / "lora", {"a.b": wanted}, {"rotated"})


# What cannot be read


def one(algorithm="loha", module="lycoris_a_b"):
    ones = torch.ones
    factors: dict[str, dict[str, torch.Tensor]] = {
        "locon": {"lora_up.weight": ones(6, 2), "lora_down.weight": ones(2, 4), "dora_scale": ones(6, 1)},
        "loha": {f"hada_w{n}_{x}": ones(6, 2) if x == "a" else ones(2, 4) for n in "12" for x in "ab"},
        "lokr": {"lokr_w1": ones(2, 2), "lokr_w2_a": ones(3, 1), "lokr_w2_b": ones(1, 2)},
        "oft": {"oft_blocks": ones(2, 3, 3), "rescale": ones(6, 1)},
        "boft": {"oft_blocks": ones(1, 3, 2, 2)},
        "ia3": {"weight": ones(6), "on_input": torch.tensor(0)},
        "glora": {"a1.weight": ones(4, 2), "a2.weight": ones(2, 4), "b1.weight": ones(6, 2), "b2.weight": ones(2, 4)},
        "full": {"diff": ones(6, 4)},
    }
    return {f"{module}.{factor}": value for factor, value in factors[algorithm].items()}


ONE = torch.ones(())
BROKEN: dict[str, tuple[str, dict[str, torch.Tensor | None], type[SpectraError], str]] = {
    "a partner is missing": ("loha", {"hada_w2_b": None}, AdapterError, "partner lycoris_a_b.hada_w2_b is missing"),
    "a core is missing": ("loha", {"hada_t1": torch.ones(2, 2, 3, 3)}, AdapterError, "hada_t2 is missing"),
    "ranks differ": ("loha", {"hada_w1_b": torch.ones(3, 4)}, AdapterError, "has rank 3"),
    "halves differ": ("loha", {"hada_w2_a": torch.ones(5, 2)}, AdapterError, r"product is \[5, 4\]"),
    "a core does not fit": (
        "loha", {"hada_t1": torch.ones(3, 2, 3, 3), "hada_t2": torch.ones(2, 2, 3, 3)}, AdapterError, "must be 2",
    ),
    "a core is flat": ("lokr", {"lokr_t2": torch.ones(1, 1)}, AdapterError, r"expected \(1, 1, …\)"),
    "whole and in factors": ("lokr", {"lokr_w2": torch.ones(3, 2)}, AdapterError, "both lokr_w2 and lokr_w2_a"),
    "a whole vector": ("lokr", {"lokr_w1": torch.ones(2)}, AdapterError, "expected a matrix"),
    "two methods": ("lokr", {"hada_w1_a": torch.ones(2, 2)}, UnsupportedMethodError, "beside LoHa.*lokr_w1"),
    "integers": ("loha", {"hada_w1_a": torch.ones(6, 2, dtype=torch.int8)}, AdapterError, "floating dtype"),
    "a scalar": ("loha", {"scalar": ONE}, UnsupportedMethodError, "cannot read scalar"),
    "alpha is text": ("loha", {"alpha": torch.ones(1, dtype=torch.uint8)}, AdapterError, "expected one number"),
    "blocks are not square": ("oft", {"oft_blocks": torch.ones(2, 3, 2)}, AdapterError, "square blocks"),
    "blocks are a matrix": ("oft", {"oft_blocks": torch.ones(2, 3)}, AdapterError, "3 or 4 dimensions"),
    "rescale of blocks": ("oft", {"rescale": torch.ones(2, 3, 1)}, UnsupportedMethodError, "one value per output"),
    "too many stages": ("boft", {"oft_blocks": torch.ones(3, 3, 2, 2)}, AdapterError, "3 stages of blocks of 2"),
    "a part is missing": ("boft", {"oft_blocks": None, "oft_blocks.0": torch.ones(1, 3, 3),
                          "oft_blocks.2": torch.ones(1, 3, 3)}, AdapterError, "expected oft_blocks.0 to .1"),
    "on_input is 2": ("ia3", {"on_input": torch.tensor(2)}, AdapterError, "expected 0 or 1"),
    "no on_input": ("ia3", {"on_input": None}, AdapterError, "partner .*on_input is missing"),
    "a matrix of scales": ("ia3", {"weight": torch.ones(6, 4)}, AdapterError, "one row or column"),
    "half of GLoRA": ("glora", {"a2.weight": None}, AdapterError, "a2.weight is missing"),
    "GLoRA's ranks": ("glora", {"a1.weight": torch.ones(4, 3)}, AdapterError, "has rank 2"),
    "T-LoRA beside LoHa": ("loha", {"lambda_layer": torch.ones(1, 2)}, UnsupportedMethodError, "read lambda_layer"),
    "T-LoRA": (
        "full", {"diff": None, "q_layer.weight": torch.ones(2, 4), "lambda_layer": torch.ones(1, 2), "alpha": ONE},
        UnsupportedMethodError, "this is T-LoRA",
    ),
    "DoRA alone": ("locon", {"lora_up.weight": None, "lora_down.weight": None}, AdapterError, "lora_up is missing"),
    "DoRA of OFT": ("oft", {"dora_scale": torch.ones(6, 1)}, UnsupportedMethodError, "beside OFT"),
    "DoRA as a vector": ("locon", {"dora_scale": torch.ones(6)}, UnsupportedMethodError, "rows .* or of its columns"),
    "DoRA as a number": ("locon", {"dora_scale": ONE}, UnsupportedMethodError, "does not say which"),
    "DoRA as a matrix": ("locon", {"dora_scale": torch.ones(6, 4)}, UnsupportedMethodError, "does not say which"),
    "DoRA as one value": ("locon", {"dora_scale": torch.ones(1, 1)}, UnsupportedMethodError, "does not say which"),
    "DoRA of another size": ("locon", {"dora_scale": torch.ones(5, 1)}, WrongBaseError, "wrong base"),
    "another shape": ("full", {"diff": torch.ones(4, 6)}, WrongBaseError, "wrong base"),
    "another size": ("oft", {"oft_blocks": torch.ones(3, 3, 3), "rescale": None}, WrongBaseError, "wrong base"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path, kind):
    algorithm, changes, error, words = BROKEN[kind]
    keys = one(algorithm) | {f"lycoris_a_b.{factor}": value for factor, value in changes.items()}
    write(tmp_path / "lora", {key: value for key, value in keys.items() if value is not None})
    base = write(tmp_path / "base", {"a.b.weight": torch.ones(6, 4)})
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tmp_path / "lora", base)
    assert "model.safetensors" in str(caught.value)
    assert "lycoris_a_b" in str(caught.value)


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "oft", "boft", "ia3", "glora", "full"])
def test_reports(tmp_path, rng, algorithm):
    keys = {key: value if value.ndim == 0 else draw(rng, *value.shape) for key, value in one(algorithm).items()}
    write(tmp_path / "lora", keys | {"lycoris_a_b.diff_b": torch.ones(6)})
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 4)})
    report = spectra.audit(tmp_path / "lora", base)
    jsonschema.validate(json.loads(report.to_json()), json_schema())
    assert report.tuned["format"] == "lycoris"
    assert [item["name"] for item in report.skipped] == ["lycoris_a_b.diff_b"]
    assert report.layers[0].status == "analysed"
    with pytest.raises(UsageError, match="merged"):
        spectra.repair(tmp_path / "lora", base, to=tmp_path / "out", scale=0.5)
    write(tmp_path / "lora", keys)
    spectra.repair(tmp_path / "lora", base, to=tmp_path / "merged", scale=0.5, merged=True)


def test_dora_by_either_side_is_told_by_its_shape(tmp_path, rng):
    W, up, down = draw(rng, 5, 5), draw(rng, 5, 2), draw(rng, 2, 5)  # square: the weight does not tell, the shape does
    base = write(tmp_path / "base", {"a.b.weight": W})
    tuned = W.double() + up.double() @ down.double()
    scale = draw(rng, 5).abs()
    keys = {"lycoris_a_b.lora_up.weight": up, "lycoris_a_b.lora_down.weight": down}
    rows = scale.double()[:, None] * tuned / tuned.norm(dim=1, keepdim=True)
    columns = scale.double() * tuned / tuned.norm(dim=0)
    for shape, wanted, kind in (((5, 1), rows, "row_scaled"), ((1, 5), columns, "column_scaled")):
        write(tmp_path / "lora", keys | {"lycoris_a_b.dora_scale": scale.reshape(shape)})
        check(base, tmp_path / "lora", {"a.b": wanted}, {kind})
        (layer,) = spectra.audit(tmp_path / "lora", base).layers
        assert f"norms of the {kind.partition('_')[0]}s of W0 + dW" in str(layer.notes)


def test_methods_of_peft_without_their_config_stay_unread(tmp_path):
    write(tmp_path / "lora", {f"base_model.model.{key}": value for key, value in one("loha", "a.b").items()})
    base = write(tmp_path / "base", {"a.b.weight": torch.ones(6, 4)})
    with pytest.raises(UnsupportedMethodError, match="LoHa without its adapter_config"):
        spectra.audit(tmp_path / "lora", base)
