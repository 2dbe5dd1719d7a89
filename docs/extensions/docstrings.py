"""Docstrings of this house as reStructuredText, and references to public names from wherever they are defined.

They are numpy's, but the text of an entry follows its names on the same line, with no type: ``name, other : what it
is``.  Types stand in the signature.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import spectra

SECTIONS = ("Parameters", "Attributes", "Returns", "Yields", "Raises", "Examples")
EXCEPTION = re.compile(r"\b[A-Z]\w+Error\b")
CODE = re.compile(r"(``.*?``|:\w+:`.*?`)")


def escaped(text: str) -> str:
    """A line without the marks that mean something to reStructuredText and nothing to whoever wrote |cos|."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"(\||(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of a docstring; the first has no title."""
    title = ""
    held: list[str] = []
    rest = iter(range(len(lines)))
    for at in rest:
        if lines[at] in SECTIONS and at + 1 < len(lines) and set(lines[at + 1]) == {"-"}:
            yield title, held
            title, held = lines[at], []
            next(rest)
        else:
            held.append(lines[at])
    yield title, held


def entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(names, text) of each entry of a section: continuation lines are indented, or the names end in a comma."""
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") or (joined and joined[-1].endswith((",", " :"))):
            joined[-1] += " " + line.strip()
        elif line.strip():
            joined.append(line)
    for entry in joined:
        names, colon, text = entry.partition(" : ") if " : " in entry else entry.partition(" :")
        yield (names.strip(), text.strip()) if colon else ("", entry.strip())


def field(title: str, lines: list[str]) -> Iterator[str]:
    """A section as a field with a line an entry."""
    yield f":{title}:"
    for names, text in entries(lines):
        text = escaped(text)
        if title == "Raises":
            names = EXCEPTION.sub(lambda match: f":exc:`~spectra.errors.{match[0]}`", names)
        elif title in ("Returns", "Yields"):
            names = f"*{names}*"
        else:
            names = ", ".join(f"**{escaped(name.strip())}**" for name in names.split(",") if name.strip())
        yield f"   * {names} – {text}" if names.strip("*") else f"   * {text}"
    yield ""


def as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrites a docstring in place."""
    if what == "data" and lines[:1] == (inspect.getdoc(type(obj)) or "").splitlines()[:1]:
        lines.clear()  # a value has its type's, which tells nothing of it
    made: list[str] = []
    for title, held in sections(list(lines)):
        if title == "":
            for before, line in zip(["", *held], held, strict=False):
                drawn = line.startswith("    ")  # as it stands, like the tree of the errors
                made += ["::", ""] * (drawn and not before) + [line if drawn else escaped(line)]
        elif title == "Examples":
            made += [".. rubric:: Example", "", *held, ""]
        else:
            made += ["", *field(title, held)]
    lines[:] = made


def public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Where a name is described, whichever module a docstring or an annotation knows it from."""
    if node.get("refdomain") != "py":
        return None
    last = str(node["reftarget"]).rpartition(".")[2]
    domain = env.domains.python_domain
    places = [name for name in (f"spectra.{last}", f"spectra.plots.{last}", f"spectra.errors.{last}")
              if name in domain.objects]  # fmt: skip
    places += [
        name
        for name in domain.objects
        if name.rpartition(".")[2] == last and (last[:1].isupper() or "." not in str(node["reftarget"]))
    ]
    if not places:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", places[0], node, content)


def public_names_are_described(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of a public name that no page describes."""
    from sphinx.util import logging

    from spectra import plots

    names = [f"spectra.{name}" for name in spectra.__all__] + [f"spectra.plots.{name}" for name in plots.__all__]
    described = {name.rpartition(".")[2] for name in env.domains.python_domain.objects}
    for name in names:
        if name.rpartition(".")[2] not in described:
            logging.getLogger(__name__).warning("no page describes %s", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects all of this."""
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("missing-reference", public_name)
    app.connect("env-check-consistency", public_names_are_described)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
