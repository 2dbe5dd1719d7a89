"""PEFT's methods besides LoRA: tuned weights read from disk against peft's own merge, both in float64."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.records.report import json_schema

peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402  (after the oracles are known to be there)
from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests.adapters.peft.test_lora import DTYPES, check_against_merge, randomise, read_all, tiny_gpt2  # noqa: E402

SEEDS = range(20)


class Block(nn.Module):
    def __init__(self, rng: np.random.Generator):
        super().__init__()
        a, b = (int(x) for x in 2 * rng.integers(2, 8, size=2))
        self.query = nn.Linear(a, b)
        self.square = nn.Linear(a, a, bias=False)
        self.down = nn.Linear(3 * b, a)
        self.c_attn = Conv1D(a + 2, a)  # never square, so that its orientation shows
        self.words = nn.Embedding(int(rng.integers(20, 40)), a)
        self.conv1 = nn.Conv2d(a, b, 1)
        self.conv3 = nn.Conv2d(b, a, (3, 2))
        self.square_kernel = nn.Conv2d(b, a, 3, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.conv1d = nn.Conv1d(a, b, 3)
        self.volume = nn.Conv3d(2, 3, 2)
        self.classifier = nn.Linear(a, 3)
        self.wide = nn.Linear(48, 40)


class Net(nn.Module):
    """Two blocks of every kind of module that the methods can wrap."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        self.layers = nn.ModuleList([Block(rng), Block(rng)])
        self.head = nn.Linear(5, 4)


LINEAR = ["query", "square", "wide"]


