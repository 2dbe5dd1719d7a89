"""The recipes of docs/ci.md, the action and the hook: read by the tool they are for, and their commands carried out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib

import pytest
from pre_commit.clientlib import load_config, load_manifest
from pre_commit.yaml import yaml_load

import spectra
from spectra.cli import main
from tests.support.paths import FIXTURES, ROOT
from tests.support.sarif import checked

ADAPTERS = ("lora-r1", "lora-r16")
HOOKS = ROOT / ".pre-commit-hooks.yaml"
ACTION = ROOT / "action.yml"


def recipes():
    """The action, the workflow written out, and the hook."""
    return re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two adapters, and their base under the name that the recipes give it."""
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(FIXTURES / "base")
    (tmp_path / "adapters").mkdir()
    for name in ADAPTERS:
        (tmp_path / "adapters" / name).symlink_to(FIXTURES / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_action(repository, capsys):
    checkout, used = yaml_load(recipes()[0])
    action = yaml_load(ACTION.read_text())
    assert checkout["uses"].startswith("actions/checkout@")
    assert used["uses"].endswith(f"@v{spectra.__version__}")
    assert {name for name, given in action["inputs"].items() if given.get("required")} <= set(used["with"])
    assert set(used["with"]) <= set(action["inputs"])
    (audit,) = (step for step in action["runs"]["steps"] if step.get("id") == "audit")
    given = {name.upper(): str(used["with"].get(name, value.get("default", "")))
             for name, value in action["inputs"].items() if name.upper() in audit["env"]}  # fmt: skip
    said = subprocess.run(
        ["bash", "-euc", 'spectra() { printf "%s\\n" "$@"; }\n' + audit["run"]],
        env={**given, "GITHUB_OUTPUT": "output"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert main(said.stdout.splitlines()) == 1, "one of them has more than 20"
    assert (repository / (repository / "output").read_text().strip().removeprefix("sarif=")).is_file()
    capsys.readouterr()


def test_the_workflow(repository, capsys):
    workflow = yaml_load(recipes()[1])
    (job,) = workflow["jobs"].values()
    *_, upload = job["steps"]
    commands = [shlex.split(step["run"]) for step in job["steps"] if "run" in step]
    assert [words[0] for words in commands] == ["pip", "spectra"]
    audit = commands[1][1:]
    reports = spectra.audit_many([f"adapters/{name}" for name in ADAPTERS], "org/name")
    found = [report.total("all") for report in reports]
    assert main(audit) == int(max(found) > 20) == 1
    assert "gate" in capsys.readouterr().err
    made = checked((repository / upload["with"]["sarif_file"]).read_text())
    uris = {artifact["location"]["uri"] for artifact in made["artifacts"]}
    assert uris == {f"adapters/{name}/adapter_model.safetensors" for name in ADAPTERS}
    flagged = [result for result in made["results"] if result["ruleId"] == "intruder-dimensions"]
    assert {result["level"] for result in flagged} == {"error"}
    assert "cancelled" in upload["if"], "it is uploaded where the gate was crossed"
    assert workflow["permissions"]["security-events"] == "write"
    assert main([*audit[: audit.index("--fail-above")], "--fail-above", str(max(found))]) == 0


def test_the_baseline_beside_it(repository, capsys):
    assert main(["audit", "adapters/lora-r1", "-o", "report.json"]) == 0
    assert main(["audit", "adapters/lora-r1", "--baseline", "report.json", "-o", "spectra.sarif"]) == 0
    capsys.readouterr()


def test_the_hook(repository, capsys):
    (hook,) = load_manifest(str(HOOKS))
    assert hook["language"] == "python"
    files = re.compile(hook["files"])
    for path in ("adapters/lora-r1/adapter_model.safetensors", "adapter_model.safetensors"):
        assert files.search(path)
    for path in ("model.safetensors", "x/adapter_model.safetensors.index.json", "my_adapter_model.safetensors"):
        assert not files.search(path)
    command, *words = shlex.split(hook["entry"])
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {command: "spectra.cli:main"}
    names = [f"adapters/{name}/adapter_model.safetensors" for name in ADAPTERS]
    config = repository / ".pre-commit-config.yaml"
    config.write_text(recipes()[2])
    (repo,) = load_config(str(config))["repos"]
    (used,) = repo["hooks"]
    assert used["id"] == hook["id"]
    assert repo["rev"] == f"v{spectra.__version__}"
    assert main([*words, *used["args"], *names]) == 1, "one of them has more than 20"
    assert main([*words, *used["args"], names[0]]) == 1
    assert main([*words, names[0], "--base", "org/name"]) == 0
    (repository / "adapters" / "lora-r1").unlink()
    assert main([*words, *used["args"], names[0]]) == 2
    capsys.readouterr()


def test_the_recipes_are_short():
    for recipe in recipes():
        assert len(recipe.splitlines()) <= 15
        json.dumps(yaml_load(recipe))
