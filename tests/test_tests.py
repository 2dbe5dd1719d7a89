"""That tests lie where what they test lies, and that none imports from another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.paths import ROOT

TESTS, PACKAGE = ROOT / "tests", ROOT / "spectra"
# What no single module owns, and why.
CONTRACTS = {
    "cli/test_hostile.py": "every hostile case by every command",
    "cli/test_recipes.py": "the recipes for CI, the action and the hook, by the tool they are for",
    "files/test_hostile.py": "what is broken or made to harm, whichever reader it meets",
    "page/test_browser.py": "the whole page, as a browser has it",
    "svd/test_engines.py": "what holds of every engine",
    "svd/test_proof.py": "every engine on the matrices of benchmarks/proof.py",
    "test_benchmarks.py": "benchmarks/",
    "test_whole_fine_tunes.py": "a verdict on the whole fine-tune, or a word that it is on a part",
    "test_docs.py": "docs/",
    "test_examples.py": "what the README and the documentation show",
    "test_fixtures.py": "fixtures/",
    "test_language.py": "the prose that users and contributors read",
    "test_notebooks.py": "notebooks/",
    "test_quantised_language_model.py": "a published model as it is shipped, quantised, as the base of a fine-tune",
    "test_structure.py": "the whole package",
    "test_tests.py": "tests/",
}
FILES = sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> list[str]:
    """The modules that a file imports, and what it imports from them, which may be modules."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_nothing_is_imported_from_tests():
    """What tests share is in ``tests/support``, or a fixture."""
    of_a_test = re.compile(r"\btests(?:\.\w+)*\." + "test_")  # also in a script that a string holds
    for path in FILES:
        names = [name for name in imported(path) if name.startswith("tests.")]
        assert not [name for name in names if any(part.startswith("test_") for part in name.split("."))], path
        assert not of_a_test.search(path.read_text()), path


def is_of(stem: str, folder: Path) -> bool:
    """Whether a module of the folder, or the folder itself, has that name or one that it begins with."""
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return any(stem == name or stem.startswith(f"{name}_") for name in modules | {folder.name})


def misplaced(name: str) -> str | None:
    """Why a test does not lie where what it tests lies, or None."""
    path = TESTS / name
    folder = PACKAGE / path.parent.relative_to(TESTS)
    if not (folder / "__init__.py").exists():
        return f"there is no {folder.relative_to(ROOT)}"
    if not (path.parent / "__init__.py").exists():
        return "its folder has no __init__.py"
    if name not in CONTRACTS and not is_of(path.stem.removeprefix("test_"), folder):
        return f"no module of {folder.relative_to(ROOT)} has that name"
    return None


def test_tests_lie_where_their_modules_lie():
    """The tests of ``spectra/a/b.py`` are ``tests/a/test_b.py`` and ``tests/a/test_b_more.py``."""
    names = [str(path.relative_to(TESTS)) for path in FILES if path.name.startswith("test_")]
    assert not {name: why for name in names if (why := misplaced(name))}


def test_the_contracts_are_there():
    for name in CONTRACTS:
        assert (TESTS / name).exists()
