"""The ``measurements`` directive: every table in ``benchmarks/results``, those that are named first.

``python -m benchmarks`` writes them; a new one is on the page when the site is built next.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"


class Measurements(SphinxDirective):
    """A section for each file of results."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        first = self.arguments[0].split() if self.arguments else []
        names = [*first, *sorted({path.stem for path in FOLDER.glob("*.md")} - {*first})]
        return [node for name in names for node in self.section(FOLDER / f"{name}.md")]

    def section(self, path: Path) -> list[nodes.Node]:
        self.env.note_dependency(str(path))
        text = re.sub(r"^!\[.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        return self.parse_text_to_nodes(f"#{text}", allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("measurements", Measurements)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
