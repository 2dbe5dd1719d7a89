"""The notebooks run from a clean kernel, and what is stored in them is what a run gives."""

from __future__ import annotations

import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 300  # seconds for one cell; the slowest takes 40 on two cores
LARGEST = 2_500_000  # bytes of all notebooks together

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?%?")
MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:/(?:bin|home|mnt|opt|private|root|tmp|usr|var|work|Users)/|[A-Z]:\\)")
CLAIM = re.compile(r"\*\*Claim (\d+): (.+?)\.\*\* \*Here: (.+?)\.\*\n\n(.+)", re.DOTALL)
# One word for each claim that must be stated, in its title.
CLAIMS = (
    "at higher rank", "full fine-tuning has (almost) none", "when LoRA is pushed", "rsLoRA", "fixed α", "720", "open",
    "effective rank, even", "training goes on", "more forgetting",
)  # fmt: skip


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def runs(request):
    """A notebook as it is stored, and after a run from a clean kernel."""
    stored, fresh = read(request.param), read(request.param)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # One thread: the matrices are small.  A backend without a screen would hide pyplot's figures from the kernel.
    environment = {"OMP_NUM_THREADS": "1"} | {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client = NotebookClient(
        fresh, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute(env=environment)
    return stored, fresh


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Everything in a cell's outputs that is read, in order; of a figure only that it is there."""
    printed = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
    shown = []
    for out in cell.outputs:
        data = out.get("data", {})
        shown += [data[kind] for kind in ("text/markdown", "text/plain", "text/html") if kind in data]
        shown += [kind for kind in data if kind.startswith("image/")]
    return [printed, *shown]


def difference(one, other):
    """The first difference of two texts, or None; numbers with decimals, and percentages, may differ by one unit in
    their last place, as they do where a value lies between two."""
    words = [NUMBER.sub("#", text).split() for text in (one, other)]
    if words[0] != words[1]:
        return next(((a, b) for a, b in zip(*words, strict=False) if a != b), (len(words[0]), len(words[1])))
    for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
        values = [float(text.rstrip("%").replace(",", "")) for text in (a, b)]
        places = min(len(text.rstrip("%").partition(".")[2]) for text in (a, b))
        unit = 10.0**-places if places or a.endswith("%") else 0.0
        if abs(values[0] - values[1]) > 1.01 * unit:
            return a, b
    return None


def test_runs_without_an_error(runs):
    _, fresh = runs
    assert all(cell.execution_count for cell in code_cells(fresh))
    assert any(cell.outputs for cell in code_cells(fresh))


def test_stored_outputs_are_those_of_a_run(runs):
    stored, fresh = runs
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        kept, made = texts(before), texts(after)
        assert len(kept) == len(made), before.id
        for one, other in zip(kept, made, strict=True):
            assert difference(one, other) is None, f"{before.id}: run the notebook again"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("35 of 280, 12.5%", "35 of 280, 12.5%", True),
        ("size 0.225", "size  0.226", True),
        ("size 0.225", "size 0.227", False),
        ("35 intruders", "34 intruders", False),
        ("a loss of 24%", "a loss of 23%", True),
        ("1,280 values", "1,281 values", False),
        ("more", "fewer", False),
        ("1.5 and 2", "1.5", False),
    ],
)
def test_texts_are_compared_number_by_number(one, other, same):
    assert (difference(one, other) is None) is same


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    # One run from a clean kernel, with no trace of when.
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in cells:
        for out in cell.outputs:
            assert out.output_type in ("stream", "display_data", "execute_result"), cell.id
            assert out.get("name") != "stderr", cell.id
            assert not out.get("metadata"), cell.id
        assert not any(MACHINE_PATH.search(text) for text in texts(cell)), cell.id
    whole = path.read_text(encoding="utf-8")
    assert str(ROOT) not in whole
    assert not MACHINE_PATH.search("\n".join(cell.source for cell in notebook.cells))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in /tmp/tmpabc/a", True),
        ("'/home/me/x'", True),
        ("C:\\Users", True),
        ("fixtures/home/x", False),
        ("https://a.org/home/x", False),
        ("W0/dW and 1/16", False),
    ],
)
def test_paths_of_a_machine_are_recognised(text, found):
    assert bool(MACHINE_PATH.search(text)) is found


def test_they_link_to_each_other():
    for path in NOTEBOOKS:
        links = re.findall(r"\]\(([^)]+\.ipynb)\)", json.dumps(read(path), ensure_ascii=False))
        assert links, path.name
        assert all((FOLDER / link).is_file() for link in links), path.name


def test_there_are_five_of_modest_size():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST


def test_every_claim_is_stated_with_numbers():
    notebook = read(next(path for path in NOTEBOOKS if path.name.startswith("02")))
    shown = [text for cell in code_cells(notebook) for text in texts(cell) if text.startswith("**Claim ")]
    claims = [found for text in shown if (found := CLAIM.fullmatch(text))]
    assert len(claims) == len(shown)
    assert [int(claim[1]) for claim in claims] == list(range(1, len(CLAIMS) + 1))
    for word in CLAIMS:
        assert sum(word in claim[2] for claim in claims) == 1, word
    for claim in claims:
        assert len(NUMBER.findall(claim[4])) >= 3, claim[2]
        assert claim[3]
