"""Small fine-tunes in every dialect, written by hand, to which something is added or from which something is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
WIDTH = 16


class Written(NamedTuple):
    """A fine-tune on disk: what is named on the command line, its base, the file of its tensors, an adapted module."""

    tuned: Path
    base: Path
    file: Path
    module: str


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


Tensors = dict[str, np.ndarray]


def write(path: Path, tensors: Tensors, **configs: object) -> Path:
    """A safetensors file, and JSON files beside it by their names without an ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    for name, value in configs.items():
        (path.parent / f"{name}.json").write_text(json.dumps(value))
    return path


def language_model(home: Path, rng: np.random.Generator) -> Path:
    """A base of two layers with norms, as transformers names them."""
    tensors = {f"{module}.weight": drawn(rng, WIDTH, WIDTH) for module in (Q, K)}
    tensors |= {"model.norm.weight": drawn(rng, WIDTH), "model.embed_tokens.weight": drawn(rng, 24, WIDTH)}
    return write(home / "base" / "model.safetensors", tensors, config={"model_type": "llama"}).parent


def unet(home: Path, rng: np.random.Generator) -> Path:
    """A denoiser by itself, as diffusers names its modules."""
    tensors = {f"blocks.{i}.attn.to_q.weight": drawn(rng, WIDTH, WIDTH) for i in (0, 1)}
    file = home / "base" / "diffusion_pytorch_model.safetensors"
    return write(file, tensors, config={"_class_name": "UNet"}).parent


def factors(rng: np.random.Generator, r: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return drawn(rng, r, WIDTH), drawn(rng, WIDTH, r)


def peft_lora(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors: Tensors = {}
    for module in (Q, K):
        A, B = factors(rng)
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": None}
    file = write(home / "tuned" / "adapter_model.safetensors", tensors, adapter_config=config)
    return Written(file.parent, base, file, f"base_model.model.{Q}")


def peft_loha(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors: Tensors = {}
    for module in (Q, K):
        for half in ("w1", "w2"):
            A, B = factors(rng)
            names = (f"base_model.model.{module}.hada_{half}_b", f"base_model.model.{module}.hada_{half}_a")
            tensors |= dict(zip(names, (A, B), strict=True))
    config = {"peft_type": "LOHA", "r": 2, "alpha": 2, "base_model_name_or_path": None}
    file = write(home / "tuned" / "adapter_model.safetensors", tensors, adapter_config=config)
    return Written(file.parent, base, file, f"base_model.model.{Q}")


def peft_ia3(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors = {f"base_model.model.{module}.ia3_l": drawn(rng, WIDTH, 1) for module in (Q, K)}
    config: dict[str, object] = {"peft_type": "IA3", "feedforward_modules": [], "base_model_name_or_path": None}
    file = write(home / "tuned" / "adapter_model.safetensors", tensors, adapter_config=config)
    return Written(file.parent, base, file, f"base_model.model.{Q}")


def kohya(home: Path, rng: np.random.Generator) -> Written:
    base = unet(home, rng)
    tensors: Tensors = {}
    for i in (0, 1):
        A, B = factors(rng)
        module = f"lora_unet_blocks_{i}_attn_to_q"
        alpha = np.array(2, np.float32)
        tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.alpha": alpha}
    file = write(home / "tuned.safetensors", tensors)
    return Written(file, base, file, "lora_unet_blocks_0_attn_to_q")


def lycoris(home: Path, rng: np.random.Generator) -> Written:
    base = unet(home, rng)
    tensors: Tensors = {}
    for i in (0, 1):
        module = f"lycoris_blocks_{i}_attn_to_q"
        tensors |= {f"{module}.lokr_w1": drawn(rng, 4, 4), f"{module}.lokr_w2": drawn(rng, 4, 4)}
        tensors[f"{module}.alpha"] = np.array(1, np.float32)
    file = write(home / "tuned.safetensors", tensors)
    return Written(file, base, file, "lycoris_blocks_0_attn_to_q")


def of_a_unet(home: Path, rng: np.random.Generator, prefix: str, ending: str) -> Written:
    """Factors named ``lora_A`` and ``lora_B``, with what stands before the module's name and at the end."""
    base = unet(home, rng)
    tensors: Tensors = {}
    for i in (0, 1):
        A, B = factors(rng)
        module = f"{prefix}blocks.{i}.attn.to_q"
        tensors |= {f"{module}.lora_A.{ending}": A, f"{module}.lora_B.{ending}": B}
    file = write(home / "tuned.safetensors", tensors)
    return Written(file, base, file, f"{prefix}blocks.0.attn.to_q")


def diffusers(home: Path, rng: np.random.Generator) -> Written:
    return of_a_unet(home, rng, "unet.", "weight")


def diffsynth(home: Path, rng: np.random.Generator) -> Written:
    return of_a_unet(home, rng, "", "default.weight")


def xlabs(home: Path, rng: np.random.Generator) -> Written:
    weights = {f"double_blocks.{i}.img_attn.proj.weight": drawn(rng, WIDTH, WIDTH) for i in (0, 1)}
    base = write(home / "base" / "flux.safetensors", weights).parent
    tensors: Tensors = {}
    for i in (0, 1):
        A, B = factors(rng)
        module = f"double_blocks.{i}.processor.proj_lora1"
        tensors |= {f"{module}.down.weight": A, f"{module}.up.weight": B}
    file = write(home / "tuned.safetensors", tensors)
    return Written(file, base, file, "double_blocks.0.processor.proj_lora1")


def mlx(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors: Tensors = {}
    for module in (Q, K):
        A, B = factors(rng)
        tensors |= {f"{module}.lora_a": A.T, f"{module}.lora_b": B.T}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 2.0}}
    file = write(home / "tuned" / "adapters.safetensors", tensors, adapter_config=config)
    return Written(file.parent, base, file, Q)


def mlx_full(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors = {f"{module}.weight": drawn(rng, WIDTH, WIDTH) for module in (Q, K)}
    config = {"fine_tune_type": "full", "num_layers": 2}
    file = write(home / "tuned" / "adapters.safetensors", tensors, adapter_config=config)
    return Written(file.parent, base, file, Q)


def full(home: Path, rng: np.random.Generator) -> Written:
    base = language_model(home, rng)
    tensors = load_file(base / "model.safetensors")
    tensors = {name: value + 0.1 * drawn(rng, *value.shape) for name, value in tensors.items()}
    file = write(home / "tuned" / "model.safetensors", tensors, config={"model_type": "llama"})
    return Written(file.parent, base, file, Q)


DIALECTS: dict[str, Callable[[Path, np.random.Generator], Written]] = {
    "peft LoRA": peft_lora, "peft LoHa": peft_loha, "peft IA3": peft_ia3, "kohya": kohya, "lycoris": lycoris,
    "diffusers": diffusers, "diffsynth": diffsynth, "xlabs": xlabs, "mlx": mlx, "mlx full": mlx_full, "full": full,
}  # fmt: skip


def changed(written: Written, change: Callable[[Tensors], None]) -> None:
    """Rewrites the fine-tune's tensors."""
    tensors = load_file(written.file)
    change(tensors)
    save_file(tensors, written.file)


def pickled(path: Path, tensors: Tensors) -> None:
    """A file as torch.save writes it."""
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
