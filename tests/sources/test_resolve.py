"""From names to checkpoints, offline, with a hub cache laid out as the hub lays it out."""

from __future__ import annotations

import json
import shutil

import pytest

import spectra
from spectra.cli import main
from spectra.errors import MissingFileError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.sources import resolve
from tests.support.paths import FIXTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds fixtures/base as "acme/tiny" at revisions main and v2."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--acme--tiny"
    commit = COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    for ref in ("main", "v2"):
        (repo / "refs" / ref).write_text(commit)
    for name, blob in (("config.json", "c" * 40), ("model.safetensors", "ab" * 32)):
        shutil.copy(FIXTURES / "base" / name, repo / "blobs" / blob)
        (repo / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob}")
    return repo / "snapshots" / commit


def adapter(tmp_path, **config):
    home = tmp_path / "somewhere" / "adapter"
    shutil.copytree(FIXTURES / "lora-r1", home)
    values = json.loads((home / "adapter_config.json").read_text())
    (home / "adapter_config.json").write_text(json.dumps(values | config))
    return home


def test_path_relative_to_the_adapter(tmp_path):
    assert spectra.audit(FIXTURES / "lora-r1").base["path"] == str(FIXTURES / "base")


def test_path_relative_to_the_working_directory(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "base", tmp_path / "my-base")
    monkeypatch.chdir(tmp_path)
    home = adapter(tmp_path, base_model_name_or_path="my-base")
    assert spectra.audit(home).base["path"] == "my-base"


@pytest.mark.parametrize("name", ["acme/tiny", "acme/tiny@main", "acme/tiny@v2", f"acme/tiny@{COMMIT}"])
def test_a_name_with_its_revision(hub, name):
    assert resolve.find(name) == hub
    assert spectra.audit(FIXTURES / "lora-r1", name, include=["layers.0.self_attn.q_proj"]).base["path"] == str(hub)


def test_a_revision_that_is_not_there(hub):
    assert resolve.find("acme/tiny@v3") is None
    with pytest.raises(MissingFileError, match="acme/tiny@v3"):
        spectra.audit(FIXTURES / "lora-r1", "acme/tiny@v3")


@pytest.mark.parametrize("revision", ["../../main", "/etc", "~", "a\\b", "a\nb"])
def test_a_revision_does_not_lead_out(hub, revision):
    with pytest.raises(UsageError, match="no name of a revision"):
        resolve.find(f"acme/tiny@{revision}")


def test_a_folder_may_have_an_at_sign(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "base", tmp_path / "base@home")
    monkeypatch.chdir(tmp_path)
    assert str(resolve.find("base@home")) == "base@home"


@pytest.mark.parametrize("revision", [None, "v2"])
def test_hub_name_in_the_cache(tmp_path, hub, revision):
    home = adapter(tmp_path, base_model_name_or_path="acme/tiny", revision=revision)
    report = spectra.audit(home)
    assert report.base["path"] == str(hub)
    assert report.base["fingerprint_covers"] == "contents"  # the blob's name is its hash
    assert report.total("all") == spectra.audit(FIXTURES / "lora-r1").total("all")


def test_hub_name_on_the_command_line(tmp_path, hub, capsys):
    assert main(["audit", str(FIXTURES / "lora-r1"), "--base", "acme/tiny", "--format", "csv"]) == 0
    assert "q_proj" in capsys.readouterr().out


def test_base_that_is_not_here(tmp_path, hub):
    for config in ({"base_model_name_or_path": "acme/unknown"}, {"base_model_name_or_path": "/no/such/folder"}):
        home = adapter(tmp_path / config["base_model_name_or_path"].replace("/", "_"), **config)
        with pytest.raises(MissingFileError, match="--base"):
            spectra.audit(home)


@pytest.mark.parametrize("name", [None, "", 3])
def test_adapter_that_names_no_base(tmp_path, name):
    with pytest.raises(UsageError, match="--base"):
        spectra.audit(adapter(tmp_path, base_model_name_or_path=name))


def test_full_checkpoint_needs_a_base():
    with pytest.raises(UsageError, match="this format does not record its base; name it with --base"):
        spectra.audit(FIXTURES / "full")


def test_an_adapter_is_no_base():
    with pytest.raises(WrongBaseError, match="adapter"):
        spectra.audit(FIXTURES / "lora-r4", FIXTURES / "lora-r1")


def test_whether_the_base_is_the_one_the_adapter_names(capsys):
    opened = {name: open_checkpoint(FIXTURES / name) for name in ("lora-r1", "full", "base")}
    assert resolve.named_base(opened["lora-r1"], opened["base"]) is True
    assert resolve.named_base(opened["lora-r1"], opened["full"]) is False
    assert resolve.named_base(opened["full"], opened["base"]) is None
    assert main(["audit", str(FIXTURES / "lora-r1"), "--base", str(FIXTURES / "full")]) == 0
    assert "names '../base' as its base" in capsys.readouterr().out
