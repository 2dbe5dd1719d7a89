"""SARIF: held to the standard's own schema, and to what GitHub asks beyond it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from urllib.parse import unquote

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.errors import MissingFileError
from spectra.render.sarif import Scanned, to_sarif
from tests.support.commands import run
from tests.support.paths import FIXTURES, ROOT
from tests.support.reports import layer, report, vector
from tests.support.sarif import VALIDATOR, checked

LORA, FULL, BASE = "fixtures/lora-r4", "fixtures/full", "fixtures/base"


def test_every_flagged_layer_is_a_result(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, _ = run(capsys, "audit", LORA, "--format", "sarif")
    assert code == 0
    made = checked(out)
    found = spectra.audit(LORA)
    flagged = {layer.name: layer for layer in found.layers if layer.intruders}
    results = {
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]: result for result in made["results"]
    }
    assert results.keys() == flagged.keys()
    for name, result in results.items():
        assert result["ruleId"] == "intruder-dimensions"
        assert result["level"] == "warning"
        assert result["message"]["text"].startswith(f"{name}: {flagged[name].intruders} of the top 10 left")
        assert result["properties"]["intruderIndices"] == list(flagged[name].intruder_indices)
    worst = results["model.layers.0.self_attn.v_proj"]["message"]["text"]
    assert "at index 0-3,8-9; lowest cosine 0.27, epsilon 0.5" in worst
    assert [item["location"]["uri"] for item in made["artifacts"]] == ["fixtures/lora-r4/adapter_model.safetensors"]
    assert (ROOT / made["artifacts"][0]["location"]["uri"]).is_file()
    (invocation,) = made["invocations"]
    assert invocation["exitCode"] == 0
    assert invocation["commandLine"] == "spectra audit fixtures/lora-r4 --base fixtures/base"
    assert run(capsys, "audit", LORA, "--format", "sarif")[1] == out, "the same, byte for byte"


def test_several_are_one_run(capsys, monkeypatch, tmp_path):
    """GitHub takes no two runs of one tool and category in one upload."""
    monkeypatch.chdir(ROOT)
    target = tmp_path / "report.sarif.json"
    for _ in range(2):  # it replaces its own
        code, out, _ = run(capsys, "audit", LORA, FULL, "--base", BASE, "--fail-above", "30", "-o", str(target))
        assert (code, out) == (1, "")
    made = checked(target.read_text())
    assert made["invocations"][0]["exitCode"] == 1
    assert made["invocations"][0]["exitCodeDescription"] == "a gate was crossed"
    levels = {(r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"], r["level"]) for r in made["results"]}
    assert levels == {(f"{LORA}/adapter_model.safetensors", "error"), (f"{FULL}/model.safetensors", "warning")}
    assert [tune["intruders"] for tune in made["properties"]["fineTunes"]] == [35, 5]


def test_what_a_baseline_knows_is_a_note(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    known = str(tmp_path / "known.json")
    run(capsys, "audit", LORA, "-o", known)
    made = checked(run(capsys, "audit", LORA, "--baseline", known, "--format", "sarif")[1])
    assert {result["level"] for result in made["results"]} == {"note"}
    code, out, _ = run(capsys, "audit", "fixtures/rslora-r16", "--baseline", known, "--format", "sarif")
    made = checked(out)
    assert code == made["invocations"][0]["exitCode"] == 1
    flagged = [result for result in made["results"] if result["ruleId"] == "intruder-dimensions"]
    new = [result for result in flagged if result["properties"]["newIntruders"]]
    assert {result["level"] for result in new} == {"error"}
    assert {result["level"] for result in flagged if result not in new} == {"note"}
    total = made["properties"]["fineTunes"][0]["intruders_new"]
    assert sum(result["properties"]["newIntruders"] for result in new) == total


def test_what_went_wrong_is_told_without_paths(capsys, monkeypatch, tmp_path):
    home = tmp_path / "jo" / "my adapter%20 #1"
    shutil.copytree(FIXTURES / "lora-r4", home)
    tensors = load_file(home / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, home / "adapter_model.safetensors")
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, "audit", str(home), str(tmp_path / "nothing"), "--base", BASE, "--format", "sarif")
    assert code == 2
    assert str(home) in err
    assert str(tmp_path) not in out
    assert "jo" not in out.replace("major", "")
    made = checked(out)
    failed = [result for result in made["results"] if result["ruleId"] == "layer-not-analysed"]
    assert [result["level"] for result in failed] == ["error"]
    assert "model.layers.1.mlp.up_proj: non_finite: " in failed[0]["message"]["text"]
    notices = made["invocations"][0]["toolExecutionNotifications"]
    assert [notice["descriptor"]["id"] for notice in notices] == ["layer-not-analysed", "fine-tune-not-read"]
    assert notices[1]["message"]["text"].startswith("nothing: no such file")
    uri = made["artifacts"][0]["location"]["uri"]
    assert uri == "my%20adapter%2520%20%231/adapter_model.safetensors"
    assert unquote(uri) == f"{home.name}/adapter_model.safetensors"


def test_there_is_a_log_where_nothing_could_be_read(capsys, tmp_path):
    target = tmp_path / "report.sarif"
    code, _, err = run(capsys, "audit", str(tmp_path / "nothing"), "-o", str(target))
    assert code == 2
    assert err.count("spectra: error:") == 1
    made = checked(target.read_text())
    assert made["results"] == made["artifacts"] == []
    assert len(made["invocations"][0]["toolExecutionNotifications"]) == 1


def test_each_layer_lies_in_its_shard(capsys, monkeypatch, tmp_path, rng, make_base):
    spread = np.linspace(9, 1, 64)
    weights = {f"layer.{i}.q.weight": torch.from_numpy(rng.normal(size=(64, 64)) * spread) for i in range(2)}
    base = make_base(weights)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    index = {}
    for number, (name, value) in enumerate(weights.items()):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        change = torch.from_numpy(rng.normal(size=(64, 1))) @ torch.from_numpy(rng.normal(size=(1, 64)))
        save_file({name: value + 2 * change}, tuned / file)
        index[name] = file
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    monkeypatch.chdir(tmp_path)
    made = checked(run(capsys, "audit", "tuned", "--base", str(base), "--format", "sarif")[1])
    assert {
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]: result["locations"][0]["physicalLocation"][
            "artifactLocation"
        ]["uri"]
        for result in made["results"]
    } == {f"layer.{i}.q": f"tuned/model-0000{i + 1}-of-00002.safetensors" for i in range(2)}


def test_levels():
    noisy = layer("layers.0.q", [0], noise_like_base=True)
    mild = [layer(f"layers.{i}.k", [0] if i == 1 else []) for i in range(1, 30)]
    made = checked(to_sarif([report([noisy, *mild])], version="1"))
    assert [result["level"] for result in made["results"]] == ["note", "note"], "slight"
    assert "plain noise" in made["results"][0]["message"]["text"]
    strong = report([layer("layers.1.q", [0, 1, 2]), noisy])
    assert [result["level"] for result in checked(to_sarif([strong], version="1"))["results"]] == ["warning", "note"]
    crossed = Scanned(crossed=frozenset({"tuned"}), exit_code=1)
    assert [r["level"] for r in checked(to_sarif([strong], crossed, version="1"))["results"]] == ["error", "error"]


def test_a_borderline_cosine_is_a_note():
    vectors = (vector(0, True), vector(1, False, ("borderline",)))
    made = checked(to_sarif([report([layer("layers.0.q", [0], vectors=vectors)])], version="1"))
    assert [(result["ruleId"], result["level"]) for result in made["results"]] == [
        ("intruder-dimensions", "warning"), ("borderline-cosine", "note"),
    ]  # fmt: skip
    assert "1 cosine within 0.001 of epsilon" in made["results"][1]["message"]["text"]


def test_findings_keep_their_fingerprints():
    """Across trainings of one adapter, but not from one adapter or layer to another."""
    one = checked(to_sarif([report([layer("a.q", [0]), layer("a.k", [0])])], version="1"))
    two = checked(to_sarif([report([layer("a.q", [0, 4, 5]), layer("a.k", [2])])], version="2"))
    other = report([layer("a.q", [0])], tuned={"path": "other", "format": "peft-lora"})
    three = checked(to_sarif([other], version="1"))

    def prints(log):
        return [result["partialFingerprints"] for result in log["results"]]

    assert prints(one) == prints(two)
    assert prints(three)[0] not in prints(one)


@pytest.mark.parametrize("name", ["[x](http://bad)", "{0}", "a\\[b", "x\ny", "\udcff", "<script>", "a b/ü%:?#"])
def test_hostile_names_stay_text(name):
    made = report([layer(name, [0])], tuned={"path": f"/x/{name.replace('/', '')}", "format": "peft-lora"})
    error = MissingFileError(f"/home/{name}", "gone")
    log = checked(to_sarif([made], Scanned(unreadable=[error], exit_code=2), version="1"))
    text = log["results"][0]["message"]["text"]
    assert "\n" not in text
    assert not re.search(r"(?<!\\)\[.*\]\(", text)
    assert "{0}" not in text.replace("{{0}}", "")


def test_a_commit_of_the_hub_is_no_other_file():
    cache = "/home/jo/.cache/huggingface/hub/models--org--name/snapshots"
    logs = []
    for commit in ("abc", "def"):
        path = f"{cache}/{commit}"
        made = report([layer("a.q", [0])], tuned={"path": path, "format": "peft-lora"})
        scanned = Scanned(files={path: {None: f"{path}/adapter_model.safetensors"}})
        logs.append(checked(to_sarif([made], scanned, version="1")))
        assert f"spectra audit org/name@{commit} --base base" == logs[-1]["invocations"][0]["commandLine"]
    assert [log["artifacts"][0]["location"]["uri"] for log in logs] == ["org/name/adapter_model.safetensors"] * 2
    assert logs[0]["results"] == logs[1]["results"]


def test_its_home():
    made = checked(to_sarif([report([layer("a.q")])], Scanned(url="https://example.org/spectra"), version="1"))
    assert made["tool"]["driver"]["informationUri"] == "https://example.org/spectra"
    assert "informationUri" not in checked(to_sarif([report([layer("a.q")])], version="1"))["tool"]["driver"]


def test_the_schema_refuses_what_is_wrong():
    log = json.loads(to_sarif([report([layer("a.q", [0])])], version="1"))
    result = log["runs"][0]["results"][0]
    fatal = log["runs"][0] | {"results": [result | {"level": "fatal"}]}
    for name, value in {"version": "2.0.0", "runs": [{}], "nonsense": 1}.items():
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(log | {name: value})
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(log | {"runs": [fatal]})


def test_only_our_own_are_replaced(capsys, tmp_path):
    target = tmp_path / "other.sarif"
    target.write_text('{\n "$schema": "x",\n "version": "2.1.0",\n "runs": []\n}\n')
    before = target.read_text()
    code, _, err = run(capsys, "audit", str(FIXTURES / "lora-r4"), "-o", str(target))
    assert code == 2
    assert "not overwritten" in err
    assert target.read_text() == before


def test_a_report_read_back_gives_the_same(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = spectra.audit(LORA)
    again = spectra.Report.from_dict(json.loads(found.to_json()))
    assert to_sarif([found], version="1") == to_sarif([replace(again)], version="1")
