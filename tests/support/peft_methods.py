"""Small models, and adapters of them by each of peft's methods besides LoRA that are read."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from tests.support import peft_itself as itself
from tests.support.peft_models import DTYPES, randomise

peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402


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

    def __init__(self, block: Callable[[np.random.Generator], nn.Module], rng: np.random.Generator):
        super().__init__()
        self.layers = nn.ModuleList([block(rng), block(rng)])
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


METHODS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "adalora": adalora, "vera": vera, "ia3": ia3, "loha": loha, "lokr": lokr, "oft": oft,
    "boft": boft,
}  # fmt: skip
EVERY = (*METHODS, *itself.METHODS)


def write(tmp_path, method: str, seed: int) -> Any:
    """A base and an adapter of it, random in every parameter; the model that peft has of them."""
    rng = np.random.default_rng([zlib.crc32(method.encode()), seed])
    torch.manual_seed(seed)
    block, config = (Block, METHODS[method]) if method in METHODS else (itself.Block, itself.METHODS[method])
    dtype = DTYPES[seed % len(DTYPES)]
    if method == "PSOFT" and dtype == torch.float64:  # which it does not take
        dtype = torch.float32
    net = Net(block, rng).to(dtype)
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on what is asked of it
        model = peft.get_peft_model(net, config(rng, seed))
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
