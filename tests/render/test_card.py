"""The section for a model card: what it says, and how it is put into a card."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from spectra.cli.model_card import home
from spectra.errors import UsageError
from spectra.render.card import BEGIN, END, to_model_card, with_section
from spectra.render.naming import hub_name
from tests.support.reports import layer, report

FRONT = "---\nlicense: apache-2.0\nbase_model: org/base\ntags:\n- lora\n---\n"
SECTION = f"{BEGIN}\n\nnew\n\n{END}"
PARSER = MarkdownIt("commonmark").enable("table")


def invoked(text):
    """The words of the command in a section."""
    block = next(token for token in PARSER.parse(text) if token.type == "fence")
    return shlex.split(block.content)


def test_names_of_the_hub_are_kept():
    cache = "/home/jo/.cache/huggingface/hub/models--org--name/snapshots/abc123"
    assert hub_name(cache) == "org/name@abc123"
    assert hub_name(cache + "/sub/model.safetensors") == "org/name@abc123/sub/model.safetensors"
    assert hub_name("C:\\hub\\models--gpt2\\snapshots\\1f") == "gpt2@1f"
    assert hub_name("/data/models/name") is None
    made = report([layer("layers.0.q")], base={"path": cache, "format": "safetensors"})
    text = to_model_card(made)
    assert "| Base model | `org/name@abc123` |" in text
    assert invoked(text) == ["spectra", "audit", "tuned", "--base", "org/name@abc123"]


@pytest.mark.parametrize(
    ("named", "shown"),
    [("org/name", "org/name"), ("/home/jo/m/llama", "llama"), ("C:\\Users\\jo\\llama", "llama"), ("~/llama", "llama")],
)
def test_the_base_that_the_config_names(named, shown):
    tuned = {"path": "tuned", "format": "peft-lora", "base_model_name_or_path": named}
    text = to_model_card(report([layer("layers.0.q")], tuned=tuned))
    assert f"| Base model | `base` (the adapter's config names `{shown}`) |" in text
    assert "jo" not in text
    agreed = report([layer("layers.0.q")], tuned=tuned, base={"path": "base", "named_by_adapter": True})
    assert "config names" not in to_model_card(agreed)


HOSTILE = ["<!-- spectra:end -->", "a|b", "`x` | <b>", "```", "<script>alert(1)</script>", "x\n<!-- spectra:end -->\ny",
           "[a](javascript:b)", "\udcff", "$(rm x)", "*_~#"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    bad = layer("layers.1.q", vectors=(), status="failed", error=f"{name}: too large")
    base = {"path": f"/x/{name.replace('/', '')}", "caveat": name}
    tuned = {"path": "tuned", "format": "peft-lora", "base_model_name_or_path": name}
    made = report([layer("layers.0.q", [0], module_type=name), bad], base=base, tuned=tuned)
    text = to_model_card(made)
    harmless = [layer("layers.0.q", [0], module_type="q"), replace(bad, error="x: too large")]
    base, tuned = {"path": "/x/y", "caveat": "z"}, {**tuned, "base_model_name_or_path": "w"}
    plain = to_model_card(report(harmless, base=base, tuned=tuned))
    assert [line for line in text.splitlines() if "spectra:" in line and line.strip() in (BEGIN, END)] == [BEGIN, END]
    assert len(text.splitlines()) == len(plain.splitlines())
    rendered = PARSER.parse(text)
    assert [token.type for token in rendered] == [token.type for token in PARSER.parse(plain)]
    inline = [child.type for token in rendered for child in token.children or ()]
    assert inline.count("link_open") == 1, "the paper"
    tags = {child.content for token in rendered for child in token.children or () if child.type == "html_inline"}
    assert tags <= {"<code>", "</code>"}
    section = with_section(with_section(b"", text, "x"), SECTION, "x")
    assert section.decode() == SECTION + "\n"


def test_its_home_is_linked_only_if_it_has_one(monkeypatch):
    made = report([layer("layers.0.q")])
    assert "Made with Spectra 0." in to_model_card(made)
    assert "Made with [Spectra](https://example.org/x) 0." in to_model_card(made, url="https://example.org/x")
    assert home() is None

    class Metadata:
        def get_all(self, name):
            return ["Issues, https://example.org/i", "Homepage, https://example.org/x"]

    monkeypatch.setattr("importlib.metadata.metadata", lambda name: Metadata())
    assert home() == "https://example.org/x"


def test_what_could_not_be_analysed_is_said():
    bad = layer("layers.1.q", vectors=(), status="non_finite", error="/home/jo/a/x.safetensors: NaN")
    text = to_model_card(report([layer("layers.0.q"), bad]))
    assert "**1 that could not be analysed**" in text
    assert "- non\\_finite: layers.1.q: x.safetensors: NaN" in text
    assert "**Cannot tell: the one changed layer could not be analysed.**" in to_model_card(report([bad]))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("", "{}\n"),
        ("# Mine\n", "# Mine\n\n{}\n"),
        ("# Mine", "# Mine\n\n{}\n"),
        ("# Mine\n\n", "# Mine\n\n{}\n"),
        ("# Mine\n  \n", "# Mine\n  \n{}\n"),
        (FRONT, FRONT + "\n{}\n"),
        ("\ufeff" + FRONT + "\ntext\n", "\ufeff" + FRONT + "\ntext\n\n{}\n"),
        ("\ufeff", "\ufeff{}\n"),
        (f"a\n{BEGIN}\nold\n{END}\nb", "a\n{}\nb"),
        (f"a\n  {BEGIN}  \n{END}\t\nb\n\n", "a\n  {}\t\nb\n\n"),
        ("<!--spectra:begin-->\n<!--   spectra:end -->", "{}"),
        (f"say `{BEGIN}` and {END} here\n", f"say `{BEGIN}` and {END} here\n\n{{}}\n"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_rest_of_a_card_stays(card, expected, ends):
    before = card.replace("\n", ends).encode()
    section = SECTION.replace("\n", ends if b"\r\n" in before else "\n")
    after = expected.replace("\n", ends if b"\r\n" in before else "\n").replace("{}", section).encode()
    assert with_section(before, SECTION, "x") == after
    assert with_section(after, SECTION, "x") == after


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab\n\r\t -#é\ufeff"), st.text(alphabet="ab\n\r\t -#é"), st.booleans())
def test_every_byte_outside_the_markers_stays(before, after, there):
    if there:
        card = f"{before}\n{BEGIN}\nold\n{END}\n{after}".encode()
        made = with_section(card, SECTION, "x")
        assert made.startswith(f"{before}\n{BEGIN}".encode())
        assert made.endswith(f"{END}\n{after}".encode())
    else:
        card = before.encode()
        made = with_section(card, SECTION, "x")
        assert made.startswith(card)
    again = with_section(made, SECTION, "x")
    assert again.count(BEGIN.encode()) == 1


def test_errors_name_the_card():
    with pytest.raises(UsageError, match=r"^here\.md: not text"):
        with_section(b"\xff\xfe", "", "here.md")
