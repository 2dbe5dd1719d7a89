"""What keeps the house in order: imports, public names, documents, memory."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib

import pytest

import spectra
from spectra import errors
from spectra.analysis import layer as analysis
from spectra.render import records
from spectra.repairs import repair as repairing
from spectra.tasks import compare as comparing
from spectra.tasks import layers
from spectra.tasks import ranks as ranking
from tests.support.paths import ROOT

# What each folder may import from the package; ARCHITECTURE.md draws the same picture.  No arrow climbs.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "updates": {"errors"},
    "records": {"errors"},
    "sources": {"errors", "files", "records"},
    "adapters": {"errors", "files", "updates"},
    "svd": {"errors", "updates"},
    "render": {"errors", "records"},
    "plots": {"errors", "records", "sources"},
    "page": {"errors", "records", "render"},
    "pairing": {"errors", "files", "updates", "sources", "adapters"},
    "analysis": {"errors", "updates", "records", "adapters", "svd"},
    "runs": {"errors", "files", "updates", "records", "sources", "adapters", "svd", "pairing", "analysis"},
    "tasks": {
        "errors",
        "files",
        "updates",
        "records",
        "sources",
        "adapters",
        "svd",
        "plots",
        "pairing",
        "analysis",
        "runs",
    },
    "repairs": {"errors", "files", "updates", "records", "sources", "adapters", "svd", "pairing", "analysis", "runs"},
    "training": {"errors", "files", "records", "sources", "svd", "analysis", "runs"},
    "cli": {"errors", "files", "records", "sources", "render", "page", "plots", "runs", "tasks", "repairs"},
}
PACKAGE = ROOT / "spectra"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}


def imports(path):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "spectra")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module and node.module.split(".")[0] == "spectra":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in NAMES else node.module


def climbs(path, folder):
    """The imports of a file that the import rule forbids.

    ``import spectra`` in a method of a record is the one exception: what a record offers as a method and what lies
    above it makes goes through the package's table of public names, which loads each when it is first used.
    """
    for module in imports(path):
        if module == "spectra":
            if folder != "records" and any(
                isinstance(node, ast.Import) and any(alias.name == "spectra" for alias in node.names)
                for node in ast.walk(ast.parse(path.read_text()))
            ):
                yield "spectra itself"
            continue
        other = module.split(".")[1]
        if other != folder and other not in MAY_IMPORT[folder]:
            yield module


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_import_rule(folder):
    path = PACKAGE / folder
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    assert {
        file.relative_to(PACKAGE).as_posix(): sorted(found) for file in files if (found := set(climbs(file, folder)))
    } == {}


def test_every_folder_has_its_row():
    here = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert here - {"__init__", "__main__"} == set(MAY_IMPORT)


def test_the_root_holds_folders():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "errors.py", "py.typed"}


@pytest.mark.parametrize("graph", ["folders", "modules"])
def test_no_import_goes_round_in_a_circle(graph):
    if graph == "folders":
        left = {folder: set(uses) for folder, uses in MAY_IMPORT.items()}
    else:  # the package itself is the table of public names
        left = {name: set(imports(path)) - {name, "spectra"} for name, path in NAMES.items() if name != "spectra"}
    while left:
        free = [name for name, uses in left.items() if not uses & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_import_rule_is_no_wider_than_the_code():
    for folder, may in MAY_IMPORT.items():
        path = PACKAGE / folder
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        used = {module.split(".")[1] for file in files for module in imports(file) if module != "spectra"}
        assert may == used - {folder}, folder


def test_what_lies_low_needs_no_torch():
    """Records and what is drawn of them are made, read and rendered where torch is not even installed."""
    for folder in ("records", "render", "page", "plots"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name and name.split(".")[0] == "torch" for name in names), path


def test_no_file_outgrows_its_purpose():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_public_names():
    assert sorted(spectra.__all__) == [
        "CachedBase", "Comparison", "Extraction", "Findings", "Inspection", "LayerSpectra", "RankReport", "Repair",
        "Report", "Source", "SpectraError", "Update", "Verification", "__version__", "audit", "audit_many", "cache",
        "checkpoint_of", "compare", "extract", "figure_of", "find_intruders", "inspect", "iter_layers",
        "layer_spectra", "load", "plot", "plots", "ranks", "repair", "similarity_matrices", "sweep", "to_html",
        "to_model_card", "to_sarif", "to_table_html", "to_text", "training", "verify",
    ]  # fmt: skip
    for name in spectra.__all__:
        assert getattr(spectra, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = spectra.nonsense


READING = "include exclude allow_pickle local_files_only split_fused initial_adapter ignore_options"
DEVICE = "device threads progress"
AUDIT = f"top_k epsilon side {READING} engine cache dtype {DEVICE} workers hash_contents"
# The verbs, each with what it takes beside the shared options, and these; what is in brackets need not be given.
SIGNATURES = {
    "audit": f"tuned [base] | resume executor | {AUDIT}",
    "audit_many": f"tuned [base] | on_unreadable resume executor | {AUDIT}",
    "compare": f"tuned [base] | merge draws quick on_unreadable | {AUDIT}",
    "plot": f"tuned [base] | kind to size | {AUDIT}",
    "ranks": f"tuned [base] | energy max_rank by use_rslora alpha | {READING} dtype {DEVICE} workers hash_contents",
    "extract": "tuned [base] | to energy max_rank by use_rslora alpha whole force | "
    f"include exclude allow_pickle local_files_only dtype {DEVICE} workers",
    "repair": f"tuned [base] | scale to method which noise_like keep_rank merged store_dtype force | {AUDIT}",
    "verify": f"tuned [base] | source | allow_pickle local_files_only dtype {DEVICE}",
    "sweep": f"tuned [base] | evaluate model scales which controls seeds include_base | {AUDIT}",
    "cache": f"base | cache dry_run | include exclude allow_pickle local_files_only dtype {DEVICE}",
    "inspect": f"tuned [base] | | {READING}",
    "iter_layers": f"tuned [base] | | {READING} dtype {DEVICE}",
    "layer_spectra": f"tuned [base] | size | top_k epsilon side {READING} dtype {DEVICE}",
}


@pytest.mark.parametrize("verb", SIGNATURES)
def test_signatures(verb):
    """In help(), in an editor and in the documentation: every option by its name, and explained."""
    function = getattr(spectra, verb)
    places, own, shared = (part.split() for part in SIGNATURES[verb].split("|"))
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [name.strip("[]") for name in (*places, *own, *shared)]
    for name in places:
        parameter = parameters[name.strip("[]")]
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert (parameter.default is None) == name.startswith("[")
    for name in (*own, *shared):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    for name in shared:
        assert re.search(rf"^ +{name} : ", function.__doc__, flags=re.MULTILINE), name
    assert "{options}" not in function.__doc__
    needed = {name: None for name in own if parameters[name].default is inspect.Parameter.empty}
    with pytest.raises(TypeError, match=rf"{verb}\(\): .*'no_such_option'"):
        function("nothing", **needed, no_such_option=1)


def test_importing_costs_nothing():
    code = "import sys, spectra; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_help_loads_no_more_than_the_parser_needs():
    """So that ``spectra --help`` answers within a tenth of a second."""
    code = (
        "import sys, spectra.cli; heavy = {'torch', 'numpy', 'dataclasses', 'zipfile', 'spectra.files.checkpoint'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
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
    for module in (analysis, comparing, repairing, ranking, records, layers):
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


def test_architecture_names_every_folder():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for folder in MAY_IMPORT:
        assert f"`{folder}" in text


@pytest.mark.parametrize("case", ["full", "lora settled"])
def test_peak_memory(case):
    """At most six pairs of float32 matrices above the libraries, also when float64 must decide."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    answer = memory.run_case(case, 1536)
    assert answer["settled"] == case.endswith("settled")
    assert answer["pairs"] <= 6
