"""Bases and fine-tunes of any size, the same for every method and every run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectra.updates.algebra import Dense, LowRank, RowScaled, Update

KINDS = ("lora", "dense", "dora")
ENTRY = 0.02  # the size of a weight's entries, about that of a trained model
SPREAD = 0.3  # σ of the lognormal scales of rows and columns
OUTLIERS = (12.0, 3.0, 12)  # from, to (in units of a noise matrix's √n·entry), how many


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def prescribed_base(m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) with prescribed singular values: 8 outliers on a falling bulk."""
    generator, p = seeded(seed), min(m, n)
    U, V = torch.linalg.qr(normal(generator, m, p)).Q, torch.linalg.qr(normal(generator, n, p)).Q
    s = torch.linspace(1, 0.05, p) ** 1.5
    s[:8] += torch.linspace(4, 0.5, min(8, p))
    W: Tensor = U * s @ V.T
    return W


def scaled_base(m: int, n: int, generator: torch.Generator) -> Tensor:
    """(m, n) like a trained weight's without any decomposition of its size: heavy-tailed noise and outliers."""
    top, last, count = OUTLIERS
    W = normal(generator, m, n)
    W *= (SPREAD * normal(generator, m, 1)).exp_()
    W *= (SPREAD * normal(generator, 1, n)).exp_()
    U, V = torch.linalg.qr(normal(generator, m, count)).Q, torch.linalg.qr(normal(generator, n, count)).Q
    values = torch.logspace(torch.tensor(top).log10(), torch.tensor(last).log10(), count) * max(m, n) ** 0.5
    return W.addmm_(U * values, V.T).mul_(ENTRY)


def factors(m: int, n: int, rank: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, A) with singular values of B·A that fall from about ``strength`` to a tenth of it."""
    falling = torch.linspace(1, 0.1, rank) * strength
    return normal(generator, m, rank) * falling / m**0.5, normal(generator, rank, n) / n**0.5


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight W0 (m, n) and a fine-tune of it, as it would be stored: float32.

    ``kind`` "lora" has B and A, "dora" a magnitude besides, "dense" the whole tuned weight.
    """

    kind: str
    W0: Tensor
    B: Tensor | None = None
    A: Tensor | None = None
    magnitude: Tensor | None = None
    W1: Tensor | None = None

    @property
    def update(self) -> Update:
        if self.W1 is not None:
            return Dense(self.W1)
        assert self.B is not None
        assert self.A is not None
        if self.magnitude is not None:
            return RowScaled(self.B, self.A, 1.0, self.magnitude)
        return LowRank(self.B, self.A, 1.0)

    def merged(self) -> Tensor:
        """The tuned weight in float32, as anyone without this package would form it."""
        if self.W1 is not None:
            return self.W1
        assert self.B is not None
        assert self.A is not None
        plain = self.W0 + self.B @ self.A
        if self.magnitude is None:
            return plain
        scaled: Tensor = plain * (self.magnitude / plain.norm(dim=1))[:, None]
        return scaled

    @cached_property
    def shape(self) -> str:
        return f"{self.W0.shape[0]}×{self.W0.shape[1]}"


def tuned(W0: Tensor, kind: str, rank: int, seed: int = 1) -> Problem:
    """A fine-tune of a :func:`prescribed_base` that plants some intruders among the top 10."""
    (m, n), generator = W0.shape, seeded(seed)
    B, A = factors(m, n, rank, 4.0, generator)
    if kind == "lora":
        return Problem(kind, W0, B, A)
    if kind == "dora":
        return Problem(kind, W0, B, A, magnitude=W0.norm(dim=1) * (1 + 0.05 * normal(generator, m)))
    noise = normal(generator, m, n) * 0.02 / max(m, n) ** 0.5
    return Problem(kind, W0, W1=W0 + B @ A + noise)


def write_adapter(folder: Path, modules: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: int) -> Path:
    """A LoRA adapter of {module: (B, A)} as PEFT writes it, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (B, A) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder
