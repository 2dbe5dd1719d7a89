"""What is said of a base that is quantised."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

import spectra
from spectra.cli import main
from spectra.pairing.precision import sounds_quantised
from tests.support.paths import ROOT
from tests.support.quantised import E4M3, draw

NAMED = [
    ("unsloth/llama-3-8b-bnb-4bit", True),
    ("TheBloke/Mistral-7B-v0.1-GPTQ", True),
    ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
    ("neuralmagic/Meta-Llama-3-8B-Instruct-FP8", True),
    ("org/x.w4a16", True),
    ("/home/me/awq-experiments/llama/", False),
    ("meta-llama/Llama-3.2-1B", False),
    ("org/rabbit-1b", False),
    ("org/model-128bit", False),
]


@pytest.mark.parametrize(("name", "expected"), NAMED)
def test_names_that_say_that_a_model_is_quantised(name, expected):
    assert sounds_quantised(name) is expected


@pytest.mark.parametrize(
    ("quantised", "named", "says"),
    [
        (True, "../base", ["relative to its dequantised weights"]),
        (True, "org/model", ["relative to its dequantised weights", "audit it against those"]),
        (True, "org/model-fp8", ["relative to its dequantised weights"]),
        (False, "org/model-bnb-4bit", ["was not trained on"]),
        (False, "org/model", []),
        (False, "../base", []),
    ],
)
def test_the_caveat_is_in_the_report_and_in_the_text(opened, make_adapter, rng, capsys, quantised, named, says):
    weight = draw(rng, 24, 20)
    opened({"m.weight": weight.to(E4M3) if quantised else weight})
    adapter = make_adapter({"m": (draw(rng, 24, 2).numpy(), draw(rng, 2, 20).numpy())}, base_model_name_or_path=named)
    base = adapter.parent / "base"
    report = spectra.audit(adapter, base=base)
    caveat = report.base["caveat"] or ""
    assert bool(caveat) is bool(says)
    assert all(part in caveat for part in says)
    assert ("audit it against" in caveat) is ("audit it against those" in says)
    assert main(["audit", str(adapter), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert f"note: {caveat}" in text if says else "quantised" not in text
    value = json.loads(report.to_json())
    jsonschema.validate(value, json.loads((ROOT / "spectra" / "records" / "report.schema.json").read_text()))
    assert spectra.Report.from_dict(value).base_quantised is quantised


def test_a_fine_tune_and_its_base_at_different_precisions(opened, rng):
    weight = draw(rng, 24, 20)
    full = opened({"m.weight": weight}, folder="full")
    eight = opened({"m.weight": weight.to(E4M3)}, folder="eight")
    assert "the fine-tune is stored as fp8" in spectra.audit(eight.path, base=full.path).base["caveat"]
    assert "rounding changed in the base" in spectra.audit(full.path, base=eight.path).base["caveat"]
    assert "update" not in spectra.audit(eight.path, base=eight.path).base["caveat"]


@pytest.mark.parametrize(
    "command",
    [["compare"], ["ranks"], ["repair", "--scale", "0.5", "--dry-run"]],
)
def test_every_command_says_that_the_base_is_quantised(opened, make_adapter, rng, capsys, command):
    base = opened({"m.weight": draw(rng, 24, 20).to(E4M3)})
    adapter = make_adapter({"m": (4 * draw(rng, 24, 2).numpy(), draw(rng, 2, 20).numpy())})
    assert main([command[0], str(adapter), "--base", str(base.path), *command[1:]]) == 0
    assert re.search("note: .*stored as fp8.*dequantised", capsys.readouterr().out)
