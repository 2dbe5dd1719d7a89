"""The documentation: it builds without a warning, and links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import spectra
from benchmarks.browser import browser, chromium
from spectra import plots
from spectra.cli import COMMANDS
from tests.support.paths import ROOT

pytest.importorskip("sphinx")

# Where links may lead: nothing is fetched.
HOSTS = {"arxiv.org", "github.com", "thinkingmachines.ai"}
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CONTRIBUTING.md says, with every warning an error."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "doctrees", "docs", out / "html"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return out / "html"


class Page(HTMLParser):
    """What a page has: ids, links, what it loads, and the alternative texts of its pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.unnamed: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = {key: value or "" for key, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if (
            tag in LOADING
            and LOADING[tag] in values
            and values.get("rel") not in ("canonical", "next", "prev", "index")
        ):
            self.loads.append(values[LOADING[tag]])
        if tag == "img" and not values.get("alt"):
            self.unnamed.append(values.get("src", "")[:80])
        if values.get("role") == "img" and not values.get("aria-label"):
            self.unnamed.append(str(values))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_links_within_the_site_lead_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


def test_links_elsewhere_go_to_known_hosts(pages):
    outside = {link for page in pages.values() for link in page.links if urlsplit(link).scheme}
    assert any("arxiv.org" in link for link in outside)
    for link in outside:
        assert urlsplit(link).scheme == "https", link
        assert urlsplit(link).hostname in HOSTS, link


def test_pages_load_nothing_from_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.loads:
            parts = urlsplit(source)
            assert parts.scheme in ("", "data"), f"{path.name}: {source[:80]}"
            assert parts.scheme or (path.parent / unquote(parts.path)).exists(), f"{path.name}: {source}"


def test_ids_are_used_once_and_pictures_described(pages):
    for path, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), (path.name, [one for one in page.ids if page.ids.count(one) > 1])
        assert not page.unnamed, (path.name, page.unnamed)


def test_tables_are_made_from_the_code():
    """``python docs/tables.py`` writes them."""
    made = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    found = made["pages"]()
    assert {page.name for page in found} == {"formats.md", "concepts.md"}
    for page, text in found.items():
        assert text == page.read_text(encoding="utf-8"), page.name
    for rows in made["tables"]().values():
        assert rows.count("\n") > 5


def test_every_command_option_and_public_name_is_there(pages):
    ids = {path.relative_to(path.parents[1] if path.parent.name == "python" else path.parent).as_posix(): page.ids
           for path, page in pages.items()}  # fmt: skip
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert f"spectra-{name}" in ids["commands.html"]
    assert "spectra-audit-top-k" in ids["commands.html"]
    described = {one.rpartition(".")[2] for name, found in ids.items() if name.startswith("python/") for one in found}
    for name in [*spectra.__all__, *plots.__all__]:
        assert name in described, name


def test_the_schemas_fields_are_there(site, pages):
    text = " ".join(pages[site / "schemas.html"].text)
    for field in ("max_cosine_bounds", "fingerprint_covers", "null_p_value", "update_error"):
        assert field in text


def test_pictures_follow_the_theme(site):
    """Black and white are the page's colours, so that dark pages have light lines."""
    drawn = (site / "concepts.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<div class="drawing.*?</svg>', drawn, flags=re.DOTALL)
    assert len(pictures) >= 10
    assert sum("var(--color-foreground-primary)" in picture for picture in pictures) >= 10
    for picture in pictures:
        assert "#ffffff" not in picture
        assert "#000000" not in picture


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as hosts of repositories make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "fixtures").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"),
             *(ROOT / "notebooks").glob("*.ipynb")]  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_the_repository_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<(?:img|source)[^>]* src(?:set)?="([^"]+)"', text)
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme in ("https", "data"), link
            assert parts.hostname is None or parts.hostname in HOSTS, link
            continue
        target = (path.parent / parts.path) if parts.path else path
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target), link


@pytest.mark.skipif(
    chromium() is None and os.environ.get("SPECTRA_TEST_BROWSER") != "required", reason="there is no Chromium here"
)
@pytest.mark.parametrize("page", ["index", "usual", "repair", "speed"])
def test_no_page_is_wider_than_the_window(site, page):
    with browser() as running:
        shown = running.new_page()
        shown.goto((site / f"{page}.html").as_uri())
        for width in (
            390,
            800,
            1100,
            1200,
            1263,
            1264,
            1320,
            1552,
            1695,
            1696,
            1900,
        ):  # on either side of each breakpoint
            shown.set_viewport_size({"width": width, "height": 900})
            assert shown.evaluate("document.documentElement.scrollWidth") <= width, width
