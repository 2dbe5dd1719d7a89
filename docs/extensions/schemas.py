"""The ``schema`` directive: the fields of a record, from the JSON schema that the package ships and the tests apply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

Schema = dict[str, Any]
LIMITS = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">"}


class SchemaDirective(SphinxDirective):
    """``{schema} report``: a list of fields, nested as they are."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.record = self.arguments[0]
        file = resources.files("spectra.records").joinpath(f"{self.record}.schema.json")
        schema: Schema = json.loads(file.read_text(encoding="utf-8"))
        self.definitions: dict[str, Schema] = schema.get("$defs", {})
        made: list[nodes.Node] = [nodes.paragraph("", schema.get("description", "")), self.fields(schema)]
        for name, definition in self.definitions.items():
            if "properties" in definition:
                made += [
                    nodes.rubric("", "", nodes.literal("", name), ids=[self.anchor(name)]),
                    self.fields(definition),
                ]
        return made

    def anchor(self, name: str) -> str:
        return f"schema-{self.record}-{name}"

    def fields(self, schema: Schema) -> nodes.definition_list:
        required = schema.get("required", ())
        listed = nodes.definition_list(classes=["fields"])
        for name, field in schema["properties"].items():
            term = nodes.term("", "", nodes.literal("", name), nodes.Text(" "))
            term += nodes.inline("", "", *self.kind(field), classes=["kind"])
            if name not in required:
                term += nodes.inline("", ", may be absent", classes=["kind"])
            definition = nodes.definition()
            if "description" in field:
                definition += nodes.paragraph("", field["description"])
            inner = self.inner(field)
            if inner is not None:
                definition += self.fields(inner)
            listed += nodes.definition_list_item("", term, definition)
        return listed

    @staticmethod
    def inner(field: Schema) -> Schema | None:
        """The object whose fields are listed under a field: its own, its entries', or its values'."""
        for candidate in (field, field.get("items"), field.get("additionalProperties"), *field.get("oneOf", ())):
            if isinstance(candidate, dict) and "properties" in candidate:
                return candidate
        return None

    def kind(self, field: Schema) -> Iterator[nodes.Node]:
        """What values a field has, in words."""
        if "$ref" in field:
            yield from self.referred(field["$ref"])
        elif "const" in field:
            yield nodes.literal("", json.dumps(field["const"]))
        elif "enum" in field:
            yield from self.joined([[nodes.literal("", json.dumps(value))] for value in field["enum"]])
        elif "oneOf" in field:
            yield from self.joined([list(self.kind(one)) for one in field["oneOf"]])
        else:
            types = field.get("type", "any value")
            yield nodes.Text(" or ".join([types] if isinstance(types, str) else types))
            limits = [f"{sign} {field[key]}" for key, sign in LIMITS.items() if key in field]
            if limits:
                yield nodes.Text(f" ({', '.join(limits)})")
            entries = field.get("items") or field.get("additionalProperties")
            if isinstance(entries, dict) and "properties" not in entries:
                yield nodes.Text(" of ")
                yield from self.kind(entries)

    def referred(self, reference: str) -> Iterator[nodes.Node]:
        name = reference.rpartition("/")[2]
        if not reference.startswith("#"):  # another record, e.g. ../spectra.report/1
            record = reference.removeprefix("../spectra.").partition("/")[0]
            yield nodes.reference("", f"a {record}", internal=True, refid=f"schema-{record}")
        elif "properties" in self.definitions[name]:
            yield nodes.reference("", "", nodes.literal("", name), internal=True, refid=self.anchor(name))
        else:
            yield from self.kind(self.definitions[name])

    @staticmethod
    def joined(kinds: list[list[nodes.Node]]) -> Iterator[nodes.Node]:
        for number, kind in enumerate(kinds):
            if number:
                yield nodes.Text(", " if number < len(kinds) - 1 else " or ")
            yield from kind


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("schema", SchemaDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
