"""The command line: results, messages, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.cli import main
from spectra.records.report import json_schema
from tests.support.paths import FIXTURES, MEMBERS, ROOT

LORA, BASE, FULL = (str(FIXTURES / name) for name in ("lora-r4", "base", "full"))


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_table(capsys):
    code, out, err = run(capsys, "audit", LORA)
    report = spectra.audit(LORA)
    assert code == 0
    assert err == "", "no bar where nobody looks"
    assert out.startswith("Verdict: STRONG")
    assert f"{report.total('all')} of 280" in out
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
    options += ["--dtype", "float64", "--threads", "1", "--workers", "2", "--verify", "--format", "json"]
    _, out, _ = run(capsys, "audit", LORA, *options)
    report = json.loads(out)
    assert {len(layer["vectors"]) for layer in report["layers"]} == {3}
    assert [layer["module_type"] for layer in report["layers"]] == ["self_attn.q_proj"] * 3
    assert report["settings"] == {
        "top_k": 3, "epsilon": 0.4, "side": "right", "engine": "auto", "dtype": "float64", "device": "cpu",
        "threads": 1, "workers": 2, "include": ["q_proj"], "exclude": ["layers.3"], "verify": True,
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


def test_unknown_options_exit_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["audit", LORA, "--nonsense"])
    assert caught.value.code == 2


def test_gate(capsys):
    total = spectra.audit(LORA).total("all")
    assert run(capsys, "audit", LORA, "--fail-above", str(total))[0] == 0
    code, out, err = run(capsys, "audit", LORA, "--fail-above", str(total - 1))
    assert code == 1
    assert out.startswith("Verdict")
    assert f"intruders (all): {total}, more than {total - 1}" in err


def test_gate_on_a_chosen_total(capsys, make_base, make_adapter, rng):
    head = rng.normal(size=(40, 40)) * 0.01 + np.diag(np.linspace(9, 1, 40))
    base = make_base({"lm_head.weight": head.astype("f4"), "layer.0.q.weight": head.astype("f4")})
    B, A = rng.normal(size=(40, 1)).astype("f4"), rng.normal(size=(1, 40)).astype("f4")
    tuned = str(make_adapter({"lm_head": (B * 5, A), "layer.0.q": (B * 0, A + 1)}))
    assert spectra.audit(tuned, base).summary["layers_unchanged"] == 1
    assert run(capsys, "audit", tuned, "--fail-above", "0")[0] == 1
    assert run(capsys, "audit", tuned, "--fail-above", "0", "--fail-on", "paper")[0] == 0


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
    assert out.startswith("Verdict: nothing changed.")
    assert "1 unchanged" in out


def test_output_appears_whole_and_replaces_only_reports(capsys, tmp_path):
    target = tmp_path / "report.json"
    code, out, err = run(capsys, "audit", LORA, "-o", str(target))  # its ending says json
    assert (code, out) == (0, "")
    assert err == f"spectra: wrote {target} (json)\n"
    first = json.loads(target.read_text())
    assert first["summary"]["intruders"] == spectra.audit(LORA).total("all")
    assert list(tmp_path.iterdir()) == [target], "no temporary file stays"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert run(capsys, "audit", LORA, "-k", "2", "--format", "json", "-o", str(target))[0] == 0
    assert json.loads(target.read_text())["settings"]["top_k"] == 2
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"precious")
    code, _, err = run(capsys, "audit", LORA, "-o", str(precious))
    assert code == 2
    assert "not overwritten" in err
    assert precious.read_bytes() == b"precious"
    for name in ("one.json", "two.csv", "three.txt"):
        (tmp_path / name).write_text("{}")
        assert run(capsys, "audit", LORA, "-o", str(tmp_path / name))[0] == 2
        assert (tmp_path / name).read_text() == "{}"
    assert run(capsys, "audit", LORA, "-o", str(tmp_path))[0] == 2


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_form_of_report_can_be_written_again(capsys, tmp_path, form, count):
    target = str(tmp_path / "report")
    for _ in range(2):
        assert run(capsys, "audit", *[LORA] * count, "--format", form, "-o", target)[0] == 0


def test_inspect(capsys):
    code, out, _ = run(capsys, "inspect", LORA, FULL, "--base", BASE)
    assert code == 0
    assert "peft-lora" in out
    assert "28 matched" in out
    assert "29 matched" in out
    code, out, _ = run(capsys, "inspect", LORA, "--format", "json")
    found = json.loads(out)[0]
    assert found["facts"]["rank"] == 4
    assert len([update for update in found["updates"] if update["base_tensor"]]) == 28
    _, out, _ = run(capsys, "inspect", LORA, "--verbose")
    assert "q_proj.lora_A.weight  F32 [4, 160]" in out


def test_inspect_names_what_it_does_not_read(capsys, make_base, make_adapter, rng):
    W = rng.normal(size=(8, 8)).astype("f4")
    words = rng.normal(size=(20, 8)).astype("f4")
    base = make_base({"q.weight": W, "embed_tokens.weight": words})
    tuned = make_base({"q.weight": W + 1, "embed_tokens.weight": np.concatenate([words, words[:3]])}, "tuned")
    second = make_adapter({"q": (np.ones((8, 1), "f4"), np.ones((1, 8), "f4"))})
    second.rename(tuned / "second")
    (tuned / "assets").mkdir()
    (tuned / "training_args.bin").write_bytes(b"")
    code, out, err = run(capsys, "inspect", str(tuned), "--base", str(base))
    assert (code, err) == (0, "")
    assert "  not read   also here: second/\n" in out
    assert "embed_tokens: vocabulary resized from 20 to 23 rows: the 20 shared ones are compared" in out
    _, out, _ = run(capsys, "audit", str(tuned), "--base", str(base), "--verbose")
    assert out.endswith("\nalso here, not read: second/\n")
    assert "also here" not in run(capsys, "audit", str(tuned), "--base", str(base))[1]


def test_inspect_goes_on_after_a_bad_path(capsys, tmp_path):
    code, out, err = run(capsys, "inspect", str(tmp_path / "nothing"), BASE)
    assert code == 2
    assert BASE in out
    assert "no such file" in err


def test_inspect_names_what_does_not_fit(capsys, make_adapter, make_base, rng):
    tuned = make_adapter({"layer.0.q": (np.ones((3, 1), "f4"), np.ones((1, 3), "f4"))})
    other = make_base({"layer.0.q.weight": np.ones((8, 8), "f4")}, "other")
    code, out, err = run(capsys, "inspect", str(tuned), "--base", str(other))
    assert code == 2
    assert "wrong base" in out  # beside what could be told
    assert err.count("spectra: error:") == 1
    assert "wrong base" in err


def test_inspect_needs_no_torch():
    code = "import sys; from spectra.cli import main; main(['inspect', sys.argv[1]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, LORA], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"]])
def test_help_answers_at_once(arguments):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "spectra", *arguments], capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
        assert result.stdout
    assert min(seconds) < 0.5


def test_a_base_of_plain_noise_gets_no_severe_verdict(capsys, make_base, rng):
    weights = {"layer.0.q.weight": rng.normal(size=(64, 64)).astype("f4")}
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    code, out, _ = run(capsys, "audit", str(tuned), "--base", str(make_base(weights)))
    assert code == 0
    assert out.startswith("Verdict: CANNOT TELL")


def test_interrupt_exits_with_130(tmp_path, make_base, rng):
    weights = {f"layer.{i}.q.weight": rng.normal(size=(1200, 1200)).astype("f4") for i in range(20)}
    base = make_base(weights)
    tuned = make_base({name: value + 1 for name, value in weights.items()}, "tuned")
    command = [sys.executable, "-m", "spectra", "audit", str(tuned), "--base", str(base), "-o", str(tmp_path / "r.txt")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what runs in the background has not
    )  # fmt: skip
    time.sleep(4)
    assert process.poll() is None, "finished before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "spectra: interrupted"
    assert not (tmp_path / "r.txt").exists()


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m spectra audit {LORA} --format csv | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""
    assert result.stdout.startswith("tuned,layer")


def test_a_reader_that_leaves_early_gets_the_verdict_all_the_same():
    command = f"set -o pipefail; {sys.executable} -m spectra audit {LORA} --format csv --fail-above 0 | true"
    assert subprocess.run(["bash", "-c", command], stderr=subprocess.DEVNULL, cwd=ROOT).returncode == 1


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
def test_standard_output_that_takes_nothing(redirect):
    command = f"{sys.executable} -m spectra audit {LORA} {redirect}"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "standard output" in result.stderr
    assert "Traceback" not in result.stderr


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


@pytest.mark.parametrize("arguments", [["audit", ""], ["audit", LORA, "--base", ""], ["audit", "x" * 5000]])
def test_names_that_are_none(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("spectra: error:")


def test_baselines_with_and_without_verify_compare(capsys, tmp_path):
    known = str(tmp_path / "known.json")
    run(capsys, "audit", LORA, "--verify", "-o", known)
    assert run(capsys, "audit", LORA, "--baseline", known)[0] == 0
    assert run(capsys, "audit", LORA, "--verify", "--baseline", known)[0] == 0
    other = tmp_path / "base"
    shutil.copytree(BASE, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    code, _, err = run(capsys, "audit", LORA, "--base", str(other), "--verify", "--baseline", known)
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
