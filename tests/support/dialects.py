"""LoRAs of other tools: random factors, files of them, and tuned weights read from disk against their formulas."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from spectra.adapters import plan_updates
from spectra.files.checkpoint import open_checkpoint
from spectra.files.orientation import as_matrix
from spectra.pairing.pairs import pair_layers
from spectra.updates.algebra import LowRank, RowScaled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


def write(folder, tensors, name="model.safetensors", **options):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, **options)
    return folder


def read_all(base_folder, tuned_path):
    """{base tensor: (W1 as stored, in float64, the pair)} of every pair, and what was skipped."""
    base, tuned = open_checkpoint(base_folder), open_checkpoint(tuned_path)
    plan = plan_updates(tuned)
    used = [name for update in plan.updates for name in update.tensors] + [item.name for item in plan.skipped]
    assert sorted(used) == sorted(tuned.tensors), "a tensor is not accounted for, or is twice"
    pairing = pair_layers(base, tuned, plan)
    found = {}
    for pair in pairing.pairs:
        W0 = pair.read_base(base, torch.float64, "cpu")
        update = pair.read_update(tuned, torch.float64, "cpu")
        assert isinstance(update, LowRank | RowScaled)
        assert pair.update.shape == pair.shape == tuple(W0.shape)
        assert update.B.shape[1] == update.A.shape[0] == pair.update.rank
        assert update.scaling == pair.update.scaling
        found[pair.base.name] = update.tuned(W0).dense(), pair
    return found, pairing.skipped


def check(base_folder, tuned_path, expected):
    """Every weight of ``expected`` (name → W1 as stored), and no other, is read with 1e-6 relative error."""
    found, skipped = read_all(base_folder, tuned_path)
    assert set(found) == set(expected)
    for name, (W1, pair) in found.items():
        wanted = as_matrix(expected[name], pair.layout)
        assert torch.linalg.norm(W1 - wanted) <= 1e-6 * torch.linalg.norm(wanted), name
    return {name: pair for name, (_, pair) in found.items()}, skipped


def check_any(base: Any, tuned: Any, expected: dict[str, torch.Tensor], *, shared: bool = False) -> Any:
    """Every weight of ``expected`` (base tensor → W1 as stored), and no other, is read with 1e-6 relative error."""
    opened, checkpoint = open_checkpoint(base), open_checkpoint(tuned)
    plan = plan_updates(checkpoint)
    used = [name for update in plan.updates for name in update.tensors] + [item.name for item in plan.skipped]
    used = sorted(set(used)) if shared else sorted(used)  # of stacked experts one tensor serves many
    assert used == sorted(checkpoint.tensors), "a tensor is not accounted for, or is twice"
    pairing = pair_layers(opened, checkpoint, plan)
    assert {pair.base.name for pair in pairing.pairs} == set(expected)
    for pair in pairing.pairs:
        W0 = pair.read_base(opened, torch.float64, "cpu")
        update = pair.read_update(checkpoint, torch.float64, "cpu").tuned(W0)
        wanted = as_matrix(expected[pair.base.name].double(), pair.layout)
        assert torch.linalg.norm(update.dense() - wanted) <= 1e-6 * torch.linalg.norm(wanted), pair.base.name
        assert torch.linalg.norm(update.delta() - (wanted - W0)) <= 1e-6 * torch.linalg.norm(wanted - W0) + 1e-12
    return pairing


# kohya's sd-scripts, LyCORIS

BLOCKS = ("down_blocks.0", "down_blocks.11", "mid_block", "up_blocks.1")


def image_model(rng, dtype):
    """{tensor: value} of a denoiser's modules: linear ones, and convolutions of several kernels."""
    a, b, c = (int(size) for size in rng.integers(4, 12, size=3))
    model = {}
    for block in BLOCKS:
        model[f"{block}.attentions.0.attn1.to_q.weight"] = draw(rng, b, a, dtype=dtype)
        model[f"{block}.attentions.0.attn1.to_out.0.weight"] = draw(rng, a, a, dtype=dtype)
        model[f"{block}.attentions.0.proj_in.weight"] = draw(rng, c, b, 1, 1, dtype=dtype)
        model[f"{block}.resnets.1.conv1.weight"] = draw(rng, c, a, 3, 3, dtype=dtype)
        model[f"{block}.resnets.1.norm.weight"] = draw(rng, c, dtype=dtype)
    model["time_embedding.linear_1.weight"] = draw(rng, c, b, dtype=dtype)
    model["conv_in.weight"] = draw(rng, c, 4, 3, 2, dtype=dtype)
    return model


def text_model(rng, dtype):
    a, b = (int(size) for size in rng.integers(12, 20, size=2))
    model = {f"text_model.encoder.layers.{i}.self_attn.q_proj.weight": draw(rng, a, a, dtype=dtype) for i in range(12)}
    return model | {"text_model.encoder.layers.1.mlp.fc1.weight": draw(rng, b, a, dtype=dtype)}
