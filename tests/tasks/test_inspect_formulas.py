"""The formula that inspection prints for an update is that by which it is read."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.render.inspection import render_inspection
from spectra.tasks.inspect import inspect

peft = pytest.importorskip("peft")
lycoris = pytest.importorskip("lycoris")
from lycoris import modules as written  # noqa: E402  (after the oracle is known to be there)

X = "X = W0 − s·B₀·A₀ + s·B·A"
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q"]}
OF_PEFT: dict[str, tuple[Any, str]] = {
    "LoRA": (peft.LoraConfig(**LORA), "dW = s·B·A, s = 3"),
    "DoRA": (peft.LoraConfig(**LORA, use_dora=True), "W1 = m/‖W0 + s·B·A‖ ⊙ (W0 + s·B·A), norms by row, s = 3"),
    "PiSSA": (
        peft.LoraConfig(**LORA, init_lora_weights="pissa"),
        "W1 = W0 − s·B₀·A₀ + s·B·A, with B₀·A₀ from before training, s = 3",
    ),
    "OLoRA": (
        peft.LoraConfig(**LORA, init_lora_weights="olora", use_dora=True),
        f"W1 = m/‖X‖ ⊙ X, norms by row, {X}, with B₀·A₀ from before training, s = 3",
    ),
    "AdaLoRA": (
        peft.AdaLoraConfig(init_r=2, lora_alpha=6, target_modules=["q"], total_step=9), "dW = s·B·(E ⊙ A), s = 2.99999"
    ),
    "VeRA": (peft.VeraConfig(r=2, target_modules=["q"]), "dW = (b ⊙ B)·(d ⊙ A), with A and B random and shared"),
    "IA3": (peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "W1 = l ⊙ W0, by row"),
    "IA3, feed-forward": (peft.IA3Config(target_modules=["q"], feedforward_modules=["q"]), "W1 = l ⊙ W0, by column"),
    "LoHa": (peft.LoHaConfig(r=2, alpha=6, target_modules=["q"]), "dW = s·(B₁·A₁) ⊙ (B₂·A₂), s = 3"),
    "LoKr": (peft.LoKrConfig(r=2, alpha=6, target_modules=["q"]), "dW = s·(C ⊗ D), s = 3"),
    "OFT": (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q"]), "W1 = W0·R, with R a rotation"),
    "OFT of an embedding": (
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["words"]), "W1 = R·W0, with R a rotation"
    ),
    "BOFT": (
        peft.BOFTConfig(boft_block_size=4, target_modules=["q"]),
        "W1 = l ⊙ (W0·R), by row, with R a rotation",
    ),
}  # fmt: skip
LOHA, LOKR, DIAG = written.LohaModule, written.LokrModule, written.DiagOFTModule
OF_LYCORIS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "LoHa": (LOHA, {"lora_dim": 2, "alpha": 6}, "dW = s·(B₁·A₁) ⊙ (B₂·A₂), s = 3"),
    "LoHa, DoRA": (
        LOHA, {"lora_dim": 2, "alpha": 6, "weight_decompose": True, "wd_on_out": True},
        "W1 = m/‖X‖ ⊙ X, norms by row, X = W0 + s·(B₁·A₁) ⊙ (B₂·A₂), s = 3",
    ),
    "LoKr, DoRA": (
        LOKR, {"lora_dim": 2, "alpha": 6, "weight_decompose": True, "wd_on_out": False},
        "W1 = m/‖X‖ ⊙ X, norms by column, X = W0 + s·(C ⊗ D), s = 3",
    ),
    "OFT": (DIAG, {"lora_dim": 4}, "W1 = R·W0, with R a rotation"),
    "OFT, rescaled": (DIAG, {"lora_dim": 4, "rescaled": True}, "W1 = l ⊙ (R·W0), by row, with R a rotation"),
    "(IA)³": (written.IA3Module, {"train_on_input": True}, "W1 = (1 + l) ⊙ W0, by column"),
    "GLoRA": (written.GLoRAModule, {"lora_dim": 2, "alpha": 6}, "dW = s·(W0·A₁·A₂ + B₁·B₂), s = 3"),
}  # fmt: skip


def printed(path) -> str:
    found = inspect(path)
    (line,) = [line for line in render_inspection([found]).splitlines() if "formula" in line]
    return line.removeprefix("  formula    ")


@pytest.mark.parametrize("name", OF_PEFT)
def test_of_peft(tmp_path, name):
    torch.manual_seed(0)
    config, expected = OF_PEFT[name]
    net = nn.ModuleDict({"q": nn.Linear(24, 16), "words": nn.Embedding(20, 16)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(net, config).save_pretrained(tmp_path)
    assert printed(tmp_path) == expected


@pytest.mark.parametrize("name", OF_LYCORIS)
def test_of_lycoris(tmp_path, name):
    torch.manual_seed(0)
    make, options, expected = OF_LYCORIS[name]
    module = make("lycoris_q", nn.Linear(24, 16), multiplier=1.0, **options)
    state = {f"lycoris_q.{key}": value.detach().contiguous() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    assert printed(tmp_path / "x.safetensors") == expected
