"""TeX formulas as MathML, which browsers draw by themselves: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml, unichar2tex
from sphinx.application import Sphinx


def as_mathml(tex: str, *, block: bool) -> str:
    """A formula as a ``<math>`` element."""
    tree = latex2mathml.tex2mathml(tex.translate(unichar2tex.uni2tex_table), as_block=block)
    return str(tree)


def in_text(translator: Any, node: nodes.math) -> None:
    """Writes a formula within a line."""
    translator.body.append(as_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def on_its_own(translator: Any, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    translator.body.append(f'<div class="math">{as_mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer; conf.py chooses it."""
    app.add_html_math_renderer("mathml", (in_text, None), (on_its_own, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
