"""The prose that users and contributors read has none of the phrases that need a second reading.

Each pattern stands with a sentence that it must find and the plain one that replaces it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PATTERNS = {
    r"\bof a (quantised|half-precision) base,": (
        "Of a quantised base, intruders are counted relative to its weights",
        "For a quantised base, intruders are counted relative to its weights",
    ),
    r"\bno \w+ but (by|what|to)\b": (
        "no pickle but by --allow-pickle",
        "Pickles are read only with --allow-pickle, and never executed.",
    ),
    r"\bruns? nothing in it\b": ("which runs nothing in it either", "never executed"),
    r"\bsurvives; |\bRuns that survive\b": ("what is finished survives; go on", "Finished work is saved; rerun it"),
    r"\bsame command goes on\b": ("the same command goes on", "rerun the command to continue"),
    r"\bthere is only as\b": (
        "a base that there is only as pytorch_model.bin",
        "a base available only as pytorch_model.bin",
    ),
    r"\bchanged in between\b": (
        "inputs or options that changed in between are noticed",
        "A run whose inputs or options changed is refused.",
    ),
    r"\bwhat a journal says\b|\bnot done again\b": (
        "What a journal says is finished is not done again",
        "Journaled work is never repeated.",
    ),
    r"\b(come|comes|came|coming) about\b": (
        "Watch intruders while they come about",
        "Watch intruders appear during training",
    ),
    r"\b(cannot|can|could not|is to) be had\b": (
        "the fine-tuned model cannot be had",
        "the fine-tuned weights cannot be built",
    ),
    r"\btells? too little\b": ("tells too little of small changes", "cannot resolve small changes"),
    r"\bcalled otherwise\b": ("called otherwise in its file", "stored under another name"),
    r"\blets? known \w+ be\b": ("lets known intruders be", "ignores known intruders"),
    r"\b(is|are) none of (its|the|those|these|them)\b": ("is none of its modules", "is not one of its modules"),
    r"\bshall\b": ("where their configs shall say", "from their configs"),
    r"\bmitigat(e|es|ed|ion)\b": ("spectra mitigate", "spectra repair"),
}
# Where a word of the list is another's name or what changed.
ALLOWED = {("CHANGELOG.md", r"\bmitigat(e|es|ed|ion)\b")}

DOCUMENTS = [
    *ROOT.glob("*.md"), ROOT / "fixtures" / "README.md", *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "spectra").rglob("*.schema.json"),
]  # fmt: skip
MODULES = sorted((ROOT / "spectra").rglob("*.py"))


def found(pattern: str, text: str) -> str | None:
    """What a pattern finds in a text, whatever its line breaks, with some words around it."""
    match = re.search(rf".{{0,40}}{pattern}.{{0,40}}", " ".join(text.split()), flags=re.IGNORECASE)
    return match and match[0]


def prose(path: Path) -> str:
    """What is read of a document: of a notebook its text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring and string literal; an f-string is one, with {} for its values."""
    within: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            within |= {id(part) for part in ast.walk(node) if part is not node}
            values = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_in_plain_english(path):
    name = str(path.relative_to(ROOT))
    for pattern in PATTERNS:
        if (name, pattern) not in ALLOWED:
            assert found(pattern, prose(path)) is None, name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_messages_are_in_plain_english(path):
    for line, text in strings(ast.parse(path.read_text(encoding="utf-8"))):
        for pattern in PATTERNS:
            assert found(pattern, text) is None, f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_finds_its_sentence_and_not_the_plain_one(pattern):
    wrong, plain = PATTERNS[pattern]
    assert found(pattern, wrong)
    for _, right in PATTERNS.values():
        assert not found(pattern, right), right
    assert not found(pattern, plain)


def test_sentences_are_found_across_lines_and_values():
    ((_, text),) = strings(ast.parse('f"{name}: its tensors cannot " \\\n    f"be had: {error}"'))
    assert found(r"\b(cannot|can|could not|is to) be had\b", text) == "{}: its tensors cannot be had: {}"
    assert found(r"\bshall\b", "a base that\n    shall be read")


def test_the_package_is_installed_from_a_clone():
    """It is on no index yet: no document tells anyone to install it from one."""
    for path in DOCUMENTS:
        assert not re.search(r"pip install [^\n`]*\bintruder-spectra\b", prose(path)), path.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
