"""What keeps the house in order: imports, public names, documents, memory."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest

import spectra
from spectra import errors
from spectra.analysis import layer as analysis
from spectra.render import records
from spectra.repair import repair as mitigating
from spectra.tasks import compare as comparing
from spectra.tasks import ranks as ranking
from tests.conftest import ROOT

# What each module may import from the package; ARCHITECTURE.md draws the same picture.
ALLOWED = {
    "errors": set(),
    "values": {"errors"},
    "records": set(),
    "headers": {"errors", "values"},
    "derived": {"headers"},
    "stored": {"derived", "errors", "headers", "orientation"},
    "gguf": {"errors", "headers"},
    "archives": {"errors", "values"},
    "pickles": {"archives", "errors", "headers", "values"},
    "pipelines": {"errors", "headers"},
    "fingerprints": {"errors", "headers", "values"},
    "checkpoint": {"derived", "errors", "fingerprints", "gguf", "headers", "pickles", "pipelines", "stored"},
    "live": {"checkpoint", "derived", "errors", "headers"},
    "hub": {"cache", "checkpoint", "errors", "headers", "pipelines"},
    "resolve": {"checkpoint", "errors", "gguf", "headers", "hub", "live"},
    "orientation": {"headers"},
    "updates": set(),
    "multiplying": {"updates"},
    "initialisation": {"errors", "updates"},
    "adapters": {
        "checkpoint",
        "derived",
        "errors",
        "folders",
        "gguf",
        "headers",
        "initialisation",
        "multiplying",
        "orientation",
        "stored",
        "updates",
    },
    "matcher": {"adapters", "checkpoint", "derived", "errors", "orientation", "stored"},
    "splitting": {
        "adapters",
        "checkpoint",
        "derived",
        "errors",
        "matcher",
        "multiplying",
        "orientation",
        "stored",
        "updates",
    },
    "layers": {
        "adapters",
        "checkpoint",
        "derived",
        "errors",
        "gguf",
        "matcher",
        "orientation",
        "splitting",
        "stored",
        "updates",
    },
    "svd": {"errors", "updates"},
    "detect": {"records", "svd"},
    "measures": {"records", "svd", "updates"},
    "threshold": {"svd"},
    "null": {"svd"},
    "study": {"detect", "measures", "null", "records", "svd", "threshold", "updates"},
    "analysis": {"detect", "errors", "measures", "records", "study", "svd", "updates"},
    "report": {"errors", "records"},
    "sweeps": {"errors", "report"},
    "journal": {"errors", "report"},
    "workers": {"errors"},
    "audits": {
        "analysis",
        "checkpoint",
        "errors",
        "journal",
        "live",
        "pipeline",
        "report",
        "resolve",
        "runs",
        "workers",
    },
    "comparison": {"errors", "report", "sweeps"},
    "ranks": {"adapters", "errors", "measures", "report"},
    "folders": {"checkpoint", "errors"},
    "mitigation": {"errors", "folders", "report"},
    "repair": {"errors", "svd", "updates"},
    "editing": {"adapters", "analysis", "errors", "layers", "mitigation", "repair", "report", "svd", "updates"},
    "carried": {"adapters", "checkpoint", "errors", "layers"},
    "merging": {"adapters", "carried", "checkpoint", "derived", "errors", "folders", "layers", "orientation"},
    "forms": {
        "adapters",
        "analysis",
        "derived",
        "editing",
        "errors",
        "folders",
        "headers",
        "layers",
        "merging",
        "mitigation",
        "orientation",
        "pipeline",
        "report",
        "runs",
        "updates",
    },
    "mitigating": {
        "adapters",
        "analysis",
        "editing",
        "errors",
        "folders",
        "forms",
        "layers",
        "live",
        "mitigation",
        "pipeline",
        "report",
        "runs",
        "updates",
    },
    "checking": {
        "adapters",
        "analysis",
        "carried",
        "checkpoint",
        "editing",
        "errors",
        "folders",
        "layers",
        "live",
        "merging",
        "mitigation",
        "repair",
        "runs",
        "svd",
        "updates",
    },
    "truncation": {"errors", "measures", "svd", "updates"},
    "cache": {"checkpoint", "errors", "orientation", "svd"},
    "precompute": {"adapters", "analysis", "cache", "checkpoint", "errors", "layers", "live", "resolve", "svd"},
    "precision": {"adapters", "checkpoint", "derived", "gguf", "resolve", "stored"},
    "runs": {
        "adapters",
        "analysis",
        "checkpoint",
        "errors",
        "layers",
        "live",
        "precision",
        "resolve",
        "splitting",
        "svd",
        "updates",
    },
    "training": {
        "cache",
        "checkpoint",
        "errors",
        "headers",
        "live",
        "orientation",
        "pipeline",
        "report",
        "resolve",
        "runs",
        "study",
        "svd",
        "sweeps",
        "threshold",
    },
    "pipeline": {"analysis", "cache", "errors", "layers", "report", "runs", "study", "svd", "updates"},
    "comparing": {
        "analysis",
        "comparison",
        "errors",
        "live",
        "measures",
        "pipeline",
        "records",
        "report",
        "resolve",
        "runs",
        "study",
        "svd",
    },
    "ranking": {
        "adapters",
        "analysis",
        "checkpoint",
        "derived",
        "errors",
        "folders",
        "hub",
        "layers",
        "live",
        "measures",
        "ranks",
        "runs",
        "truncation",
        "updates",
    },
    "insertion": {"adapters", "carried", "derived", "errors", "layers", "matcher", "runs"},
    "tradeoff": {
        "analysis",
        "carried",
        "editing",
        "errors",
        "insertion",
        "layers",
        "live",
        "null",
        "orientation",
        "pipeline",
        "repair",
        "report",
        "runs",
        "svd",
        "updates",
    },
    "inspection": {"adapters", "checkpoint", "errors", "layers", "live", "precision", "render", "resolve", "splitting"},
    "render": {"comparison", "errors", "mitigation", "ranks", "report", "sweeps"},
    "plots": {"comparison", "errors", "records", "report", "sweeps", "training"},
    "page": {"comparison", "errors", "records", "render", "report", "sweeps"},
    "similarity": {"analysis", "comparison", "errors", "records", "report", "runs", "svd", "updates"},
    "output": {"checkpoint", "errors"},
    "cli": {
        "audits",
        "checking",
        "comparing",
        "comparison",
        "errors",
        "inspection",
        "mitigating",
        "mitigation",
        "output",
        "page",
        "pipeline",
        "plots",
        "precompute",
        "ranking",
        "ranks",
        "records",
        "render",
        "report",
        "resolve",
        "similarity",
        "workers",
    },
}


def modules():
    for path in sorted((ROOT / "spectra").rglob("*.py")):
        yield path.relative_to(ROOT / "spectra").parts[0].removesuffix(".py"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spectra":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("spectra."))


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(*item, id=str(item[1].relative_to(ROOT / "spectra"))) for item in modules()]
)
def test_import_rule(room, path):
    if room in ("__init__", "__main__"):
        return
    found = {name for name in imports(path) if name not in ("__version__", room)}
    assert found <= ALLOWED[room], f"{path.name} imports {sorted(found - ALLOWED[room])}"


def test_the_import_rule_has_no_cycle():
    left = {room: set(uses) for room, uses in ALLOWED.items()}
    while left:
        free = [room for room, uses in left.items() if not uses & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_no_file_outgrows_its_purpose():
    for _, path in modules():
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_public_names():
    assert sorted(spectra.__all__) == [
        "CachedBase", "Comparison", "Extraction", "Findings", "LayerSpectra", "Mitigation", "RankReport", "Report",
        "Source", "SpectraError", "Verification", "__version__", "audit", "audit_many", "cache_base", "checkpoint_of",
        "compare", "extract_adapter", "find_intruders", "layer_spectra", "mitigate", "mitigation_sweep",
        "similarity_matrices", "suggest_ranks", "to_html", "to_text", "verify_mitigation",
    ]  # fmt: skip
    for name in spectra.__all__:
        assert getattr(spectra, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = spectra.nonsense


def test_importing_costs_nothing():
    code = "import sys, spectra; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_errors_are_drawn_as_they_are():
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.SpectraError)
    ]
    assert errors.__doc__ is not None
    for item in classes:
        assert item.__name__ in errors.__doc__
        builtin = re.search(rf"{item.__name__} +\((\w+)\)", errors.__doc__)
        if builtin:
            assert builtin[1] in {base.__name__ for base in item.__mro__}


def test_docstring_examples(monkeypatch):
    monkeypatch.chdir(ROOT)
    for module in (analysis, comparing, mitigating, ranking, records):
        tried = doctest.testmod(module)
        assert (tried.attempted > 0, tried.failed) == (True, 0), module.__name__


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "spectra.__version__"}
    assert f"## {spectra.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    wanted = list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        name = re.split(r"[<>=\[]", requirement)[0].lower()
        assert name == "intruder-spectra" or name in pinned, f"{name} is not pinned"


def test_architecture_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for room in ALLOWED:
        assert f"`{room}" in text


@pytest.mark.parametrize("case", ["full", "lora settled"])
def test_peak_memory(case):
    """At most six pairs of float32 matrices above the libraries, also when float64 must decide."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    answer = memory.run_case(case, 2560)
    assert answer["settled"] == case.endswith("settled")
    assert answer["pairs"] <= 6
