"""LoRAs of other tools against their formulas, written out entry by entry."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import (
    AdapterError,
    CorruptFileError,
    SpectraError,
    UnsupportedMethodError,
    UsageError,
    WrongBaseError,
)
from spectra.files.checkpoint import open_checkpoint
from tests.support.dialects import DTYPES, check, draw, read_all, write
from tests.support.paths import ROOT

SEEDS = range(24)


# kohya's sd-scripts, LyCORIS

BLOCKS = ("down_blocks.0", "down_blocks.11", "mid_block", "up_blocks.1")
UNET, TEXT = "lora_unet", "lora_te1"


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


def kohya_modules(rng, component, model, how):
    """(keys of a LoRA on every matrix of ``model``, tensor → W1 by the formula entry by entry)."""
    keys: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, W in model.items():
        if W.ndim < 2:
            continue
        out, columns, *kernel = W.shape
        rank = int(rng.integers(1, 5))
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        key = f"{component}_{name.removesuffix('.weight').replace('.', '_')}"
        dW = torch.zeros(W.shape, dtype=torch.float64)
        if how == "parts" and not kernel and out > 3:
            sizes = [1, 2, out - 3]
            row = 0
            for part, size in enumerate(sizes):
                up, down = draw(rng, size, rank, dtype=dtype), draw(rng, rank, columns, dtype=dtype)
                keys |= {f"{key}.lora_up.{part}.weight": up, f"{key}.lora_down.{part}.weight": down}
                dW[row : row + size] = up.double() @ down.double()
                row += size
        elif how == "mid" and len(kernel) == 2 and kernel != [1, 1]:
            up, down = draw(rng, out, rank, 1, 1, dtype=dtype), draw(rng, rank, columns, 1, 1, dtype=dtype)
            mid = draw(rng, rank, rank, *kernel, dtype=dtype)
            keys |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid}
            for i in range(rank):
                for j in range(rank):
                    outer = up[:, i].double().reshape(-1, 1, 1, 1) * down[j].double().reshape(1, -1, 1, 1)
                    dW += outer * mid[i, j].double()
        else:
            flat = how == "flat" and kernel == [1, 1]  # a linear factor on a 1×1 convolution
            up = draw(rng, out, rank, *([] if flat else [1] * len(kernel)), dtype=dtype)
            down = draw(rng, rank, columns, *([] if flat else kernel), dtype=dtype)
            keys |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            for i in range(rank):
                shape = (-1, *[1] * (W.ndim - 1))
                dW += up[:, i].double().reshape(shape) * down[i].double().reshape(W.shape[1:])
        alpha = [None, 0.0, float(rng.uniform(0.5, 16)), -2.0, float(rank)][int(rng.integers(5))]
        if alpha is not None:
            stored = torch.tensor(alpha, dtype=(torch.float32, torch.bfloat16, torch.float16)[int(rng.integers(3))])
            keys[f"{key}.alpha"] = stored
            alpha = float(stored)
        expected[name] = W.double() + (alpha / rank if alpha else 1.0) * dW
    return keys, expected


@pytest.mark.parametrize("how", ["plain", "mid", "parts", "flat"])
@pytest.mark.parametrize("seed", SEEDS)
def test_kohya(tmp_path, how, seed):
    rng = np.random.default_rng([seed, len(how)])
    dtype = DTYPES[seed % 4]
    denoiser, text = image_model(rng, dtype), text_model(rng, dtype)
    keys, expected = kohya_modules(rng, UNET, denoiser, how)
    more, of_text = kohya_modules(rng, TEXT, text, how)
    write(tmp_path / "lora", keys | more, "mine.safetensors", metadata={"ss_network_dim": "4"})
    lora = tmp_path / "lora" / "mine.safetensors"
    _, skipped = check(write(tmp_path / "unet", denoiser), lora, expected)
    assert sum("of lora_te1, another model" in item.reason for item in skipped) == len(of_text)
    check(write(tmp_path / "text", text), lora, of_text)
    # All models in one file, each under its prefix, and a second encoder of another width.
    second = {f"embedders.1.{name}": value for name, value in text_model(rng, dtype).items()}
    second = {name: torch.cat([value, value]) for name, value in second.items()}
    prefixed = [("model.diffusion_model.", denoiser), ("embedders.0.transformer.", text)]
    whole = second | {prefix + name: value for prefix, model in prefixed for name, value in model.items()}
    wanted = {f"model.diffusion_model.{name}": value for name, value in expected.items()}
    wanted |= {f"embedders.0.transformer.{name}": value for name, value in of_text.items()}
    check(write(tmp_path / "whole", whole), lora, wanted)


@pytest.mark.parametrize("component", ["lora_unet", "lora_te", "lora_te3", "lora_transformer", "lycoris"])
def test_kohya_components_and_wrappers(tmp_path, rng, component):
    model = {f"model.layers.{i}.self_attn.q_proj.weight": draw(rng, 6, 5) for i in range(3)}
    keys, expected = kohya_modules(rng, component, model, "plain")
    write(tmp_path / "lora", keys)
    check(write(tmp_path / "base", model), tmp_path / "lora", expected)
    bare = {name.removeprefix("model."): value for name, value in model.items()}
    wanted = {name.removeprefix("model."): value for name, value in expected.items()}
    check(write(tmp_path / "bare", bare), tmp_path / "lora", wanted)


def one(rng, module="lora_unet_a_b", shape=(6, 5), rank=2, **more):
    out, columns, *kernel = shape
    keys = {
        f"{module}.lora_up.weight": draw(rng, out, rank, *[1] * len(kernel)),
        f"{module}.lora_down.weight": draw(rng, rank, columns, *kernel),
    }
    return keys | {f"{module}.{tail}": value for tail, value in more.items()}


def test_kohya_names_that_could_be_several_are_an_error_that_lists_them(tmp_path, rng):
    write(tmp_path / "lora", one(rng))
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 5), "a_b.weight": draw(rng, 6, 5)})
    with pytest.raises(WrongBaseError, match=r"'a\.b\.weight', 'a_b\.weight'") as caught:
        spectra.audit(tmp_path / "lora", base)
    assert "lora_unet_a_b" in str(caught.value)
    several = write(tmp_path / "several", {f"layer.{i}.a.b.weight": draw(rng, 6, 5) for i in range(2)})
    with pytest.raises(WrongBaseError, match=r"'layer\.0\.a\.b\.weight'.*'layer\.1\.a\.b\.weight'"):
        spectra.audit(tmp_path / "lora", several)
    # Of several with that name the shape decides.
    fits = write(tmp_path / "fits", {"a.b.weight": draw(rng, 6, 5), "a_b.weight": draw(rng, 9, 5)})
    assert [layer.name for layer in spectra.audit(tmp_path / "lora", fits).layers] == ["a.b"]


def test_kohya_modules_that_the_base_lacks(tmp_path, rng):
    write(tmp_path / "lora", one(rng) | one(rng, "lora_unet_c"))
    other = write(tmp_path / "other", {"x.weight": draw(rng, 6, 5)})
    with pytest.raises(WrongBaseError, match=r"lora_unet_a_b\.lora_down.*wrong base"):
        spectra.audit(tmp_path / "lora", other)
    half = write(tmp_path / "half", {"a.b.weight": draw(rng, 6, 5)})
    with pytest.raises(WrongBaseError, match=r"lora_unet_c\.lora_down.*wrong base"):
        spectra.audit(tmp_path / "lora", half)
    wrong = write(tmp_path / "wrong", {"a.b.weight": draw(rng, 6, 5), "c.weight": draw(rng, 7, 5)})
    with pytest.raises(WrongBaseError, match=r"does not fit the base weight 'c\.weight'"):
        spectra.audit(tmp_path / "lora", wrong)


def test_kohya_alpha_is_explained(tmp_path, rng):
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 5)})
    for alpha, words in ((None, "no alpha is stored"), (0.0, "merging script for no change"), (3.0, None)):
        more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
        write(tmp_path / "lora", one(rng, **more))
        report = spectra.audit(tmp_path / "lora", base)
        assert report.tuned["format"] == "kohya-lora"
        (layer,) = report.layers
        assert (layer.update["rank"], layer.update["alpha"]) == (2, alpha or 2)
        assert layer.update["scaling"] == (alpha or 2) / 2
        assert any(words in note for note in layer.notes) if words else not layer.notes


ONE = torch.ones(())
BROKEN_KOHYA: dict[str, tuple[dict[str, torch.Tensor | None], type[Exception], str]] = {
    "lora_up missing": ({"lora_up.weight": None}, AdapterError, "partner lora_up is missing"),
    "lora_down missing": ({"lora_down.weight": None}, AdapterError, "partner lora_down is missing"),
    "alpha alone": ({"lora_up.weight": None, "lora_down.weight": None, "alpha": ONE}, AdapterError, "neither"),
    "ranks differ": ({"lora_up.weight": torch.ones(6, 3)}, AdapterError, "has rank 2"),
    "a vector": ({"lora_down.weight": torch.ones(5)}, AdapterError, "expected a matrix"),
    "empty": ({"lora_down.weight": torch.ones(0, 5)}, AdapterError, "expected a matrix"),
    "integers": ({"lora_down.weight": torch.ones(2, 5, dtype=torch.int8)}, AdapterError, "floating dtype"),
    "two alphas": ({"alpha": torch.ones(2)}, AdapterError, "expected one number"),
    "alpha is text": ({"alpha": torch.ones(1, dtype=torch.uint8)}, AdapterError, "expected one number"),
    "alpha not finite": ({"alpha": torch.tensor(float("nan"))}, AdapterError, "finite"),
    "mid does not fit": ({"lora_mid.weight": torch.ones(3, 3, 1, 1)}, AdapterError, r"expected \(2, 2"),
    "part and whole": ({"lora_up.0.weight": torch.ones(6, 2)}, AdapterError, "twice"),
    "a part is missing": (
        {"lora_up.2.weight": torch.ones(1, 2), "lora_down.2.weight": torch.ones(2, 5)}, AdapterError, "parts 0 to 1",
    ),
    "a wide kernel in up": ({"lora_up.weight": torch.ones(6, 2, 3, 3)}, AdapterError, "1×1"),
    "LoHa": ({"hada_w1_a": torch.ones(6, 2)}, UnsupportedMethodError, "beside LoHa"),
    "LoKr": ({"lokr_w1": torch.ones(6, 2)}, UnsupportedMethodError, "beside LoKr"),
    "DoRA": ({"dora_scale": torch.ones(6)}, UnsupportedMethodError, "does not say which"),
    "a whole difference": ({"diff": torch.ones(6, 5)}, UnsupportedMethodError, "beside a whole difference"),
    "a scalar besides": ({"scalar": ONE}, UnsupportedMethodError, "beside LoCon, this version cannot read scalar"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_KOHYA)
def test_broken_kohya_files(tmp_path, rng, kind):
    changes, error, words = BROKEN_KOHYA[kind]
    keys = one(rng) | {f"lora_unet_a_b.{tail}": value for tail, value in changes.items()}
    write(tmp_path / "lora", {key: value for key, value in keys.items() if value is not None})
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 5)})
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tmp_path / "lora", base)
    assert "model.safetensors" in str(caught.value)
    assert "lora_unet_a_b" in str(caught.value)


def test_kohya_what_has_no_spectrum_is_skipped(tmp_path, rng):
    extra = {
        "lora_unet_a_b.diff_b": torch.ones(6),
        "lora_unet_norm.w_norm": torch.ones(6),
        "bundle_emb.face.string_to_param.*": torch.ones(2, 8),
    }
    write(tmp_path / "lora", one(rng) | extra)
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 5)})
    _, skipped = read_all(base, tmp_path / "lora")
    assert {item.name for item in skipped} == set(extra)


def test_kohya_through_the_commands(tmp_path, rng, capsys):
    write(tmp_path / "lora", one(rng, alpha=torch.tensor(4.0)))
    base = write(tmp_path / "base", {"a.b.weight": draw(rng, 6, 5)})
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert "kohya-lora" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "lora"), "--base", str(base), "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [update["base_tensor"] for update in found["updates"]] == ["a.b.weight"]
    assert main(["audit", str(tmp_path / "lora"), "--base", str(base)]) == 0
    assert "Verdict" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "lora")]) == 2
    assert "name it with --base" in capsys.readouterr().err
    assert spectra.audit(tmp_path / "lora", base).tuned["fingerprint_covers"] == "contents"


def test_kohya_headers_are_read_without_torch(tmp_path, rng):
    write(tmp_path / "lora", one(rng, alpha=torch.tensor(4.0)))
    code = (
        "import sys; from spectra.tasks.inspect import inspect; "
        f"assert inspect({str(tmp_path / 'lora')!r}).facts['alpha'] == 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_kohya_is_merged_into_a_checkpoint_but_not_written(tmp_path, rng):
    model = {"a.b.weight": draw(rng, 6, 5), "norm.weight": draw(rng, 5)}
    keys, expected = kohya_modules(rng, UNET, model, "plain")
    base = write(tmp_path / "base", model)
    write(tmp_path / "lora", keys)
    with pytest.raises(UsageError, match="merged"):
        spectra.mitigate(tmp_path / "lora", tmp_path / "out", base, scale=0.5)
    assert not (tmp_path / "out").exists()
    spectra.mitigate(tmp_path / "lora", tmp_path / "merged", base, scale=1.0, merged=True)
    merged = open_checkpoint(tmp_path / "merged").read("a.b.weight")
    assert torch.linalg.norm(merged - expected["a.b.weight"]) <= 1e-6 * torch.linalg.norm(merged)


# MLX


def mlx_config(**changes):
    given = changes.pop("lora_parameters", {})
    parameters = None if given == "no" else {"rank": 3, "scale": 20.0, "dropout": 0.0} | given
    values = {"fine_tune_type": "lora", "num_layers": 4, "model": "some/model", "optimizer": "adam", "data": "x"}
    return {key: value for key, value in (values | {"lora_parameters": parameters} | changes).items() if value != "no"}


def write_mlx(folder, tensors, name="adapters.safetensors", **changes):
    write(folder, tensors, name)
    (folder / "adapter_config.json").write_text(json.dumps(mlx_config(**changes)))
    return folder


def mlx_modules(rng, model, rank, scale, dora):
    keys: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    for name, W in model.items():
        module = name.removesuffix(".weight")
        if W.ndim < 2 or (dora and "embed" in name):
            continue
        embedding = "embed" in name
        out, columns = (W.shape[1], W.shape[0]) if embedding else W.shape
        a, b = draw(rng, columns, rank, dtype=dtype), draw(rng, rank, out, dtype=dtype)
        keys |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        dW = torch.zeros(out, columns, dtype=torch.float64)
        for i in range(out):
            for j in range(columns):
                dW[i, j] = scale * sum(float(a[j, k]) * float(b[k, i]) for k in range(rank))
        tuned = W.double() + (dW.T if embedding else dW)
        if dora:
            m = draw(rng, out, dtype=torch.float32).abs()
            keys[f"{module}.m"] = m
            tuned = torch.stack([m[i].double() * tuned[i] / tuned[i].square().sum().sqrt() for i in range(out)])
        expected[name] = tuned
    return keys, expected


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mlx(tmp_path, seed, dora):
    rng = np.random.default_rng([seed, dora])
    dtype = DTYPES[seed % 4]
    rank, scale = int(rng.integers(1, 6)), float(rng.uniform(-1, 20))
    a, b = (int(size) for size in rng.integers(4, 9, size=2))
    model = {f"model.layers.{i}.self_attn.q_proj.weight": draw(rng, b, a, dtype=dtype) for i in range(2)}
    model |= {f"model.layers.{i}.mlp.square.weight": draw(rng, a, a, dtype=dtype) for i in range(2)}
    model |= {"model.embed_tokens.weight": draw(rng, 17, a, dtype=dtype), "model.norm.weight": draw(rng, a)}
    keys, expected = mlx_modules(rng, model, rank, scale, dora)
    options = {"lora_parameters": {"rank": rank, "scale": scale}, "fine_tune_type": "dora" if dora else "lora"}
    base = write(tmp_path / "base", model)
    check(base, write_mlx(tmp_path / "mlx", keys, **options), expected)
    step = write_mlx(tmp_path / "run", keys, "0000100_adapters.safetensors", **options)
    check(base, step / "0000100_adapters.safetensors", expected)
    assert plan_updates(open_checkpoint(tmp_path / "mlx")).facts["scaling"] == scale


def one_mlx(rng):
    return {"a.q.lora_a": draw(rng, 5, 3), "a.q.lora_b": draw(rng, 3, 6)}


BROKEN_MLX: dict[str, tuple[dict, dict, type[Exception], str]] = {
    "no parameters": ({}, {"lora_parameters": "no"}, AdapterError, "lora_parameters is missing"),
    "no scale": ({}, {"lora_parameters": {"scale": None}}, AdapterError, "scale = 'None'"),
    "scale is text": ({}, {"lora_parameters": {"scale": "20"}}, AdapterError, "expected a number"),
    "rank differs": ({}, {"lora_parameters": {"rank": 4}}, AdapterError, r"a\.q\.lora_a.*rank = 4"),
    "an unknown option": ({}, {"lora_parameters": {"twist": 1}}, UnsupportedMethodError, "option twist"),
    "another type": ({}, {"fine_tune_type": "sft"}, UnsupportedMethodError, "fine_tune_type = 'sft'"),
    "experts of other ranks": (
        {"a.switch_mlp.up_proj.lora_a": torch.ones(2, 3, 5), "a.switch_mlp.up_proj.lora_b": torch.ones(2, 6, 2)}, {},
        AdapterError, "rank = 3",
    ),
    "experts in other numbers": (
        {"a.switch_mlp.up_proj.lora_a": torch.ones(2, 3, 5), "a.switch_mlp.up_proj.lora_b": torch.ones(3, 6, 3)}, {},
        AdapterError, r"expected \(3, 3, in\)",
    ),
    "experts' lora_b is flat": (
        {"a.switch_mlp.up_proj.lora_a": torch.ones(2, 3, 5), "a.switch_mlp.up_proj.lora_b": torch.ones(6, 3)}, {},
        AdapterError, r"expected \(experts, out, r\), of",
    ),
    "dora without magnitudes": ({}, {"fine_tune_type": "dora"}, AdapterError, "of m there is none"),
    "magnitudes without dora": ({"a.q.m": torch.ones(6)}, {}, AdapterError, "of m there is one"),
    "other magnitudes": ({"a.q.m": torch.ones(5)}, {"fine_tune_type": "dora"}, AdapterError, "expected 6 magnitudes"),
    "lora_b missing": ({"a.k.lora_a": torch.ones(5, 3)}, {}, AdapterError, "partner a.k.lora_b is missing"),
    "ranks differ": ({"a.q.lora_b": torch.ones(2, 6)}, {}, AdapterError, "first dimension is 2"),
    "a vector": ({"a.q.lora_b": torch.ones(3)}, {}, AdapterError, "expected a matrix"),
    "quantised": ({"a.q.lora_a_scales": torch.ones(3)}, {}, UnsupportedMethodError, "lora_a_scales"),
    "integers": ({"a.q.lora_a": torch.ones(5, 3, dtype=torch.int8)}, {}, AdapterError, "floating dtype"),
    "an embedding's DoRA": (
        {"embed_tokens.lora_a": torch.ones(5, 3), "embed_tokens.lora_b": torch.ones(3, 6), "embed_tokens.m": ONE,
         "a.q.m": torch.ones(6)}, {"fine_tune_type": "dora"}, AdapterError, "expected 5 magnitudes",
    ),
    "alpha of an early version": (
        {}, {"lora_parameters": {"alpha": 16}, "fine_tune_type": "no", "num_layers": "no"}, UnsupportedMethodError,
        r"could be 20, or 106\.667",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_MLX)
def test_broken_mlx_adapters(tmp_path, rng, kind):
    extra, changes, error, words = BROKEN_MLX[kind]
    tuned = write_mlx(tmp_path / "mlx", one_mlx(rng) | extra, **changes)
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5)})
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tuned, base)
    assert str(tmp_path / "mlx") in str(caught.value)


def test_mlx_writes_null_for_no_metadata(tmp_path, rng):
    tuned = write_mlx(tmp_path / "mlx", one_mlx(rng))
    file = tuned / "adapters.safetensors"
    stored = file.read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    values = stored[8 + int.from_bytes(stored[:8], "little") :]
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5)})
    for metadata, works in ((None, True), ("null", False), (0, False), ([], False)):
        for first in (True, False):
            entries = {"__metadata__": metadata, **header} if first else {**header, "__metadata__": metadata}
            text = json.dumps(entries).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + values)
            if works:
                assert len(spectra.audit(tuned, base).layers) == 1
            else:
                with pytest.raises(CorruptFileError, match="__metadata__"):
                    spectra.audit(tuned, base)


def test_mlx_alpha_of_later_configs_is_noted(tmp_path, rng):
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5)})
    tuned = write_mlx(tmp_path / "mlx", one_mlx(rng), lora_parameters={"alpha": 16})
    (layer,) = spectra.audit(tuned, base).layers
    assert layer.update["scaling"] == 20
    assert "takes the scale 20 alone" in layer.notes[0]
    (layer,) = spectra.audit(write_mlx(tmp_path / "mlx", one_mlx(rng), lora_parameters={"alpha": 3}), base).layers
    assert not layer.notes


def test_mlx_experts_of_unknown_names_are_skipped_and_an_adapter_is_no_base(tmp_path, rng, capsys):
    experts = {"a.pool.lora_a": draw(rng, 2, 3, 5), "a.pool.lora_b": draw(rng, 2, 6, 3)}
    tuned = write_mlx(tmp_path / "mlx", one_mlx(rng) | experts)
    base = write(tmp_path / "base", {"a.q.weight": draw(rng, 6, 5), "a.pool.weight": draw(rng, 2, 6, 5)})
    report = spectra.audit(tuned, base)
    assert {item["name"] for item in report.skipped} == set(experts)
    with pytest.raises(WrongBaseError, match="is an adapter"):
        spectra.audit(tuned, tuned)
    with pytest.raises(UsageError, match="merged"):
        spectra.mitigate(tuned, tmp_path / "out", base, scale=0.5)
    keys = one_mlx(rng)
    spectra.mitigate(write_mlx(tmp_path / "one", keys), tmp_path / "merged", base, scale=1.0, merged=True)
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.adapter_config is None
    expected = open_checkpoint(base).read("a.q.weight") + 20 * (keys["a.q.lora_a"] @ keys["a.q.lora_b"]).T
    torch.testing.assert_close(merged.read("a.q.weight"), expected)
    assert main(["inspect", str(tuned)]) == 0
    assert "mlx-lora" in capsys.readouterr().out


# diffusers

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
@pytest.mark.parametrize("seed", SEEDS)
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
    assert sum("of text_encoder, another model" in item.reason for item in skipped) == len(of_text)
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