def adalora(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn"], ["conv1", "conv3"], ["query", "c_attn", "conv3"]][seed % 4]
    return peft.AdaLoraConfig(
        init_r=int(rng.integers(1, 9)), target_r=1, lora_alpha=int(rng.integers(-1, 33)), target_modules=targets,
        total_step=10, use_rslora=bool(seed % 2), bias=["none", "all"][seed % 2],
        modules_to_save=[None, ["head"]][seed % 2],
    )  # fmt: skip


def prune(model: Any, rng: np.random.Generator) -> None:
    """What AdaLoRA does as it trains: ranks are masked, some modules lose all of them."""
    pattern = {}
    for name, parameter in model.base_model.model.named_parameters():
        if "lora_E" in name:
            kept = rng.random(parameter.shape[0]) < 0.5
            if name.startswith("layers.0"):
                kept[:] = False
            parameter.data[~torch.from_numpy(kept)] = 0
            pattern[name] = kept.tolist()
    model.peft_config["default"].rank_pattern = pattern


def vera(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn"], ["query", "down", "c_attn"], ["square", "down", "wide"]][seed % 4]
    return peft.VeraConfig(
        r=int(rng.integers(1, 20)),
        target_modules=targets,
        projection_prng_key=seed,
        bias=["none", "vera_only"][seed % 2],
    )


def ia3(rng: np.random.Generator, seed: int) -> Any:
    targets, feed_forward = [
        (["query", "down", "square"], ["down"]), (["c_attn", "classifier"], ["c_attn"]), (["c_attn", "wide"], []),
        (["conv1", "conv3", "volume"], ["conv3"]), (["conv3", "conv1", "volume"], ["conv1", "volume"]),
        (r".*\.(query|down)", r".*\.down"),
    ][seed % 6]  # fmt: skip
    return peft.IA3Config(target_modules=targets, feedforward_modules=feed_forward)


def loha(rng: np.random.Generator, seed: int) -> Any:
    targets = [
        [*LINEAR, "down"],
        ["conv1", "conv3", "conv1d"],
        ["query", "conv3"],
        ["grouped", "square_kernel", "wide"],
    ][seed % 4]
    return peft.LoHaConfig(
        r=int(rng.integers(1, 6)), alpha=int(rng.integers(-3, 20)), target_modules=targets,
        use_effective_conv2d=bool(seed % 3), **patterns(rng, seed, "query", "conv3"),
    )  # fmt: skip


def lokr(rng: np.random.Generator, seed: int) -> Any:
    targets = [
        [*LINEAR, "down"],
        ["conv1", "conv3", "conv1d"],
        ["query", "conv3"],
        ["grouped", "square_kernel", "wide"],
    ][seed % 4]
    # With r = 1 and a core, peft's own torch.kron fails.
    return peft.LoKrConfig(
        r=int(rng.integers(2, 6)), alpha=int(rng.integers(-3, 20)), target_modules=targets,
        use_effective_conv2d=bool(seed % 3), decompose_both=bool(seed % 2), decompose_factor=[-1, 2, 4][seed % 3],
        **patterns(rng, seed, "query", "conv3"),
    )  # fmt: skip


def patterns(rng: np.random.Generator, seed: int, *names: str) -> dict[str, dict[str, float]]:
    if seed % 5 < 2:
        return {}
    return {
        "rank_pattern": {f"layers.{seed % 2}.{name}": int(rng.integers(2, 5)) for name in names},
        "alpha_pattern": {f".*1.{name}": float(rng.uniform(0.5, 9)) for name in names},
    }


def oft(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["query", "words", "down"], ["conv1", "square_kernel"], ["words", "square_kernel", "wide"]][
        seed % 4
    ]
    size = {"oft_block_size": int(rng.integers(1, 9)), "r": 0}
    if seed % 3 == 2:
        size = {"oft_block_size": 0, "r": int(rng.integers(1, 9))}
    return peft.OFTConfig(
        target_modules=targets, coft=bool(seed % 2), eps=float(rng.uniform(1e-5, 3)), block_share=seed % 7 == 3,
        use_cayley_neumann=bool(seed % 5), num_cayley_neumann_terms=int(rng.integers(1, 8)), **size,
    )  # fmt: skip


def boft(rng: np.random.Generator, seed: int) -> Any:
    size, count = [(2, 0), (0, 2), (4, 0), (0, 4), (0, 8), (6, 0)][seed % 6]
    whole = count == 2 or size == 2  # which divides every module's features
    targets = ["query", "square", "down", "square_kernel"] if whole else ["wide"]
    most = {2: 2, 4: 3, 0: 1 + int(np.log2(count or 1)), 6: 2}[size]
    return peft.BOFTConfig(
        boft_block_size=size, boft_block_num=count, target_modules=targets, bias=["none", "boft_only"][seed % 2],
        boft_n_butterfly_factor=1 if whole else int(rng.integers(1, most + 1)),
    )  # fmt: skip


class BlockDiagonal:
    """What peft's CUDA extension for BOFT does; without one it takes a single factor."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.stack([torch.block_diag(*factor) for factor in blocks]),)


@pytest.fixture(autouse=True)
def every_factor_of_boft(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)


METHODS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "adalora": adalora, "vera": vera, "ia3": ia3, "loha": loha, "lokr": lokr, "oft": oft,
    "boft": boft,
}  # fmt: skip


def write(tmp_path, method: str, seed: int, change: Callable[[Any], None] | None = None) -> Any:
    """A base and an adapter of it, random in every parameter; the model that peft has of them."""
    rng = np.random.default_rng([zlib.crc32(method.encode()), seed])
    torch.manual_seed(seed)
    net = Net(rng).to(DTYPES[seed % len(DTYPES)])
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what is asked of it
        model = peft.get_peft_model(net, METHODS[method](rng, seed))
        randomise(model, seed)
        for name, parameter in model.named_parameters():
            if (
                "ranknum" in name
            ):  # in half precision peft leaves it trainable; it is not stored, and init_r when loaded
                parameter.data.fill_(model.peft_config["default"].init_r)
        if method == "adalora" and seed % 3:
            prune(model, rng)
        model.save_pretrained(tmp_path / "adapter")
    return model


def all_accounted_for(folder) -> None:
    checkpoint = open_checkpoint(folder)
    plan = plan_updates(checkpoint)
    named = {name for update in plan.updates for name in update.tensors} | {item.name for item in plan.skipped}
    assert named == set(checkpoint.tensors)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_merge(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    all_accounted_for(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("method", ["adalora", "vera", "ia3 rows", "ia3 columns"])
def test_gpt2_with_its_square_transposed_weights(tmp_path, method):
    torch.manual_seed(0)
    net = tiny_gpt2()
    net.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    config = {
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_modules=targets, total_step=10),
        "vera": lambda: peft.VeraConfig(r=5, target_modules=targets),
        "ia3 rows": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "ia3 columns": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=targets),
    }[method]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        randomise(model, 1)
        model.save_pretrained(tmp_path / "adapter")
        found, _ = read_all(tmp_path / "base", tmp_path / "adapter")
        merged = model.double().merge_and_unload().transformer.state_dict()
    assert len(found) == 2 * 4
    for name, (W1, layout) in found.items():
        assert layout == "conv1d"
        expected = merged[name.removeprefix("transformer.")].T
        assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected), name


@pytest.mark.parametrize("method", METHODS)
def test_every_engine_and_every_form_of_output(tmp_path, method):
    write(tmp_path, method, 4)  # where AdaLoRA has modules of rank 0
    reports = [
        spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4, engine=engine)
        for engine in ("exact", "cached", "krylov")
    ]
    counts = [[(layer.status, layer.intruders) for layer in report.layers] for report in reports]
    assert counts[0] == counts[1] == counts[2]
    assert {status for status, _ in counts[0]} <= {"analysed", "unchanged"}
    assert reports[0].tuned["format"] == f"peft-{method}"
    jsonschema.validate(json.loads(reports[0].to_json()), json_schema())
    kinds = {layer.update["kind"] for layer in reports[0].layers}
    expected = {"ia3": "scaled", "loha": "hadamard", "lokr": "kronecker", "oft": "rotated", "boft": "rotated"}
    assert kinds - {"dense"} == {expected.get(method, "low_rank")}


@pytest.mark.parametrize("seed", [seed for seed in SEEDS if DTYPES[seed % 4] in (torch.float32, torch.float64)])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_copy_is_the_merge_and_no_adapter_is_written(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    with pytest.raises(UsageError, match=r"mitigate writes LoRA and DoRA.*--merged"):
        spectra.mitigate(tmp_path / "adapter", tmp_path / "new", tmp_path / "base", scale=1.0)
    assert not (tmp_path / "new").exists()
    spectra.mitigate(tmp_path / "adapter", tmp_path / "new", tmp_path / "base", scale=1.0, merged=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.double().merge_and_unload().state_dict()
    assert expected.keys() == written.keys()
    for name, value in expected.items():
        assert torch.linalg.norm(written[name].double() - value) <= 1e-6 * torch.linalg.norm(value), name
    assert spectra.verify_mitigation(tmp_path / "new").holds


def test_what_oft_does_is_on_the_right(tmp_path):
    write(tmp_path, "oft", 0)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4)
    assert all("--side right" in layer.notes[0] for layer in report.layers)


def edited(
    folder, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Any]], None] | None = None
) -> None:
    if config is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        file = folder / "adapter_model.safetensors"
        values = load_file(file)
        tensors(values)
        save_file(values, file)


def resized(end: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        name = next(name for name in values if name.endswith(end))
        values[name] = torch.ones(shape)

    return change


def without(end: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values.pop(next(name for name in values if name.endswith(end)))

    return change


def with_another(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({f"base_model.model.layers.0.query.{name}": torch.ones(2, 2)})


BROKEN: list[tuple[str, dict[str, Any] | None, Callable[[dict[str, Any]], None] | None, type[Exception], str]] = [
    ("adalora", {"init_r": 77}, None, AdapterError, "r = 77"),
    ("adalora", {"rank_pattern": {"layers.0.query.lora_E": [True, "x"]}}, None, AdapterError, "booleans"),
    ("adalora", {"rank_pattern": [1]}, None, AdapterError, "not an object"),
    ("adalora", {"use_dora": True}, None, UnsupportedMethodError, "use_dora"),
    ("adalora", {"init_lora_weights": "pissa"}, None, UnsupportedMethodError, "pissa"),
    ("adalora", {"target_parameters": ["experts"]}, None, UnsupportedMethodError, "target_parameters"),
    ("adalora", None, without("query.lora_E"), AdapterError, "lora_E is missing"),
    ("adalora", None, resized("query.lora_E", 1, 1, 1), AdapterError, "query.lora_E.*dimensions"),
    ("adalora", None, with_another("hada_w1_a"), UnsupportedMethodError, "hada_w1_a.*LoHa"),
    ("vera", {"r": 21}, None, AdapterError, "r = 21"),
    ("vera", None, without("vera_B"), AdapterError, "vera_B is missing"),
    ("vera", None, resized("vera_B", 1, 15), AdapterError, "vera_B"),
    ("ia3", {"feedforward_modules": ["query", "down"]}, None, AdapterError, "query.ia3_l.*is one"),
    ("ia3", {"feedforward_modules": [3]}, None, AdapterError, "expected names"),
    ("ia3", None, resized("query.ia3_l", 2, 2), AdapterError, "one row or one column"),
    ("ia3", None, resized("query.ia3_l", 99, 1), WrongBaseError, "query.ia3_l.*wrong base"),
    ("loha", {"r": 9}, None, AdapterError, "r = 9"),
    ("loha", {"alpha": "high"}, None, AdapterError, "alpha.*expected a number"),
    ("loha", {"sparkle": 1}, None, UnsupportedMethodError, "sparkle"),
    ("loha", None, without("query.hada_w2_a"), AdapterError, "hada_w2_a is missing"),
    ("lokr", {"rank_pattern": {"query": 0.5}}, None, AdapterError, r"r = 0\.5"),
    ("lokr", None, without("query.lokr_w1"), AdapterError, "lokr_w1_a is missing"),
    ("lokr", None, with_another("lokr_w1_a"), AdapterError, "both lokr_w1 and lokr_w1_a"),
    ("lokr", None, resized("query.lokr_w1", 17, 19), WrongBaseError, "query.lokr_w1.*wrong base"),
    ("oft", {"peft_version": "0.17.1"}, None, UnsupportedMethodError, "before 0.18"),
    ("oft", {"oft_block_size": 0}, None, AdapterError, "one of r and oft_block_size"),
    ("oft", {"num_cayley_neumann_terms": 10**9}, None, AdapterError, "num_cayley_neumann_terms"),
    ("oft", {"block_share": True}, None, AdapterError, "block_share"),
    ("oft", None, resized("query.oft_R.weight", 3, 4), AdapterError, "query.oft_R.weight.*blocks of size b"),
    ("oft", None, with_another("oft_embedding_R.weight"), AdapterError, "both oft_R and oft_embedding_R"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "config", "tensors", "error", "words"), BROKEN)
def test_contradictions_are_named(tmp_path, method, config, tensors, error, words):
    write(tmp_path, method, 4 if method == "oft" else 0)
    edited(tmp_path / "adapter", config, tensors)
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tmp_path / "adapter", tmp_path / "base")
    assert "adapter" in str(caught.value)
