"""Notebooks as pages: text, code and the outputs stored in them, which the tests hold to a run.

A page in ``docs/notebooks`` is empty but for its name, which is that of the notebook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FOLDER = Path(__file__).parents[2] / "notebooks"


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook as MyST."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell(cell)) + "\n"


def linked(text: str) -> str:
    """Text whose links to other notebooks lead to their pages."""
    return re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", text)


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield linked(source)
        return
    yield _fenced(source, "python")
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield _fenced("".join(output["text"]), "text")
            continue
        data = {kind: "".join(value) for kind, value in output["data"].items()}
        if "image/png" in data:
            yield f"![A figure]({'data:image/png;base64,' + data['image/png'].replace(chr(10), '')})"
        elif "text/markdown" in data:
            yield linked(data["text/markdown"])
        elif "text/html" in data:
            yield f"```{{raw}} html\n<div class='table-wrapper'>{data['text/html']}</div>\n```"
        else:
            yield _fenced(data["text/plain"], "text")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the notebook of that name in a page's place."""
    folder, _, stem = name.rpartition("/")
    if folder == "notebooks" and stem != "index":
        path = FOLDER / f"{stem}.ipynb"
        app.env.note_dependency(str(path))
        source[0] = as_markdown(json.loads(path.read_text(encoding="utf-8")))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the reader."""
    app.connect("source-read", read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
