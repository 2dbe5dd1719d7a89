"""LoRAs of MLX against their formulas, written out entry by entry."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import AdapterError, CorruptFileError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from tests.support.dialects import DTYPES, check, draw, write
from tests.support.seeds import each_seed

SEEDS = range(24)
ONE = torch.ones(())


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
@each_seed(SEEDS)
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
    with pytest.raises(UsageError, match="a repair of a part of the fine-tune"):
        spectra.repair(tuned, base, to=tmp_path / "out", scale=0.5)
    keys = one_mlx(rng)
    spectra.repair(write_mlx(tmp_path / "one", keys), base, to=tmp_path / "merged", scale=1.0, merged=True)
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.adapter_config is None
    expected = open_checkpoint(base).read("a.q.weight") + 20 * (keys["a.q.lora_a"] @ keys["a.q.lora_b"]).T
    torch.testing.assert_close(merged.read("a.q.weight"), expected)
    assert main(["inspect", str(tuned)]) == 0
    assert "mlx-lora" in capsys.readouterr().out
