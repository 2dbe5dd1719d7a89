"""PEFT's methods besides LoRA: tuned weights read from disk against peft's own merge, both in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters.peft import itself
from spectra.errors import AdapterError, UnsupportedMethodError, UsageError, WrongBaseError
from spectra.records.report import json_schema
from spectra.render.inspection import render_inspection
from tests.support.peft_methods import EVERY, METHODS, all_accounted_for, write
from tests.support.peft_models import DTYPES, check_against_merge, randomise, read_all, tiny_gpt2
from tests.support.seeds import each_seed

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("every_factor_of_boft")

SEEDS = range(20)


@each_seed(SEEDS)
@pytest.mark.parametrize("method", EVERY)
def test_equals_the_merge_of_the_whole_model(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    all_accounted_for(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_against_merge(model, tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("method", ["adalora", "vera", "ia3 rows", "ia3 columns"])
def test_gpt2_with_its_square_transposed_weights(tmp_path, method):
    torch.manual_seed(0)
    net = tiny_gpt2()
    net.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    config = {
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_modules=targets, total_step=10),
        "vera": lambda: peft.VeraConfig(r=5, target_modules=targets),
        "ia3 rows": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "ia3 columns": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=targets),
    }[method]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        randomise(model, 1)
        model.save_pretrained(tmp_path / "adapter")
        found, _ = read_all(tmp_path / "base", tmp_path / "adapter")
        merged = model.double().merge_and_unload().transformer.state_dict()
    assert len(found) == 2 * 4
    for name, (W1, layout) in found.items():
        assert layout == "conv1d"
        expected = merged[name.removeprefix("transformer.")].T
        assert torch.linalg.norm(W1 - expected) <= 1e-6 * torch.linalg.norm(expected), name


KINDS = {"adalora": "low_rank", "vera": "low_rank", "ia3": "scaled", "loha": "hadamard", "lokr": "kronecker"}
KINDS |= {"oft": "rotated", "boft": "rotated"}


@pytest.mark.parametrize("method", EVERY)
def test_every_engine_and_every_form_of_output(tmp_path, method):
    write(tmp_path, method, 4)  # where AdaLoRA has modules of rank 0
    reports = [
        spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4, engine=engine)
        for engine in ("exact", "cached", "krylov")
    ]
    counts = [[(layer.status, layer.intruders) for layer in report.layers] for report in reports]
    assert counts[0] == counts[1] == counts[2]
    assert {status for status, _ in counts[0]} <= {"analysed", "unchanged"}
    if method in METHODS:
        assert reports[0].tuned["format"] == f"peft-{method}"
    else:
        inspected = spectra.inspect(tmp_path / "adapter", tmp_path / "base")
        assert "as peft merges" in render_inspection([inspected])
    jsonschema.validate(json.loads(reports[0].to_json()), json_schema())
    kinds = {layer.update["kind"] for layer in reports[0].layers}
    assert kinds - {"dense"} == {KINDS.get(method, "by_peft")}


@each_seed([seed for seed in range(12) if DTYPES[seed % 4] in (torch.float32, torch.float64)])
@pytest.mark.parametrize("method", EVERY)
def test_a_merged_copy_is_the_merge_and_no_adapter_is_written(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    with pytest.raises(UsageError, match=r"repair writes LoRA and DoRA.*--merged"):
        spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0)
    assert not (tmp_path / "new").exists()
    if method in itself.METHODS and itself.METHODS[method].changes_bias:
        with pytest.raises(UsageError, match="changes biases as well"):
            spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0, merged=True)
        return
    spectra.repair(tmp_path / "adapter", tmp_path / "base", to=tmp_path / "new", scale=1.0, merged=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.double().merge_and_unload().state_dict()
    assert expected.keys() == written.keys()
    for name, value in expected.items():
        assert torch.linalg.norm(written[name].double() - value) <= 1e-6 * torch.linalg.norm(value), name
    assert spectra.verify(tmp_path / "new").holds


def test_what_oft_does_is_on_the_right(tmp_path):
    write(tmp_path, "oft", 0)
    report = spectra.audit(tmp_path / "adapter", tmp_path / "base", top_k=4)
    assert all("--side right" in layer.notes[0] for layer in report.layers)


def edited(
    folder, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Any]], None] | None = None
) -> None:
    if config is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        file = folder / "adapter_model.safetensors"
        values = load_file(file)
        tensors(values)
        save_file(values, file)


def resized(end: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        name = next(name for name in values if name.endswith(end))
        values[name] = torch.ones(shape)

    return change


def without(end: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values.pop(next(name for name in values if name.endswith(end)))

    return change


def with_another(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({f"base_model.model.layers.0.query.{name}": torch.ones(2, 2)})


BROKEN: list[tuple[str, dict[str, Any] | None, Callable[[dict[str, Any]], None] | None, type[Exception], str]] = [
    ("adalora", {"init_r": 77}, None, AdapterError, "r = 77"),
    ("adalora", {"rank_pattern": {"layers.0.query.lora_E": [True, "x"]}}, None, AdapterError, "booleans"),
    ("adalora", {"rank_pattern": [1]}, None, AdapterError, "not an object"),
    ("adalora", {"use_dora": True}, None, UnsupportedMethodError, "use_dora"),
    ("adalora", {"init_lora_weights": "pissa"}, None, UnsupportedMethodError, "pissa"),
    ("adalora", {"target_parameters": ["experts"]}, None, UnsupportedMethodError, "target_parameters"),
    ("adalora", None, without("query.lora_E"), AdapterError, "lora_E is missing"),
    ("adalora", None, resized("query.lora_E", 1, 1, 1), AdapterError, "query.lora_E.*dimensions"),
    ("adalora", None, with_another("hada_w1_a"), UnsupportedMethodError, "hada_w1_a.*LoHa"),
    ("vera", {"r": 21}, None, AdapterError, "r = 21"),
    ("vera", None, without("vera_B"), AdapterError, "vera_B is missing"),
    ("vera", None, resized("vera_B", 1, 15), AdapterError, "vera_B"),
    ("ia3", {"feedforward_modules": ["query", "down"]}, None, AdapterError, "query.ia3_l.*is one"),
    ("ia3", {"feedforward_modules": [3]}, None, AdapterError, "expected names"),
    ("ia3", None, resized("query.ia3_l", 2, 2), AdapterError, "one row or one column"),
    ("ia3", None, resized("query.ia3_l", 99, 1), WrongBaseError, "query.ia3_l.*wrong base"),
    ("loha", {"r": 9}, None, AdapterError, "r = 9"),
    ("loha", {"alpha": "high"}, None, AdapterError, "alpha.*expected a number"),
    ("loha", {"sparkle": 1}, None, UnsupportedMethodError, "sparkle"),
    ("loha", None, without("query.hada_w2_a"), AdapterError, "hada_w2_a is missing"),
    ("lokr", {"rank_pattern": {"query": 0.5}}, None, AdapterError, r"r = 0\.5"),
    ("lokr", None, without("query.lokr_w1"), AdapterError, "lokr_w1_a is missing"),
    ("lokr", None, with_another("lokr_w1_a"), AdapterError, "both lokr_w1 and lokr_w1_a"),
    ("lokr", None, resized("query.lokr_w1", 17, 19), WrongBaseError, "query.lokr_w1.*wrong base"),
    ("oft", {"peft_version": "0.17.1"}, None, UnsupportedMethodError, "before 0.18"),
    ("oft", {"oft_block_size": 0}, None, AdapterError, "one of r and oft_block_size"),
    ("oft", {"num_cayley_neumann_terms": 10**9}, None, AdapterError, "num_cayley_neumann_terms"),
    ("oft", {"block_share": True}, None, AdapterError, "block_share"),
    ("oft", None, resized("query.oft_R.weight", 3, 4), AdapterError, "query.oft_R.weight.*blocks of size b"),
    ("oft", None, with_another("oft_embedding_R.weight"), AdapterError, "both oft_R and oft_embedding_R"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "config", "tensors", "error", "words"), BROKEN)
def test_contradictions_are_named(tmp_path, method, config, tensors, error, words):
    write(tmp_path, method, 4 if method == "oft" else 0)
    edited(tmp_path / "adapter", config, tensors)
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tmp_path / "adapter", tmp_path / "base")
    assert "adapter" in str(caught.value)


@pytest.mark.parametrize("method", ["adalora", "oft", "boft", "ia3"])
def test_grouped_convolutions_are_skipped(tmp_path, method):
    factors: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "adalora": (
            {"init_r": 2},
            {"lora_A": torch.ones(2, 36), "lora_B": torch.ones(6, 2), "lora_E": torch.ones(2, 1)},
        ),
        "oft": ({"oft_block_size": 4, "r": 0, "peft_version": "0.21.2"}, {"oft_R.weight": torch.ones(9, 6)}),
        "boft": ({"boft_block_size": 4}, {"boft_R": torch.ones(1, 9, 4, 4), "boft_s": torch.ones(1, 6)}),
        "ia3": ({"feedforward_modules": ["grouped"]}, {"ia3_l": torch.ones(1, 4, 1, 1)}),
    }
    (tmp_path / "base").mkdir()
    save_file({"grouped.weight": torch.randn(6, 2, 3, 3)}, tmp_path / "base" / "model.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config, values = factors[method]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": method.upper()} | config))
    save_file({f"base_model.model.grouped.{k}": v for k, v in values.items()}, folder / "adapter_model.safetensors")
    found, skipped = read_all(tmp_path / "base", folder)
    assert not found
    assert "2 groups" in skipped[0].reason
