"""``spectra ranks`` as people call it."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import run
from tests.support.paths import FIXTURES

peft = pytest.importorskip("peft")


def test_the_command(capsys, tmp_path):
    code, out, err = run(capsys, "ranks", FIXTURES / "full", "--base", FIXTURES / "base", "--by", "type")
    assert (code, err) == (0, "")
    assert out.startswith("Suggestion: LoRA with r = ")
    assert "alpha = 2r is a recommendation" in out
    config = json.loads(out[out.index("config\n") + 7 :])
    assert peft.LoraConfig(**config).rank_pattern == config["rank_pattern"]

    target = tmp_path / "adapter"
    code, out, err = run(
        capsys, "extract", FIXTURES / "full", "--base", FIXTURES / "base", "--energy", 0.8, "--alpha", 16, "--rslora",
        "--to", target, "-o", tmp_path / "ranks.json",
    )  # fmt: skip
    assert (code, out) == (0, "")
    assert "wrote" in err
    assert "largest error" in err
    value = json.loads((tmp_path / "ranks.json").read_text())
    assert value["suggestion"]["energy"] == 0.8
    assert value["suggestion"]["lora_alpha"] == 16
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert config["rank_pattern"] == value["suggestion"]["rank_pattern"]
    code, out, _ = run(capsys, "ranks", FIXTURES / "lora-r4", "--format", "csv")
    assert code == 0
    assert len(out.splitlines()) == 29


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora-r4", "--energy", "2"], "energy = 2.0"),
        (["lora-r4", "--max-rank", "0"], "max_rank = 0"),
        (["lora-r4", "--alpha", "r2"], "alpha = 'r2'"),
        (["full"], "--base"),
        (["nothing"], "no such file"),
        (["lora-r4", "--dtype", "float64", "--device", "tpu"], "device = 'tpu'"),
    ],
)
def test_bad_usage(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, "ranks", FIXTURES / arguments[0], *arguments[1:])
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_config_alone(capsys, tmp_path):
    target = tmp_path / "adapter_config.json"
    code, out, _ = run(capsys, "ranks", FIXTURES / "full", "--base", FIXTURES / "base", "-o", target)
    assert (code, out) == (0, "")
    config = json.loads(target.read_text())
    assert config["peft_type"] == "LORA"
    assert peft.LoraConfig(**config).r == config["r"]


def test_an_adapter_has_nothing_to_extract(capsys, tmp_path):
    code, out, err = run(capsys, "extract", FIXTURES / "lora-r4", "--to", tmp_path / "x")
    assert (code, out) == (2, "")
    assert "adapter already" in err
    assert not (tmp_path / "x").exists()
