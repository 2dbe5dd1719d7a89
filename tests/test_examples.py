"""What the README and the documentation show is what happens: see ``examples.py``."""

from __future__ import annotations

import re
import shutil
import tomllib

import pytest

from tests.support.examples import ELSEWHERE, INSTEAD, STAND_INS, Session, blocks, compare, make_files, shell_commands
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks(path))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """One worker, in this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    ) as running:
        yield running.scheduler_address


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_shows_is_what_happens(page, files, tmp_path, monkeypatch, request):
    from huggingface_hub import constants

    folder = tmp_path / "here"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "cache"))
    found = blocks(page)
    wanted = any(address in block.text for block in found for address in INSTEAD)
    session = Session(page, request.getfixturevalue("cluster") if wanted else "")
    session.run(found)
    assert session.ran or all(block.language == "sh" for block in found)


def test_installations_name_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        lines += [line for block in blocks(page) if block.language == "sh" for line in shell_commands(block.text)]
        lines += re.findall(r"`(pip install [^`]+)`", text)
    named = {extra for line in lines for found in re.findall(r"\[([\w,]+)\]", line) for extra in found.split(",")}
    assert {"test", "plots", "docs"} <= named
    assert named <= project["optional-dependencies"].keys()


def test_stand_ins_are_used():
    text = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *PAGES])
    for name in STAND_INS:
        assert re.search(rf"\b{name.split('/')[0]}\b", text), name
    assert ELSEWHERE.match(".venv/bin/pip install -e .")
    assert not ELSEWHERE.match("spectra audit x")


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a\nb\nc\n", "a\nb\nc\n", True),
        ("a\nb\nc\n", "a\n[…]\nc\n", True),
        ("a\nb\nc\n", "[…]\nc\n", True),
        ("a\nb\nc\n", "a\n[…]\n", True),
        ("a\nb 0.4631\n", "a\nb 0.46[…]\n", True),
        ("a\nb\nc\n", "a\nb\n", False),
        ("a\nb\nc\n", "b\nc\n", False),
        ("a\nb\nc\n", "a\n[…]\nx\n", False),
        ("a\nb\nc\n", "c\n[…]\na\n", False),
        ("", "a\n", False),
    ],
)
def test_what_is_shown_is_compared(printed, shown, same):
    if same:
        compare(printed, shown, "here")
    else:
        with pytest.raises(AssertionError):
            compare(printed, shown, "here")
