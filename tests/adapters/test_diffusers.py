"""LoRAs of diffusers against their formulas, written out entry by entry."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import AdapterError, SpectraError, UnsupportedMethodError, WrongBaseError
from tests.support.dialects import DTYPES, check, draw, image_model, text_model, write
from tests.support.seeds import each_seed

SEEDS = range(24)
ONE = torch.ones(())


NAMES = {
    "peft": ("lora_A", "lora_B"),
    "lora": ("lora.down", "lora.up"),
    "linear layer": ("lora_linear_layer.down", "lora_linear_layer.up"),
}


def diffusers_modules(rng, component, model, names, ranks, scaling, with_alpha):
    """Factors for every matrix; ``ranks`` and ``scaling`` by module name."""
    down, up = NAMES[names]
    keys: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    for name, W in model.items():
        if W.ndim < 2:
            continue
        module = name.removesuffix(".weight")
        out, columns, *kernel = W.shape
        rank = ranks(module)
        A = draw(rng, rank, columns, *kernel, dtype=dtype)
        B = draw(rng, out, rank, *[1] * len(kernel), dtype=dtype)
        keys |= {f"{component}.{module}.{down}.weight": A, f"{component}.{module}.{up}.weight": B}
        if with_alpha:
            keys[f"{component}.{module}.alpha"] = torch.tensor(scaling(module) * rank)
        dW = torch.zeros(W.shape, dtype=torch.float64)
        for i in range(rank):
            dW += B[:, i].double().reshape(-1, *[1] * (W.ndim - 1)) * A[i].double()
        expected[name] = W.double() + scaling(module) * dW
    return keys, expected


@pytest.mark.parametrize("how", ["no alpha", "alphas", "metadata", "rslora"])
@each_seed(SEEDS)
def test_diffusers(tmp_path, seed, how):
    peft = pytest.importorskip("peft")
    rng = np.random.default_rng([seed, len(how)])
    names = list(NAMES)[seed // 2 % len(NAMES)]
    dtype = DTYPES[seed % 4]
    denoiser, text = image_model(rng, dtype), text_model(rng, dtype)
    component = ("transformer", "unet", "transformer_2")[seed % 3]
    rank, alpha = int(rng.integers(1, 6)), int(rng.integers(1, 20))
    other = int(rng.integers(1, 6))
    metadata: dict = {}

    def ranks(module):
        return other if how in ("metadata", "rslora") and module.endswith("to_q") else rank

    def scaling(module):
        if how == "no alpha":
            return 1.0
        if how == "alphas":
            return alpha / 16 * (2 if module.endswith("q_proj") else 1)
        value = 3 if "down_blocks.0." in module and module.endswith("conv1") else alpha
        return value / (ranks(module) ** 0.5 if how == "rslora" else ranks(module))

    if how in ("metadata", "rslora"):
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=how == "rslora", target_modules=["to_q"],
            rank_pattern={"to_q": other}, alpha_pattern={r"down_blocks\.0\..*conv1": 3},
        ).to_dict()  # fmt: skip
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        packed = {f"{name}.{key}": value for name in (component, "text_encoder") for key, value in plain.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}
    keys, expected = diffusers_modules(rng, component, denoiser, names, ranks, scaling, how == "alphas")
    more, of_text = diffusers_modules(rng, "text_encoder", text, names, ranks, scaling, how == "alphas")
    bias = {f"{component}.conv_in.lora_B.bias": draw(rng, 4)} if names == "peft" else {}
    lora = write(tmp_path / "lora", keys | more | bias, "pytorch_lora_weights.safetensors", metadata=metadata or None)
    pairs, skipped = check(write(tmp_path / "unet", denoiser), lora, expected)
    assert all(("no alpha" in str(pair.notes)) == (how == "no alpha") for pair in pairs.values())
    assert sum("of text_encoder: no weight of the base" in item.reason for item in skipped) == len(of_text)
    check(write(tmp_path / "text", text), lora, of_text)
    bare = {name.removeprefix("text_model."): value for name, value in text.items()}
    wanted = {name.removeprefix("text_model."): value for name, value in of_text.items()}
    check(write(tmp_path / "bare", bare), lora, wanted)


def one_diffusers(rng, rank=2, module="transformer.a.q"):
    return {f"{module}.lora_A.weight": draw(rng, rank, 5), f"{module}.lora_B.weight": draw(rng, 6, rank)}


def packed(**values):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}


BROKEN_DIFFUSERS: dict[str, tuple[dict, dict, type[SpectraError], str]] = {
    "one alpha of two": (
        {"transformer.a.k.lora_A.weight": torch.ones(2, 5), "transformer.a.k.lora_B.weight": torch.ones(6, 2),
         "transformer.a.k.alpha": ONE}, {}, UnsupportedMethodError, "its rank, or theirs",
    ),
    "lora_B missing": ({"transformer.a.k.lora_A.weight": torch.ones(2, 5)}, {}, AdapterError, "lora_B .* is missing"),
    "two kinds": ({"transformer.a.q.lora.down.weight": torch.ones(2, 5)}, {}, AdapterError, "several kinds"),
    "ranks differ": ({"transformer.a.q.lora_B.weight": torch.ones(6, 3)}, {}, AdapterError, "has rank 2"),
    "a whole tensor": ({"transformer.norm.weight": torch.ones(5)}, {}, UnsupportedMethodError, "another method"),
    "magnitudes of another size": (
        {"transformer.a.q.lora_magnitude_vector": torch.ones(5)}, {}, AdapterError, "expected 6 magnitudes",
    ),
    "two kinds of magnitudes": (
        {f"transformer.a.q.lora_magnitude_vector{end}": torch.ones(6) for end in ("", ".weight")}, {}, AdapterError,
        "occurs twice",
    ),
    "magnitudes, but none in the header": (
        {"transformer.a.q.lora_magnitude_vector": torch.ones(6)}, packed(r=2), AdapterError,
        "no use_dora.* there is one",
    ),
    "DoRA in the header": ({}, packed(r=2, use_dora=True), AdapterError, "has use_dora.* there is none"),
    "use_dora is text": ({}, packed(r=2, use_dora="yes"), AdapterError, "expected true or false"),
    "an unknown option": ({}, packed(r=2, kasa_config={"x": 1}), UnsupportedMethodError, "option kasa_config"),
    "initialised otherwise": ({}, packed(r=2, init_lora_weights="pissa"), UnsupportedMethodError, "pissa"),
    "another method": ({}, packed(peft_type="LOHA"), UnsupportedMethodError, "LOHA"),
    "another rank": ({}, packed(r=4), AdapterError, r"gives this module r = 4"),
    "r is text": ({}, packed(r="2"), AdapterError, "r = '2'.*expected a number"),
    "rslora is text": ({}, packed(r=2, use_rslora="yes"), AdapterError, "expected true or false"),
    "a pattern is none": ({}, packed(r=2, rank_pattern=[1]), AdapterError, "rank_pattern .* not an object"),
    "no JSON": ({}, {"lora_adapter_metadata": "{"}, SpectraError, "not readable as JSON"),
    "no object": ({}, {"lora_adapter_metadata": "[]"}, SpectraError, "no JSON object"),
    "two scalings": ({"transformer.a.q.alpha": ONE}, packed(r=2, lora_alpha=8), AdapterError, "scaling of 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_DIFFUSERS)
def test_broken_diffusers_files(tmp_path, rng, kind):
    extra, metadata, error, words = BROKEN_DIFFUSERS[kind]
    write(tmp_path / "lora", one_diffusers(rng) | extra, metadata=metadata or None)
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5), "a.k.weight": draw(rng, 6, 5)})
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tmp_path / "lora", base)
    assert "model.safetensors" in str(caught.value)


def test_diffusers_scaling_is_1_without_alphas_whatever_the_ranks(tmp_path, rng):
    keys = one_diffusers(rng) | one_diffusers(rng, 4, "transformer.a.k")
    write(tmp_path / "lora", keys)
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5), "a.k.weight": draw(rng, 6, 5)})
    for layer in spectra.audit(tmp_path / "lora", base).layers:
        assert layer.update["scaling"] == 1
        assert "earlier versions took the rank of one module" in layer.notes[0]


def test_a_language_model_s_lora_without_its_config_is_no_diffusers(tmp_path, rng, make_base):
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5), "h.0.c.weight": draw(rng, 6, 5)})
    write(tmp_path / "gpt", one_diffusers(rng, module="transformer.h.0.c"))
    with pytest.raises(UnsupportedMethodError, match="alpha is not known"):
        spectra.audit(tmp_path / "gpt", base)
    write(tmp_path / "lora", one_diffusers(rng))
    assert spectra.audit(tmp_path / "lora", base).tuned["format"] == "diffusers-lora"
    (base / "config.json").write_text(json.dumps({"model_type": "mpt"}))
    with pytest.raises(WrongBaseError, match="mpt model of transformers"):
        spectra.audit(tmp_path / "lora", base)
    (base / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert len(spectra.audit(tmp_path / "lora", base).layers) == 1


def test_diffusers_alpha_of_zero_adds_nothing(tmp_path, rng):
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5)})
    write(tmp_path / "lora", one_diffusers(rng) | {"transformer.a.q.alpha": torch.tensor(0.0)})
    (layer,) = spectra.audit(tmp_path / "lora", base).layers
    assert (layer.status, layer.update["scaling"]) == ("unchanged", 0)
    assert "alpha is 0" in layer.notes[0]
