"""The ``drawing`` directive: a function of ``docs/figures.py`` drawn into the page, in the page's own colours.

``{drawing} intruder`` with ``:alt:`` for those who do not see it, and a caption as its content.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, ClassVar

import figures
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from spectra.plots import render

# Of the page, which has a light and a dark theme; static/spectra.css has the blue.
COLOURS = {
    "#ffffff": "var(--color-background-primary)",
    "#000000": "var(--color-foreground-primary)",
    "#0072b2": "var(--drawing-blue)",
}


def as_html(figure: Any, name: str, alt: str) -> str:
    """A figure as SVG in a page: black and white are the page's, and its ids no other drawing's."""
    svg = render(figure, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    width = float(figure.get_size_inches()[0])
    size = "wide" if width > 5.5 else "narrow"  # inches: two columns of a paper, or about one
    return f'<div class="drawing {size}" role="img" aria-label="{html.escape(alt, quote=True)}">{svg}</div>'


class Drawing(SphinxDirective):
    """One figure and its caption."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(Path(figures.__file__)))
        figure = getattr(figures, name.replace("-", "_"))()
        made: list[nodes.Node] = [nodes.raw("", as_html(figure, name, self.options["alt"]), format="html")]
        if self.content:
            made.append(nodes.container("", *self.parse_content_to_nodes(), classes=["drawn"]))
        return made


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("drawing", Drawing)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
