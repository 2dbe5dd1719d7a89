"""What adapters of other writers change besides matrices, and what is advised where a form cannot be written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters.diffusers import METADATA
from spectra.errors import AdapterError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers
from spectra.repairs.insertion import carried_beside
from spectra.runs.run import open_run
from spectra.runs.settings import checked_settings
from tests.support.dialects import draw, write
from tests.support.seeds import each_seed

SHAPE = (12, 10)


def image_model(rng, folder, prefix=""):
    """A base of two projections with biases and a norm."""
    tensors = {f"{prefix}blocks.0.{part}.weight": draw(rng, *SHAPE) for part in ("to_q", "to_k")}
    tensors |= {name.replace("weight", "bias"): draw(rng, SHAPE[0]) for name in tensors}
    return write(folder, tensors | {f"{prefix}blocks.0.norm.weight": draw(rng, 8)}), tensors


def factors(rng, module, down="lora_down", up="lora_up"):
    return {f"{module}.{down}.weight": draw(rng, 2, SHAPE[1]), f"{module}.{up}.weight": draw(rng, SHAPE[0], 2)}


def kohya(rng, **more):
    module = "lora_unet_blocks_0_to_q"
    value = draw(rng, SHAPE[0])
    alpha = {f"{module}.alpha": torch.tensor(1.0)}
    return factors(rng, module) | alpha | {f"{module}.diff_b": value} | more, {"to_q": value}, {}


def whole_difference(rng):
    value = draw(rng, SHAPE[0])
    module = "lycoris_blocks_0_to_q"
    return {f"{module}.diff": draw(rng, *SHAPE), f"{module}.diff_b": value}, {"to_q": value}, {}


def diffusers(rng, component):
    tensors: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for part in ("to_q", "to_k"):
        module = f"{component}blocks.0.{part}"
        value = draw(rng, SHAPE[0])
        tensors |= factors(rng, module, "lora_A", "lora_B") | {f"{module}.lora_B.bias": value}
        biases[part] = 3.0 * value  # alpha / r
    config = {"r": 2, "lora_alpha": 6, "lora_bias": True, "peft_type": "LORA"}
    own = json.dumps({f"{component}{key}": value for key, value in config.items()})
    return tensors, biases, {"metadata": {METADATA: own}}


WRITERS = {
    "kohya": kohya,
    "a whole difference": whole_difference,
    "diffusers": lambda rng: diffusers(rng, "transformer."),
    "diffusers, bare": lambda rng: diffusers(rng, ""),
}


@each_seed(range(4))
@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("writer", WRITERS)
def test_biases_are_changed_under_the_names_of_the_base(tmp_path, writer, prefix, seed):
    rng = np.random.default_rng(seed)
    base, before = image_model(rng, tmp_path / "base", prefix)
    tensors, biases, options = WRITERS[writer](rng)
    tuned = write(tmp_path / "lora", tensors, **options)
    run = open_run(tuned, base, checked_settings())
    found = carried_beside(run, pair_layers(run.base, run.tuned, run.plan))
    expected = {f"{prefix}blocks.0.{part}.bias": value for part, value in biases.items()}
    assert {item.name for item in found} == {item.base for item in found} == set(expected)
    for item in found:
        torch.testing.assert_close(item.read(run.base, run.tuned).double(), before[item.name].double() +
                                   expected[item.name].double(), rtol=1e-6, atol=1e-6)  # fmt: skip
    spectra.repair(tuned, base, to=tmp_path / "merged", scale=1.0, merged=True)
    assert spectra.verify(tmp_path / "merged").holds
    merged = open_checkpoint(tmp_path / "merged")
    for name, value in expected.items():
        torch.testing.assert_close(merged.read(name), before[name] + value, rtol=1e-6, atol=1e-6)


def test_a_sweep_has_the_names_of_the_base(tmp_path, rng):
    base, _ = image_model(rng, tmp_path / "base")
    tuned = write(tmp_path / "lora", kohya(rng)[0])
    seen = []

    def evaluate(weights):
        seen.append(set(weights))
        return 0.0

    spectra.sweep(tuned, base, evaluate=evaluate, scales=[1.0], epsilon=0.999)
    assert seen
    assert all(names == {"blocks.0.to_q.weight", "blocks.0.to_q.bias"} for names in seen)


NOT_READ = {
    "w_norm": {"lora_unet_blocks_0_norm.w_norm": torch.ones(8)},
    "bundle_emb": {"bundle_emb.face.string_to_param.*": torch.ones(2, 8)},
    "diff_b": {"lora_unet_blocks_0_to_k.diff_b": torch.ones(12)},
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_named_and_not_lost(tmp_path, rng, kind):
    base, _ = image_model(rng, tmp_path / "base")
    tuned = write(tmp_path / "lora", kohya(rng, **NOT_READ[kind])[0])
    assert spectra.audit(tuned, base).layers
    for attempt in (
        lambda: spectra.repair(tuned, base, to=tmp_path / "out", scale=1.0, merged=True),
        lambda: spectra.sweep(tuned, base, evaluate=lambda weights: 0.0, scales=[1.0]),
    ):
        with pytest.raises(UsageError, match=f"{kind}.*is part of the fine-tune, but is not read") as caught:
            attempt()
        assert "write the adapter instead" not in str(caught.value)


def test_biases_without_a_place_are_named(tmp_path, rng, make_base, make_adapter):
    base, tensors = image_model(rng, tmp_path / "base")
    longer = {"lora_unet_blocks_0_to_q.diff_b": torch.ones(13)}
    tuned = write(tmp_path / "lora", kohya(rng)[0] | longer)
    with pytest.raises(UsageError, match=r"diff_b.*its shape is \[13\], that of 'blocks.0.to_q.bias' \[12\]"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=1.0, merged=True)
    without = write(tmp_path / "without", {name: value for name, value in tensors.items() if value.ndim == 2})
    with pytest.raises(UsageError, match=r"diff_b.*the base has no 'blocks.0.to_q.bias'"):
        spectra.repair(write(tmp_path / "lora", kohya(rng)[0]), without, to=tmp_path / "out", scale=1.0, merged=True)
    alone = {"base_model.model.k.lora_B.bias": np.ones(6, "f4")}
    home = make_base({"q.weight": rng.normal(size=(6, 5)), "k.weight": rng.normal(size=(6, 5))}, "small")
    pair = rng.normal(size=(6, 2)).astype("f4"), rng.normal(size=(2, 5)).astype("f4")
    lora = make_adapter({"q": pair}, extra=alone, lora_bias=True)
    with pytest.raises(AdapterError, match=r"k\.lora_B\.bias.*its partner k\.lora_B is missing"):
        spectra.repair(lora, home, to=tmp_path / "out", scale=1.0, merged=True)


# What is advised


def test_a_full_fine_tune_of_mlx_is_merged_and_never_written_as_an_adapter(tmp_path, rng):
    before = {"model.q_proj.weight": draw(rng, *SHAPE), "model.norm.weight": draw(rng, 8)}
    base = write(tmp_path / "base", before)
    after = {name: value + draw(rng, *value.shape) for name, value in before.items()}
    tuned = write(tmp_path / "tuned", after, "adapters.safetensors")
    (tuned / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    with pytest.raises(UsageError, match="LoRA and DoRA of PEFT, not mlx-full; use --merged"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=1.0)
    spectra.repair(tuned, base, to=tmp_path / "out", scale=1.0, merged=True)
    merged = open_checkpoint(tmp_path / "out")
    for name, value in after.items():
        assert torch.equal(merged.read(name), value)


def test_a_convolution_of_mlx_is_not_merged_the_wrong_way_round(tmp_path, rng):
    before = {"q_proj.weight": draw(rng, *SHAPE), "conv.weight": draw(rng, 3, 3, 3)}
    base = write(tmp_path / "base", before)
    tuned = write(tmp_path / "tuned", {name: value + 1 for name, value in before.items()}, "adapters.safetensors")
    (tuned / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    with pytest.raises(UsageError, match=r"conv\.weight.*whose channels MLX stores last"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=1.0, merged=True)


def test_only_what_works_is_advised(tmp_path, rng, make_base, make_adapter):
    pair = rng.normal(size=(6, 2)).astype("f4"), rng.normal(size=(2, 5)).astype("f4")
    parameters = make_adapter({"experts": pair}, target_parameters=["experts.matrix"], target_modules=[])
    flat = make_base({"experts.matrix": rng.normal(size=(6, 5)).astype("f4")}, "flat")
    with pytest.raises(UsageError, match=r"not of parameters \(target_parameters\); use --merged"):
        spectra.repair(parameters, flat, to=tmp_path / "out", scale=1.0)
    spectra.repair(parameters, flat, to=tmp_path / "out", scale=1.0, merged=True)

    name, config = "model.layers.0.mlp.experts.down_proj", {"model_type": "qwen3_moe", "hidden_size": 6}
    stack = make_base({name: rng.normal(size=(3, 6, 5)).astype("f4")}, "stack", config)
    experts = rng.normal(size=(6, 6)).astype("f4"), rng.normal(size=(6, 5)).astype("f4")
    options = {"target_parameters": ["experts.down_proj"], "target_modules": [], "r": 2}
    tuned = make_adapter({"model.layers.0.mlp.experts": experts}, "stacked", **options)
    with pytest.raises(UsageError, match=r"and --merged does not work either: .*expert") as caught:
        spectra.repair(tuned, stack, to=tmp_path / "none", scale=1.0)
    assert "use --merged" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be merged") as caught:
        spectra.repair(tuned, stack, to=tmp_path / "none", scale=1.0, merged=True)
    assert "write the adapter" not in str(caught.value)

    lora = make_adapter({"q": pair}, "lora", extra={"base_model.model.score.weight": rng.normal(size=(3, 4))})
    home = make_base({"q.weight": rng.normal(size=(6, 5)).astype("f4")}, "home")
    with pytest.raises(UsageError, match="write the adapter instead, and merge that with peft"):
        spectra.repair(lora, home, to=tmp_path / "none", scale=1.0, merged=True)
