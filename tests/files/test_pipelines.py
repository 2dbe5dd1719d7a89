"""Folders of diffusers pipelines, written by diffusers and transformers themselves."""

from __future__ import annotations

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AmbiguousFilesError, MissingFileError, SpectraError, UnsafeFileError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived
from spectra.pairing.pairs import pair_layers
from spectra.pairing.precision import quantised_as
from tests.support.dialects import check, draw
from tests.support.seeds import each_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small pipeline saved whole, as a variant, and in shards; and its models."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=2,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    models = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(config)}
    pipe: Any = diffusers.StableDiffusionPipeline(
        **models, tokenizer=None, scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None
    )
    home = tmp_path_factory.mktemp("pipelines")
    pipe.save_pretrained(home / "whole")
    pipe.save_pretrained(home / "variant", variant="fp16")
    pipe.save_pretrained(home / "shards", max_shard_size="20KB")
    return home


def values_of(folder):
    """{component.tensor: value}, read without the package."""
    return {
        f"{name.partition('/')[0]}.{key}": value
        for name in (UNET, VAE, TEXT) for key, value in load_file(folder / name).items()
    }  # fmt: skip


@pytest.mark.parametrize("name", ["whole", "variant", "shards"])
def test_every_component_is_read(written, name):
    opened, expected = open_checkpoint(written / name), values_of(written / "whole")
    assert opened.layout == "diffusers pipeline"
    assert set(opened.tensors) == set(expected)
    for key, value in expected.items():
        info = opened.tensors[key]
        assert info.shape == tuple(value.shape)
        assert torch.equal(opened.read(key), value)
        if value.ndim:
            assert torch.equal(opened.read(key, rows=slice(1)), value[:1])
    assert opened.config["_class_name"] == "StableDiffusionPipeline"
    assert set(opened.config["components"]) == {"unet", "vae", "text_encoder"}
    assert opened.config["components"]["text_encoder"]["model_type"] == "clip_text_model"
    assert opened.fingerprint(hash_contents=True) == open_checkpoint(written / "whole").fingerprint(hash_contents=True)


def copied(written, folder, name="whole"):
    return shutil.copytree(written / name, folder / name)


def test_a_pipeline_as_a_full_fine_tune(written, tmp_path, capsys):
    home, rng = copied(written, tmp_path), np.random.default_rng(0)
    names = {UNET: "conv_in.weight", TEXT: "encoder.layers.1.mlp.fc1.weight"}
    for file, name in names.items():
        values = load_file(home / file)
        values[name] = values[name] + 0.1 * draw(rng, *values[name].shape)
        save_file(values, home / file)
    report = spectra.audit(home, written / "shards")
    changed = {layer.name for layer in report.layers if layer.status != "unchanged"}
    assert changed == {"unet.conv_in", "text_encoder.encoder.layers.1.mlp.fc1"}
    assert report.base["format"] == report.tuned["format"].replace("full", "diffusers pipeline")
    assert main(["inspect", str(home), "--base", str(written / "whole")]) == 0
    assert "diffusers pipeline" in capsys.readouterr().out


def test_each_component_is_read_by_its_own_config(written, tmp_path):
    """Blocks of fp8 in the text encoder, whose size only its config.json tells; and a method that is not read."""
    home, name, rng = copied(written, tmp_path), "encoder.layers.1.mlp.fc1.weight", np.random.default_rng(0)
    values, config = load_file(home / TEXT), json.loads((home / "text_encoder/config.json").read_text())
    stored, scale = draw(rng, *values[name].shape).to(torch.float8_e4m3fn), draw(rng, 3, 1).abs() + 0.5
    save_file({**values, name: stored, f"{name}_scale_inv": scale}, home / TEXT)
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    (home / "text_encoder/config.json").write_text(json.dumps(config | settings))
    opened = open_checkpoint(home)
    info = opened.derived[f"text_encoder.{name}"]
    assert isinstance(info, Derived)
    assert info.sources == (f"text_encoder.{name}", f"text_encoder.{name}_scale_inv")
    expected = stored.float() * scale.repeat_interleave(4, 0)
    assert torch.equal(opened.load(f"text_encoder.{name}"), expected)
    assert torch.equal(opened.load(f"text_encoder.{name}", rows=5), expected[:5])
    assert open_checkpoint(home / TEXT).load(name).equal(expected)
    assert set(open_checkpoint(written / "whole").weights) == set(opened.weights)
    assert quantised_as(opened) == "fp8"
    settings["quantization_config"]["weight_block_size"] = [5, 5]
    (home / "text_encoder/config.json").write_text(json.dumps(config | settings))
    with pytest.raises(SpectraError, match="fc1"):
        open_checkpoint(home).load(f"text_encoder.{name}")


