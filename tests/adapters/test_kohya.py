"""LoRAs of kohya's sd-scripts and LyCORIS against their formulas, written out entry by entry."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import spectra
from spectra.cli import main
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from tests.support.dialects import DTYPES, check, draw, image_model, read_all, text_model, write
from tests.support.paths import ROOT
from tests.support.seeds import each_seed

SEEDS = range(24)
UNET, TEXT = "lora_unet", "lora_te1"


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
@each_seed(SEEDS)
def test_kohya(tmp_path, how, seed):
    rng = np.random.default_rng([seed, len(how)])
    dtype = DTYPES[seed % 4]
    denoiser, text = image_model(rng, dtype), text_model(rng, dtype)
    keys, expected = kohya_modules(rng, UNET, denoiser, how)
    more, of_text = kohya_modules(rng, TEXT, text, how)
    write(tmp_path / "lora", keys | more, "mine.safetensors", metadata={"ss_network_dim": "4"})
    lora = tmp_path / "lora" / "mine.safetensors"
    _, skipped = check(write(tmp_path / "unet", denoiser), lora, expected)
    assert sum("of lora_te1: no weight of the base" in item.reason for item in skipped) == len(of_text)
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
    assert "ntruder dimensions" in capsys.readouterr().out
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
        spectra.repair(tmp_path / "lora", base, to=tmp_path / "out", scale=0.5)
    assert not (tmp_path / "out").exists()
    spectra.repair(tmp_path / "lora", base, to=tmp_path / "merged", scale=1.0, merged=True)
    merged = open_checkpoint(tmp_path / "merged").read("a.b.weight")
    assert torch.linalg.norm(merged - expected["a.b.weight"]) <= 1e-6 * torch.linalg.norm(merged)
