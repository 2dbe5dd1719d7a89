"""The directives ``commands`` and ``formats``: what each command takes and writes, from the parsers that parse it.

Every option becomes a target of ``{option}`` (``{option}`spectra audit --top-k```), every command one of ``{ref}``
(``{ref}`spectra-audit```).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from spectra.cli import COMMANDS

WIDTH = 88  # columns of a usage line


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser, in the order in which ``spectra --help`` lists them."""
    commands = argparse.ArgumentParser(prog="spectra").add_subparsers()
    for command in COMMANDS:
        command.add(commands)
    return commands.choices


def formatter_of(parser: argparse.ArgumentParser) -> argparse.HelpFormatter:
    """What makes the words of ``--help``, for a wide terminal."""
    kind: Any = parser.formatter_class
    formatter: argparse.HelpFormatter = kind(prog=parser.prog, width=WIDTH)
    return formatter


def usage(parser: argparse.ArgumentParser) -> str:
    """The usage line as ``--help`` prints it."""
    formatter = formatter_of(parser)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    return formatter.format_help().removeprefix("usage: ").strip()


def paragraphs(text: str) -> Iterator[nodes.Node]:
    """Plain text of a parser: paragraphs, with `code` in them; what is indented stays as it is."""
    for block in re.split(r"\n\s*\n", text.strip()):
        if re.search(r"^ +\S", block, flags=re.MULTILINE):
            yield nodes.literal_block("", block, language="text")
        else:
            yield nodes.paragraph("", "", *in_line(" ".join(block.split())))


def in_line(text: str) -> Iterator[nodes.Node]:
    """Text with what stands in backticks, and options, set as code."""
    for part in re.split(r"(`[^`]+`|(?<!\S)--[a-z][a-z-]+)", text):
        if part.startswith(("`", "--")):
            yield nodes.literal("", part.strip("`"))
        elif part:
            yield nodes.Text(part)


class CommandsDirective(SphinxDirective):
    """A section for every command."""

    def run(self) -> list[nodes.Node]:
        return [self.section(name, parser) for name, parser in parsers().items()]

    def section(self, name: str, parser: argparse.ArgumentParser) -> nodes.section:
        program = f"spectra {name}"
        section = nodes.section(ids=[f"spectra-{name}"], names=[program])
        section += nodes.title("", program)
        self.env.domains.standard_domain.note_hyperlink_target(
            f"spectra-{name}", self.env.docname, f"spectra-{name}", program
        )
        section += list(paragraphs(parser.description or ""))
        section += nodes.literal_block("", usage(parser), language="text", classes=["usage"])
        for group in parser._action_groups:
            actions = [one for one in group._group_actions if one.help != argparse.SUPPRESS and one.dest != "help"]
            if actions:
                title = (group.title or "").capitalize()
                section += nodes.rubric("", {"Positional arguments": "Arguments"}.get(title, title))
                section += nodes.definition_list("", *(self.item(program, parser, one) for one in actions))
        section += list(paragraphs(parser.epilog or ""))
        return section

    def item(self, program: str, parser: argparse.ArgumentParser, action: Any) -> nodes.definition_list_item:
        formatter = formatter_of(parser)
        names = list(action.option_strings) or [action.metavar or action.dest]
        value = ""
        if action.option_strings and action.nargs != 0:
            value = f" {formatter._format_args(action, action.dest.upper())}"
        term = nodes.term(classes=["option"])
        for number, name in enumerate(names):
            anchor = re.sub(r"\W+", "-", f"{program} {name}").strip("-").lower()
            term["ids"].append(anchor)
            if action.option_strings:
                self.env.domains.standard_domain.add_program_option(program, name, self.env.docname, anchor)
            if number:
                term += nodes.Text(", ")
            term += nodes.literal("", name + value * (number == len(names) - 1))
        explained = formatter._expand_help(action) if action.help else ""
        if action.nargs in ("+", "*") and not action.option_strings:
            explained += " (one or more)" if action.nargs == "+" else " (any number)"
        what = nodes.definition("", nodes.paragraph("", "", *in_line(explained)))
        return nodes.definition_list_item("", term, what)


class FormatsDirective(SphinxDirective):
    """What each command writes: the choices of its ``--format``."""

    def run(self) -> list[nodes.Node]:
        items = []
        for name, parser in parsers().items():
            for action in parser._actions:
                if "--format" in action.option_strings and action.choices is not None:
                    link = nodes.reference("", f"spectra {name}", internal=True)
                    link["refuri"] = (
                        self.env.app.builder.get_relative_uri(self.env.docname, "commands") + f"#spectra-{name}"
                    )
                    term = nodes.term("", "", link)
                    text = nodes.paragraph()
                    for number, choice in enumerate(action.choices):
                        text += [nodes.Text(", " * bool(number)), nodes.literal("", str(choice))]
                    items.append(nodes.definition_list_item("", term, nodes.definition("", text)))
        return [nodes.definition_list("", *items)]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("commands", CommandsDirective)
    app.add_directive("formats", FormatsDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