def a_lora(weights, rng, *, kohya):
    """Keys of a LoRA on some matrices of the denoiser and of the text encoder, and W1 by the formula."""
    tensors, expected = {}, {}
    names = [name for name in weights if ("to_q.weight" in name or "fc1.weight" in name or "q_proj.weight" in name)]
    names = [name for name in names if name.startswith(("unet.", "text_encoder."))]
    for name in names:
        W = weights[name]
        component, _, own = name.removesuffix(".weight").partition(".")
        rank = 2
        A, B = draw(rng, rank, W.shape[1]), draw(rng, W.shape[0], rank)
        if kohya:
            own = "text_model." + own if component == "text_encoder" else own  # as transformers called it before
            key = {"unet": "lora_unet", "text_encoder": "lora_te"}[component] + "_" + own.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = A, B
            tensors[f"{key}.alpha"] = torch.tensor(4.0)
            scaling = 2.0
        else:
            key, scaling = f"{component}.{own}", 1.0
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
        expected[name] = W.double() + scaling * B.double() @ A.double()
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}
    return tensors, expected


@pytest.mark.parametrize("kohya", [True, False])
@each_seed(range(10))
def test_a_lora_of_several_components(written, tmp_path, seed, kohya):
    tensors, expected = a_lora(values_of(written / "whole"), np.random.default_rng(seed), kohya=kohya)
    save_file(tensors, tmp_path / "lora.safetensors")
    _, skipped = check(written / ("whole", "variant", "shards")[seed % 3], tmp_path / "lora.safetensors", expected)
    assert skipped == ()


def test_a_second_text_encoder_is_told_from_the_first(written, tmp_path):
    """Both have the same names and shapes; the component says which is meant."""
    home = copied(written, tmp_path)
    shutil.copytree(home / "text_encoder", home / "text_encoder_2")
    index = json.loads((home / "model_index.json").read_text())
    index["text_encoder_2"] = index["text_encoder"]
    (home / "model_index.json").write_text(json.dumps(index))
    module = "encoder.layers.0.self_attn.q_proj"
    tensors: dict[str, torch.Tensor] = {}
    for component in ("text_encoder", "text_encoder_2"):
        tensors |= {f"{component}.{module}.lora_A.weight": torch.ones(1, 8)}
        tensors |= {f"{component}.{module}.lora_B.weight": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    tuned = open_checkpoint(tmp_path / "lora.safetensors")
    pairing = pair_layers(open_checkpoint(home), tuned, plan_updates(tuned))
    found = {pair.update.tensors[0].partition(".encoder")[0]: pair.base.name for pair in pairing.pairs}
    assert found == {name: f"{name}.{module}.weight" for name in ("text_encoder", "text_encoder_2")}


def test_which_of_several_files_is_meant(written, tmp_path):
    home = copied(written, tmp_path)
    expected = open_checkpoint(home).fingerprint(hash_contents=True)
    for variant in ("fp16", "ema"):
        shutil.copy(home / VAE, home / VAE.replace("model.", f"model.{variant}."))
    assert open_checkpoint(home).fingerprint(hash_contents=True) == expected, "the one without a name"
    (home / VAE).unlink()
    with pytest.raises(AmbiguousFilesError, match=r"model\.ema\.safetensors.*model\.fp16\.safetensors"):
        open_checkpoint(home)


def test_what_is_missing_or_elsewhere(written, tmp_path):
    home = copied(written, tmp_path)
    (home / UNET).unlink()
    with pytest.raises(MissingFileError, match="no weights"):
        open_checkpoint(home)
    torch.save({"w": torch.ones(2, 2)}, home / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="--allow-pickle"):
        open_checkpoint(home)
    assert "unet.w" in open_checkpoint(home, allow_pickle=True).tensors
    shutil.rmtree(home / "scheduler")
    assert open_checkpoint(home, allow_pickle=True).layout == "diffusers pipeline"
    shutil.rmtree(home / "vae")
    with pytest.raises(MissingFileError, match="names this component"):
        open_checkpoint(home, allow_pickle=True)
    (home / "vae").symlink_to(written / "whole" / "vae")
    with pytest.raises(UnsafeFileError, match="leads out"):
        open_checkpoint(home, allow_pickle=True)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"../outside": ["diffusers", "UNet2DConditionModel"]}, "no plain folder"),
        ({"/etc": ["diffusers", "UNet2DConditionModel"]}, "no plain folder"),
        ({"a\nspectra: error: fine": ["diffusers", "X"]}, "no plain folder"),
        ({"unet": ["diffusers", None], "vae": 7, "_class_name": ["a", "b"]}, "no model"),
        ({}, "no model"),
        ([], "expected a JSON object"),
        ({"unet": ["diffusers", {"a": 1}]}, "names this component"),
    ],
)
def test_an_index_that_is_hostile(tmp_path, capsys, index, words):
    (tmp_path / "box").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (tmp_path / "box" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SpectraError, match=words):
        open_checkpoint(tmp_path / "box")
    assert main(["inspect", str(tmp_path / "box")]) == 2
    said = capsys.readouterr().err
    assert said[:-1].isprintable()
    assert "box" in said


def test_a_pipeline_is_not_written(written, tmp_path):
    home = copied(written, tmp_path)
    with pytest.raises(UsageError, match="of a pipeline, name the model"):
        spectra.repair(home, written / "shards", to=tmp_path / "out", scale=0.5)
