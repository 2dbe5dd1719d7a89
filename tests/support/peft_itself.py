"""Modules, and configs of adapters of them by the methods of peft that are read through peft itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Block(nn.Module):
    """Sides that blocks of 2, 4 and 6 divide, and no two modules of one shape."""

    def __init__(self, rng: np.random.Generator):
        super().__init__()
        a, b, c = (12 * int(x) for x in rng.choice(np.arange(1, 5), 3, replace=False))
        self.query = nn.Linear(a, b)
        self.square = nn.Linear(a, a, bias=False)
        self.down = nn.Linear(c, a)
        self.c_attn = Conv1D(a + 12 * 5, a)  # never square, so that its orientation shows
        self.words = nn.Embedding(int(rng.integers(50, 70)), a)
        self.conv1 = nn.Conv2d(a, b, 1)
        self.conv3 = nn.Conv2d(b, c, (3, 2))
        self.square_kernel = nn.Conv2d(c, a, 3, bias=False)
        self.classifier = nn.Linear(a, 3)


LINEAR = ["query", "square", "down"]


def miss(rng: np.random.Generator, seed: int) -> Any:
    kind = [True, "bat", "mini"][seed % 3]
    return peft.MissConfig(r=4, mini_r=[1, 2, 4][seed % 3], init_weights=kind, target_modules=LINEAR)


def shira(rng: np.random.Generator, seed: int) -> Any:
    return peft.ShiraConfig(
        r=int(rng.integers(1, 4)), random_seed=[None, seed][seed % 2], target_modules=LINEAR, modules_to_save=["head"]
    )


def hira(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn"], ["conv1", "conv3"], ["words", "query"]][seed % 4]
    return peft.HiraConfig(
        r=int(rng.integers(1, 9)), target_modules=targets, rank_pattern={f"layers.{seed % 2}.query": 3}
    )


def c3a(rng: np.random.Generator, seed: int) -> Any:
    return peft.C3AConfig(block_size=[2, 4, 6, 12][seed % 4], target_modules=LINEAR, block_size_pattern={"square": 3})


def fourierft(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn", "query"]][seed % 2]
    return peft.FourierFTConfig(
        n_frequency=int(rng.integers(1, 100)), scaling=float(rng.uniform(1, 200)), random_loc_seed=seed,
        target_modules=targets, n_frequency_pattern={"query": 17},
    )  # fmt: skip


def hra(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["conv1", "square_kernel"]][seed % 2]
    return peft.HRAConfig(r=2 * int(rng.integers(1, 5)), apply_GS=seed % 3 == 0, target_modules=targets)


def road(rng: np.random.Generator, seed: int) -> Any:
    return peft.RoadConfig(
        variant=["road_1", "road_2", "road_4"][seed % 3], group_size=[2, 4, 6][seed % 3], target_modules=LINEAR
    )


def gralora(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn", "query"]][seed % 2]
    return peft.GraloraConfig(
        r=[4, 8][seed % 2], hybrid_r=[0, 4][seed % 2], gralora_k=[2, 4][seed % 2], alpha=int(rng.integers(1, 30)),
        target_modules=targets,
    )  # fmt: skip


def delora(rng: np.random.Generator, seed: int) -> Any:
    return peft.DeloraConfig(
        r=int(rng.integers(1, 9)), delora_lambda=int(rng.integers(1, 30)), target_modules=LINEAR,
        rank_pattern={"square": 3}, lambda_pattern={"query": 4}, bias=["none", "all"][seed % 2],
    )  # fmt: skip


def waveft(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn", "query"]][seed % 2]
    return peft.WaveFTConfig(
        n_frequency=int(rng.integers(1, 60)), scaling=float(rng.uniform(1, 40)), random_loc_seed=seed,
        wavelet_family=["db1", "sym2", "coif1"][seed % 3], use_idwt=bool(seed % 4), target_modules=targets,
        n_frequency_pattern={"query": 17},
    )  # fmt: skip


def osf(rng: np.random.Generator, seed: int) -> Any:
    return peft.OSFConfig(effective_rank=[None, 3, 0.5][seed % 3], target_modules=LINEAR, rank_pattern={"square": 2})


def glora(rng: np.random.Generator, seed: int) -> Any:
    return peft.GloraConfig(
        r=int(rng.integers(1, 6)), config_A_B=["lora", "vector", "constant", "none"][seed % 4],
        config_C=["lora", "vector", "none"][seed % 3], config_D_E=["vector", "constant", "none"][seed // 2 % 3],
        target_modules=LINEAR,
    )  # fmt: skip


def peanut(rng: np.random.Generator, seed: int) -> Any:
    return peft.PeanutConfig(
        r=int(rng.integers(1, 9)), depth=seed % 3, act_fn=["relu", "silu", "gelu"][seed % 3],
        scaling=float(rng.uniform(0.2, 3)), target_modules=LINEAR,
    )  # fmt: skip


def supertuning(rng: np.random.Generator, seed: int) -> Any:
    return peft.SupertuningConfig(
        sparsity=[0.99, 0.9, 0.5][seed % 3], select_top=bool(seed % 2), r=[None, 3][seed // 2 % 2],
        lora_alpha=[None, 5.0][seed // 2 % 2], save_precomputed_indices=bool(seed % 5), target_modules=LINEAR,
    )  # fmt: skip


def deft(rng: np.random.Generator, seed: int) -> Any:
    targets = [LINEAR, ["c_attn", "query"]][seed % 2]
    return peft.DeftConfig(
        r=int(rng.integers(1, 9)), decomposition_method=["relu", "qr"][seed % 2], para=bool(seed // 2 % 2),
        alpha=[None, 5][seed // 3 % 2], target_modules=targets,
    )  # fmt: skip


def psoft(rng: np.random.Generator, seed: int) -> Any:
    return peft.PsoftConfig(
        r=int(rng.integers(2, 9)), psoft_alpha=int(rng.integers(1, 30)), psoft_orth=bool(seed % 3),
        ab_svd_init=["psoft_init", "pissa_init"][seed % 2], use_cayley_neumann=seed % 5 == 0, target_modules=LINEAR,
    )  # fmt: skip


def bdlora(rng: np.random.Generator, seed: int) -> Any:
    blocks = {"target_modules_bd_a": ["query"], "target_modules_bd_b": ["square"], "nblocks": [2, 3][seed % 2]}
    return peft.LoraConfig(
        r=6, lora_alpha=int(rng.integers(1, 30)), use_rslora=bool(seed % 3), target_modules=LINEAR,
        use_bdlora=peft.BdLoraConfig(match_strict=False, **blocks), alpha_pattern={"down": 3},
    )  # fmt: skip


def kasa(rng: np.random.Generator, seed: int) -> Any:
    return peft.LoraConfig(
        r=int(rng.integers(1, 9)), lora_alpha=int(rng.integers(1, 30)), kasa_config=peft.KasaConfig(),
        target_modules=LINEAR, rank_pattern={"square": 2}, modules_to_save=[None, ["head"]][seed % 2],
    )  # fmt: skip


METHODS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "MISS": miss, "SHIRA": shira, "HIRA": hira, "C3A": c3a, "FOURIERFT": fourierft, "HRA": hra, "ROAD": road,
    "GRALORA": gralora, "DELORA": delora, "WAVEFT": waveft, "OSF": osf, "GLORA": glora, "PEANUT": peanut,
    "SUPERTUNING": supertuning, "DEFT": deft, "PSOFT": psoft, "BD-LoRA": bdlora, "KaSA": kasa,
}  # fmt: skip
