"""``spectra audit`` as people call it: results, messages, exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.cli import main
from spectra.records.report import json_schema
from tests.support.commands import run
from tests.support.paths import FIXTURES, MEMBERS

LORA, BASE, FULL = (str(FIXTURES / name) for name in ("lora-r4", "base", "full"))


def test_table(capsys):
    code, out, err = run(capsys, "audit", LORA)
    report = spectra.audit(LORA)
    assert code == 0
    assert err == "", "no bar where nobody looks"
    assert out.startswith(f"Intruder dimensions: {report.total()} of 280 leading singular vectors of 28 layers (")
    assert "rank 4, alpha 8, scaling 2" in out
    assert "new module: the base has no such weight (score)" in out
    worst = max(report.layers, key=lambda layer: layer.intruders)
    assert worst.name in out
    for layer in report.layers:
        row = next(line for line in out.splitlines() if line.startswith(layer.name.removeprefix("model.layers.") + " "))
        assert row.count("█") == layer.intruders


def test_ascii_where_the_terminal_knows_no_more(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["audit", LORA]) == 0
    sys.stdout.seek(0)
    assert "#" in sys.stdout.read()


@pytest.mark.parametrize("member", MEMBERS)
def test_json_follows_the_schema(capsys, member):
    code, out, _ = run(capsys, "audit", str(FIXTURES / member), "--base", BASE, "--format", "json")
    assert code == 0
    value = json.loads(out)
    jsonschema.validate(value, json_schema())
    again = spectra.Report.from_dict(value).to_dict()
    assert json.loads(json.dumps(again)) == value


def test_csv_and_dataframe_agree(capsys):
    _, out, _ = run(capsys, "audit", LORA, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    frame = spectra.audit(LORA).to_dataframe()
    assert len(rows) == len(frame) == 280
    assert sum(row["intruder"] == "True" for row in rows) == frame["intruder"].sum()
    assert [row["layer"] for row in rows] == list(frame["layer"])
    assert rows[0]["tuned"] == LORA


def test_several_give_a_summary_or_json_lines(capsys):
    _, out, _ = run(capsys, "audit", LORA, FULL, "--base", BASE)
    assert len([line for line in out.splitlines() if line.startswith(str(FIXTURES))]) == 2
    for form in ("json", "jsonl"):
        _, out, _ = run(capsys, "audit", LORA, FULL, "--base", BASE, "--format", form)
        assert [json.loads(line)["tuned"]["format"] for line in out.splitlines()] == ["peft-lora", "full"]


def test_options_reach_the_analysis(capsys):
    options = ["-k", "3", "-e", "0.4", "--side", "right", "--include", "q_proj", "--exclude", "layers.3"]
    options += ["--dtype", "float64", "--threads", "1", "--workers", "2", "--hash-contents", "--format", "json"]
    _, out, _ = run(capsys, "audit", LORA, *options)
    report = json.loads(out)
    assert {len(layer["vectors"]) for layer in report["layers"]} == {3}
    assert [layer["module_type"] for layer in report["layers"]] == ["self_attn.q_proj"] * 3
    assert report["settings"] == {
        "top_k": 3, "epsilon": 0.4, "side": "right", "engine": "auto", "dtype": "float64", "device": "cpu",
        "threads": 1, "workers": 2, "include": ["q_proj"], "exclude": ["layers.3"], "hash_contents": True,
    }  # fmt: skip
    assert report["base"]["fingerprint_covers"] == "contents"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-k", "0"], "top-k = 0"),
        (["-e", "0"], "epsilon = 0.0"),
        (["-e", "1.5"], "epsilon = 1.5"),
        (["-e", "nan"], "epsilon = nan"),
        (["--workers", "0"], "at least 1"),
        (["--device", "nonsense"], "expected cpu or cuda"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--fail-on", "new"], "--baseline"),
        (["--fail-on", "paper"], "--fail-above"),
        (["--include", "no such layer"], "nothing to analyse (left out by --include or --exclude, such as 'model."),
        (["--output", "report.xlsx"], "report.xlsx: ends in none of .json, .jsonl, .csv, .parquet, .sarif, .txt"),
        (["--output", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_usage(capsys, arguments, words):
    code, out, err = run(capsys, "audit", LORA, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_gate(capsys):
    total = spectra.audit(LORA).total("all")
    assert run(capsys, "audit", LORA, "--fail-above", str(total))[0] == 0
    code, out, err = run(capsys, "audit", LORA, "--fail-above", str(total - 1))
    assert code == 1
    assert out.startswith("Intruder dimensions: ")
    assert f"intruders (judged): {total}, more than {total - 1}" in err


@pytest.mark.parametrize("at", ["12.5%", "0.125", "1/8"])
def test_gate_on_a_share(capsys, at):
    report = spectra.audit(LORA)
    assert (report.total(), report.compared()) == (35, 280)
    assert run(capsys, "audit", LORA, "--fail-above-share", at)[0] == 0, "at the limit is not above it"
    code, _, err = run(capsys, "audit", LORA, "--fail-above-share", "12.4%")
    assert code == 1
    assert "intruders (judged): 35 of 280 vectors (12.5%), more than 12.4%" in err


def test_gates_on_a_number_and_a_share_hold_each(capsys):
    code, _, err = run(capsys, "audit", LORA, "--fail-above", "30", "--fail-above-share", "50%")
    assert (code, err.count("intruders (judged): 35, more than 30\n")) == (1, 1)
    code, _, err = run(capsys, "audit", LORA, "--fail-above", "30", "--fail-above-share", "1%")
    assert "35, more than 30; 35 of 280 vectors (12.5%), more than 1%" in err


@pytest.mark.parametrize("text", ["10", "-1%", "101%", "nan", "ten", "", "%", "1/0"])
def test_a_share_is_a_share(capsys, text):
    with pytest.raises(SystemExit) as stop:
        run(capsys, "audit", LORA, f"--fail-above-share={text}")
    assert stop.value.code == 2
    assert f"expected a share such as 10% or 0.1, got {text!r}" in capsys.readouterr().err


def test_gate_on_a_chosen_total(capsys, make_base, make_adapter, rng):
    head = rng.normal(size=(40, 40)) * 0.01 + np.diag(np.geomspace(40, 1, 40))
    base = make_base({"lm_head.weight": head.astype("f4"), "layer.0.q.weight": head.astype("f4")})
    B, A = rng.normal(size=(40, 1)).astype("f4"), rng.normal(size=(1, 40)).astype("f4")
    tuned = str(make_adapter({"lm_head": (B * 9, A), "layer.0.q": (B * 0, A + 1)}))
    assert spectra.audit(tuned, base).summary["layers_unchanged"] == 1
    assert run(capsys, "audit", tuned, "--fail-above", "0")[0] == 1
    assert run(capsys, "audit", tuned, "--fail-above", "0", "--fail-on", "paper")[0] == 0
    assert run(capsys, "audit", tuned, "--fail-above-share", "0", "--fail-on", "paper")[0] == 0
    assert run(capsys, "audit", tuned, "--fail-above-share", "0")[0] == 1


def test_baseline_fails_on_new_intruders_only(capsys, tmp_path):
    known = tmp_path / "known.json"
    assert run(capsys, "audit", LORA, "--format", "json", "-o", str(known))[0] == 0
    assert run(capsys, "audit", LORA, "--baseline", str(known))[0] == 0
    stronger = str(FIXTURES / "rslora-r16")
    code, out, err = run(capsys, "audit", stronger, "--baseline", str(known))
    assert code == 1
    before = {layer.name: layer.intruders for layer in spectra.audit(LORA).layers}
    now = spectra.audit(stronger).layers
    new = sum(max(layer.intruders - before[layer.name], 0) for layer in now)
    gone = sum(max(before[layer.name] - layer.intruders, 0) for layer in now)
    total = spectra.audit(LORA).total("all")
    assert f"with {total}: {new} new, {total - gone} still there, {gone} gone." in out
    assert f"intruders (new): {new}" in err
    assert run(capsys, "audit", stronger, "--baseline", str(known), "--fail-above", str(new))[0] == 0
    assert run(capsys, "audit", stronger, "--baseline", str(known), "--fail-above-share", f"{new}/280")[0] == 0
    assert run(capsys, "audit", stronger, "--baseline", str(known), "--fail-above-share", f"{new - 1}/280")[0] == 1
    code, _, err = run(capsys, "audit", stronger, "--baseline", str(known), "-e", "0.4")
    assert code == 2
    assert "epsilon" in err
    code, _, err = run(capsys, "audit", stronger, LORA, "--baseline", str(known))
    assert code == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "spectra.report/9"}', '{"schema": "spectra.report/1"}'])
def test_baseline_that_is_no_report(capsys, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    code, out, err = run(capsys, "audit", LORA, "--baseline", str(tmp_path / "x.json"))
    assert (code, out) == (2, "")
    assert "x.json" in err


def test_non_finite_layer_after_the_rest_has_been_reported(capsys, tmp_path):
    shutil.copytree(LORA, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 1] = float("nan")
    save_file(tensors, file)
    code, out, err = run(capsys, "audit", str(tmp_path / "adapter"), "--base", BASE, "--format", "json")
    assert code == 2
    report = json.loads(out)
    jsonschema.validate(report, json_schema())
    assert report["summary"]["layers_analysed"] == 27
    assert report["summary"]["layers_failed"] == 1
    failed = next(layer for layer in report["layers"] if layer["status"] != "analysed")
    assert failed["status"] == "non_finite"
    assert name in err
    assert err.count("\n") == 1
    code, out, _ = run(capsys, "audit", str(tmp_path / "adapter"), "--base", BASE)
    assert code == 2
    assert "1 FAILED" in out


def test_non_finite_base(capsys, tmp_path, rng, make_base):
    weights = {f"layer.{i}.q.weight": rng.normal(size=(8, 8)).astype("f4") for i in range(3)}
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    weights["layer.1.q.weight"][0, 0] = np.inf
    code, out, err = run(capsys, "audit", str(tuned), "--base", str(make_base(weights)), "--format", "json")
    assert code == 2
    assert [layer["status"] for layer in json.loads(out)["layers"]] == ["analysed", "non_finite", "analysed"]
    assert "layer.1.q.weight" in err


def test_the_rest_is_audited_when_one_cannot_be_read(capsys, tmp_path):
    (tmp_path / "README.md").write_text("no weights at all, but a text that is long enough to be read as a header")
    code, out, err = run(capsys, "audit", LORA, str(tmp_path / "README.md"), FULL, "--base", BASE)
    assert code == 2
    assert LORA in out
    assert FULL in out
    assert err.count("\n") == 1
    assert "README.md: not a safetensors file" in err


def test_a_failed_layer_shows_in_the_summary(capsys, tmp_path):
    shutil.copytree(LORA, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    code, out, err = run(capsys, "audit", str(tmp_path / "adapter"), FULL, "--base", BASE)
    assert code == 2
    assert "(1 layer failed)" in out
    assert "up_proj.lora_A.weight: holds NaN or infinity" in err
    assert "lora_B" not in err


def test_unrelated_weights_are_suspected(capsys, make_base, rng):
    spread = np.linspace(9, 1, 64)
    weights = [
        {f"layer.{i}.q.weight": (rng.normal(size=(64, 64)) * spread).astype("f4") for i in range(3)} for _ in "ab"
    ]
    _, out, _ = run(capsys, "audit", str(make_base(weights[0], "tuned")), "--base", str(make_base(weights[1])))
    assert "are these two related at all?" in out


def test_swapped_arguments_are_explained(capsys):
    code, _, err = run(capsys, "audit", BASE, "--base", LORA)
    assert code == 2
    assert "this is an adapter" in err


def test_unchanged_layers_are_not_decomposed(capsys, make_base, rng, monkeypatch):
    weights = {"layer.0.q.weight": torch.from_numpy(rng.normal(size=(8, 8)))}
    base = make_base({name: value.bfloat16() for name, value in weights.items()})
    same = make_base({name: value.bfloat16().float() for name, value in weights.items()}, "tuned")
    monkeypatch.setattr(torch.linalg, "svd", None)
    code, out, _ = run(capsys, "audit", str(same), "--base", str(base))
    assert code == 0
    assert out.startswith("Nothing changed: ")
    assert "1 unchanged" in out


def test_a_base_of_plain_noise_gets_no_severe_verdict(capsys, make_base, rng):
    weights = {"layer.0.q.weight": rng.normal(size=(64, 64)).astype("f4")}
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    code, out, _ = run(capsys, "audit", str(tuned), "--base", str(make_base(weights)))
    assert code == 0
    assert out.startswith("Cannot tell: ")


def test_every_place_has_the_count_without_noise_like_layers(capsys, make_base, rng):
    """What a gate counts is what the headline, the table, the records and the ``repr`` say."""
    trained = rng.normal(size=(64, 64)) + 40 * np.outer(*np.linalg.qr(rng.normal(size=(64, 2)))[0].T)
    weights = {"layer.0.q.weight": trained.astype("f4"), "pooler.dense.weight": rng.normal(size=(64, 64)).astype("f4")}
    spike = 400 * np.outer(*np.linalg.qr(rng.normal(size=(64, 2)))[0].T)
    base = str(make_base(weights))
    tuned = str(make_base({**weights, "pooler.dense.weight": (weights["pooler.dense.weight"] + spike).astype("f4"),
                           "layer.0.q.weight": weights["layer.0.q.weight"] * np.float32(1.01)}, "tuned"))  # fmt: skip
    report = spectra.audit(tuned, base)
    assert (report.total(), report.total("all")) == (0, 1)
    assert "0 intruders in 10 vectors" in repr(report)
    assert report.share == 0
    limit = ["audit", tuned, "--base", base, "--fail-above", "0"]
    code, out, _ = run(capsys, *limit)
    assert code == 0
    assert out.startswith(
        "No intruder dimensions among 10 leading singular vectors of 1 layer (1 noise-like layer apart"
    )
    assert "0 in 0 layers; 1 in all layers, noise-like ones included" in out
    assert run(capsys, *limit, "--fail-on", "all")[0] == 1
    code, out, _ = run(capsys, "repair", tuned, "--base", base, "--dry-run", "--scale", "0")
    assert out.startswith("Dry run: no singular vector was chosen")
    assert "another intruder lies in layers whose base is plain noise" in out
    code, out, _ = run(capsys, "repair", tuned, "--base", base, "--dry-run", "--scale", "0", "--noise-like")
    assert out.startswith("Dry run: 1 intruder dimension in 1 layer would be removed; 1 intruder before, 0 after.")


def test_float64_weights_are_not_rounded(capsys, make_base, rng):
    weights = {"layer.0.q.weight": rng.normal(size=(40, 40))}
    base = make_base(weights)
    tuned = make_base({name: value * (1 + 1e-12) for name, value in weights.items()}, "tuned")
    layer = spectra.audit(tuned, base).layers[0]
    assert layer.status == "analysed"
    assert "float64_weights" in layer.flags
    assert layer.measures["update_norm_relative"] == pytest.approx(1e-12, rel=1e-3)


def test_an_adapters_file_is_its_folder(capsys):
    code, out, _ = run(capsys, "audit", f"{LORA}/adapter_model.safetensors", "--format", "csv")
    assert code == 0
    assert "q_proj" in out


def test_baselines_with_and_without_verify_compare(capsys, tmp_path):
    known = str(tmp_path / "known.json")
    run(capsys, "audit", LORA, "--hash-contents", "-o", known)
    assert run(capsys, "audit", LORA, "--baseline", known)[0] == 0
    assert run(capsys, "audit", LORA, "--hash-contents", "--baseline", known)[0] == 0
    other = tmp_path / "base"
    shutil.copytree(BASE, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    code, _, err = run(capsys, "audit", LORA, "--base", str(other), "--hash-contents", "--baseline", known)
    assert code == 2
    assert "another base" in err


def test_baselines_that_make_no_sense(capsys, tmp_path):
    known = tmp_path / "known.json"
    run(capsys, "audit", LORA, "-o", str(known))
    good = json.loads(known.read_text())
    for key, value in (("settings", {}), ("settings", []), ("base", []), ("layers", [{}]), ("layers", 3)):
        known.write_text(json.dumps(good | {key: value}))
        assert run(capsys, "audit", LORA, "--baseline", str(known))[0] == 2
    good["layers"][0]["intruders"] = "x"
    known.write_text(json.dumps(good))
    assert run(capsys, "audit", LORA, "--baseline", str(known))[0] == 2
    known.write_text("[" * 100_000)
    assert run(capsys, "audit", LORA, "--baseline", str(known))[0] == 2


def test_progress_goes_to_a_terminal_on_standard_error(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(capsys, "audit", LORA)
    assert code == 0
    assert "%|" in err
    assert "left" in err
    assert "%|" not in out
    assert run(capsys, "audit", LORA, "--quiet")[2] == ""


def test_python_mirrors_the_command():
    report = spectra.audit(Path(LORA), top_k=4)
    assert isinstance(report, spectra.Report)
    assert {len(layer.vectors) for layer in report.layers} == {4}


def test_verbose_says_how_much_memory(capsys):
    assert main(["audit", str(FIXTURES / "lora-r1"), "--include", "*.layers.0.*_proj", "--verbose"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"spectra: 100%  memory \d+\.\d\d GiB  model\.layers\.0\.\S+", lines[-2])
    found = re.fullmatch(r"spectra: peak memory (\d+\.\d\d) GiB, (\d+\.\d\d) GiB above the libraries", lines[-1])
    assert found
    assert 0.1 < float(found[1]) < 16
    assert float(found[2]) < float(found[1])
    assert main(["audit", str(FIXTURES / "lora-r1"), "--include", "*.layers.0.*", "--verbose", "--quiet"]) == 0
    assert not capsys.readouterr().err
