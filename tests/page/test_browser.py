"""The HTML report in a browser: real clicks, keys and pages printed, and nothing that runs but our own script.

They are skipped where there is no Chromium, unless SPECTRA_TEST_BROWSER says that there must be one.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager

import numpy as np
import pytest

import spectra
from benchmarks.browser import browser, chromium, until
from benchmarks.page import LIMIT_SECONDS, made_up, made_up_matrices, opened
from spectra.errors import UsageError
from spectra.records.comparison import Comparison
from spectra.records.layer import Similarity
from spectra.records.sweeps import intruders_at, layer_intruders_at
from spectra.tasks.similarity import similarity_matrices
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report

if chromium() is None and os.environ.get("SPECTRA_TEST_BROWSER") != "required":
    pytest.skip("no Chromium here; install Debian's chromium to run these", allow_module_level=True)

MEMBERS = ("lora-r4", "full", "lora-r1")


@pytest.fixture(scope="module")
def running():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def one():
    return spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base")


@pytest.fixture(scope="module")
def page_of_one(one, tmp_path_factory):
    return written(tmp_path_factory, spectra.to_html(one, matrices=similarity_matrices(one)))


@pytest.fixture(scope="module")
def several():
    return spectra.compare([FIXTURES / name for name in MEMBERS], FIXTURES / "base", quick=True)


@pytest.fixture(scope="module")
def page_of_several(several, tmp_path_factory):
    return written(tmp_path_factory, spectra.to_html(several, matrices=similarity_matrices(several.reports, number=2)))


@pytest.fixture(scope="module")
def bounded():
    """A report in which of half of the vectors only bounds are known."""
    return made_up(28, bounded=0.5)


@pytest.fixture(scope="module")
def page_of_bounded(bounded, tmp_path_factory):
    return written(tmp_path_factory, spectra.to_html(bounded))


def written(tmp_path_factory, html):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(html)
    return file


@contextmanager
def shown(running, file, *, width=1280, expected=(), **options):
    """The page open; afterwards that it said nothing on the console and asked nobody for anything."""
    context = running.new_context(viewport={"width": width, "height": 800}, **options)
    context.set_default_timeout(15_000)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text.partition(" directive")[0]))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"a dialog: {dialog.message}"))
    context.on("page", lambda other: said.append(f"opened {other.url}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    try:
        yield page
        assert said == list(expected)
        assert {url for url in asked if not url.startswith(("data:", "blob:"))} <= {file.as_uri(), "about:blank"}
    finally:
        context.close()


def set_epsilon(page, epsilon):
    page.locator("#epsilon").fill(str(epsilon))
    until(page, f"document.querySelector('#epsilon-value').textContent === '{epsilon:.2f}'")
    until(page, "frame === null")


def in_view(page, selector):
    """Scrolls to a figure and waits until it is drawn."""
    found = page.locator(selector).first
    found.scroll_into_view_if_needed()
    found.locator(".main-svg").first.wait_for()
    return found


def rows(page, table="#layers"):
    return page.locator(f"{table} tbody tr").evaluate_all(
        "lines => lines.map(line => [...line.cells].map(cell => cell.textContent))"
    )


def drawn(page):
    page.evaluate("Promise.all([...figures].filter(([, one]) => one.seen).map(([element]) => draw(element)))")


def test_what_was_found_comes_first(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        assert page.locator("section.finding h2").inner_text() == "35 intruder dimensions"
        lead = page.locator("section.finding .lead").inner_text()
        assert lead == "Intruder dimensions: 35 of 280 leading singular vectors of 28 layers (12.5%)."
        assert "do not measure it" in page.locator("section.finding").inner_text()
        assert "strong" in page.locator(".scale [aria-current]").inner_text()
        assert page.locator("#recount").inner_text() == "35 intruders (12.5%) in 22 of 28 layers; level: strong"
        record = page.locator("#record-part").inner_text()
        assert "\nbase\n" in record
        assert str(FIXTURES.parent) not in record, "a page that is passed on does not say where it was made"
        assert "the base has no such weight" in record
        assert page.title() == "lora-r4: 35 intruder dimensions · Spectra"


def test_the_slider_counts_as_the_package_does(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        for epsilon in (0.2, 0.41, 0.5, 0.51, 0.9, 1.0):
            set_epsilon(page, epsilon)
            found = intruders_at(one, epsilon)
            assert page.locator("#recount b").inner_text() == str(found)
            by_name = {row[0]: row[1] for row in rows(page)}
            assert by_name == {one_.name: str(layer_intruders_at(one_, one, epsilon)) for one_ in one.layers}
        page.locator("#epsilon").focus()
        page.keyboard.press("ArrowLeft")
        until(page, "state.epsilon === 9900")
        assert page.locator("#recount b").inner_text() == str(intruders_at(one, 0.99))
        page.locator("#reset").click()
        assert page.locator("#recount b").inner_text() == "35"
        assert page.locator("#reset").is_disabled()


def test_every_chart_recounts(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        for name in ("by-depth", "by-type", "by-index", "by-epsilon"):
            in_view(page, f"#{name}")
        set_epsilon(page, 0.7)
        drawn(page)
        found = intruders_at(one, 0.7)
        for name in ("by-depth", "by-index"):
            assert page.evaluate(f"byId('{name}').data[0].y.reduce((a, b) => a + b)") == found
        assert page.evaluate("byId('by-epsilon').data[0].y[69]") == found
        assert page.evaluate("byId('by-epsilon').layout.shapes[0].x0") == 0.7
        shares = page.evaluate("byId('by-type').data[0].x")
        assert max(shares) == pytest.approx(
            max(
                sum(layer_intruders_at(layer, one, 0.7) for layer in one.layers if layer.module_type == kind)
                / (10 * sum(layer.module_type == kind for layer in one.layers))
                for kind in {layer.module_type for layer in one.layers}
            )
        )


def test_bounds_are_counted_honestly(running, page_of_bounded, bounded):
    with shown(running, page_of_bounded) as page:
        assert page.locator("#recount b").inner_text() == str(bounded.total("all"))
        for epsilon in (0.3, 0.6, 0.75):
            with pytest.raises(UsageError, match="only known to lie in"):
                intruders_at(bounded, epsilon)
            least = most = 0
            for layer_ in bounded.layers:
                for vector in layer_.vectors:
                    lower, upper = vector.max_cosine_bounds
                    least += upper < epsilon
                    most += lower < epsilon
            set_epsilon(page, epsilon)
            assert page.locator("#recount b").inner_text() == f"at least {least}, at most {most}"
        assert "only bounds are known" in page.locator("#recount").inner_text()
        in_view(page, "#map .plot")
        drawn(page)
        assert page.evaluate("document.querySelector('#map .plot').data[0].z.flat().includes(UNDECIDED)")
        assert "bounds do not say" in page.locator("#legend").inner_text()
        assert any("–" in row[1] for row in rows(page))


def test_the_map_shows_numbers_and_opens_layers(running, page_of_one, one):
    first = one.layers[0]
    with shown(running, page_of_one) as page:
        plot = in_view(page, "#map .plot")
        assert plot.evaluate("e => e.data[0].z.flat().filter((z) => z < 0.5).length") == sum(
            layer.intruders for layer in one.layers if layer.module_type == first.module_type
        )
        box = plot.locator(".heatmaplayer image").bounding_box()
        cell = (box["x"] + box["width"] / 20, box["y"] + box["height"] / 8)
        page.mouse.move(*cell)
        hover = plot.locator(".hovertext").first
        hover.wait_for()
        assert first.name in hover.text_content()
        assert f"{first.vectors[0].max_cosine:.3f}" in hover.text_content()
        page.mouse.click(*cell)
        dialog = page.locator("dialog[open]")
        dialog.wait_for()
        assert dialog.locator("h2").inner_text() == first.name
        assert "#layer-0-0" in page.url
        dialog.locator(".profile .main-svg").first.wait_for()
        assert dialog.locator("tbody tr").count() == 10
        page.keyboard.press("Escape")
        until(page, "!document.querySelector('dialog').open")
        assert page.evaluate("document.activeElement.classList.contains('plot')")


def test_everything_by_keyboard(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        in_view(page, "#map .plot")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('#map .plot')"):
                break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        second = [layer for layer in one.layers if layer.module_type == one.layers[0].module_type][1]
        status = page.locator("#map-status").text_content()
        assert second.name in status
        assert f"index 1: max |cos| {second.vectors[1].max_cosine:.2f}"[:-1] in status
        page.keyboard.press("Enter")
        page.locator("dialog[open]").wait_for()
        assert page.locator("dialog h2").inner_text() == second.name
        page.locator("dialog .close").focus()
        page.keyboard.press("Enter")
        until(page, "!document.querySelector('dialog').open")
        head = page.locator("#layers thead button").first
        head.focus()
        page.keyboard.press("Enter")
        assert page.locator("#layers th").first.get_attribute("aria-sort") == "ascending"
        names = [row[0] for row in rows(page)]
        assert names == [layer.name for layer in one.layers]


def test_the_table_sorts_and_filters(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        counts = [int(row[1]) for row in rows(page)]
        assert counts == sorted(counts, reverse=True)
        page.locator("#layers thead button", has_text="Lowest cos").click()
        lowest = [float(row[3]) for row in rows(page)]
        assert lowest == sorted(lowest, reverse=True)
        page.locator("#layers thead button", has_text="Lowest cos").click()
        assert [float(row[3]) for row in rows(page)] == sorted(lowest)
        page.locator("#filter-name").fill("LAYERS.1.")
        assert {row[0].split(".")[2] for row in rows(page)} == {"1"}
        page.locator("#filter-type").select_option(label="mlp.up_proj")
        assert [row[0] for row in rows(page)] == ["model.layers.1.mlp.up_proj"]
        assert page.locator("#filter-count").inner_text() == "1 of 28 layers"
        page.locator("#filter-type").select_option(label="all")
        page.locator("#filter-name").fill("")
        page.locator("#filter-flagged").check()
        assert len(rows(page)) == sum(layer.intruders > 0 for layer in one.layers)
        page.locator("#filter-name").fill("no such layer")
        assert rows(page) == []
        page.locator("#filter-name").fill("")
        page.locator("#layers .open").first.click()
        opened_ = page.locator("dialog h2").inner_text()
        page.locator("dialog [aria-label='Next layer']").click()
        assert page.locator("dialog h2").inner_text() != opened_


def test_the_matrices_are_those_that_were_given(running, page_of_one, one):
    with shown(running, page_of_one) as page:
        assert page.locator("#matrices .plot").count() == 12
        assert "12 of the 22 flagged layers" in page.locator("#matrices-note").inner_text()
        first = in_view(page, "#matrices .plot")
        z = first.evaluate("e => e.data[0].z")
        given = similarity_matrices(one, number=1)[0].cosines
        assert (len(z), len(z[0])) == given.shape
        assert abs(given - z).max() < 0.5 / 255 + 1e-9
        marks = first.evaluate("e => e.data[1].x")
        assert marks == list(max(one.layers, key=lambda layer: layer.intruders).intruder_indices)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_readable(running, page_of_one, scheme):
    with shown(running, page_of_one, color_scheme=scheme) as page:
        for word, expected in (("System", scheme), ("Light", "light"), ("Dark", "dark")):
            if word != "System":
                page.locator("#theme").click()
            assert page.locator("#theme .word").inner_text() == word
            until(page, f"isDark() === {str(expected == 'dark').lower()}")
            contrast = page.evaluate(
                """() => {
                    const numbers = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
                    const light = ([r, g, b]) => {
                        const [x, y, z] = [r, g, b].map((c) => {
                            c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
                        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
                    };
                    const paper = light(numbers(getComputedStyle(document.body).backgroundColor));
                    const soft = [".finding .what", ".finding h2", ".figures small", ".scale li", "#layers .open",
                        "#layers .hit", ".glossary dd", "#filter-count", "#recount b"];
                    return soft.map((name) => {
                        const ink = light(numbers(getComputedStyle(document.querySelector(name)).color));
                        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
                    });
                }"""
            )
            assert min(contrast) >= 4.5, (expected, contrast)  # WCAG AA
            in_view(page, "#by-depth")  # what is out of view is drawn anew when it is looked at
            until(page, "byId('by-depth').layout.xaxis.tickfont.color === colours().soft")


def test_a_phone_scrolls_downwards_only(running, page_of_one, page_of_several):
    for file in (page_of_one, page_of_several):
        with shown(running, file, width=360, is_mobile=True, has_touch=True) as page:
            page.evaluate("Promise.all([...figures.keys()].map(draw))")
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            page.locator("#layers .open").first.tap()
            page.locator("dialog[open]").wait_for()
            assert page.evaluate("document.querySelector('dialog').getBoundingClientRect().width") <= 360


def test_print_has_everything(running, page_of_several):
    with shown(running, page_of_several, color_scheme="dark") as page:
        page.locator("#comparison tbody .open").first.wait_for()
        pdf = page.pdf(format="A4", print_background=True)
        assert pdf.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
        until(page, "[...figures.values()].every((one) => one.drawn)")
        assert page.evaluate("isDark()")
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("isDark()") is False
        assert page.locator("#reset").is_hidden()
        assert page.locator("details:not([open])").count() == 0
        wide = page.evaluate(
            "[...document.querySelectorAll('.plot .main-svg')].filter((svg) => "
            "svg.getBoundingClientRect().width > svg.closest('.plot').getBoundingClientRect().width + 1).length"
        )
        assert wide == 0


def test_several_side_by_side(running, page_of_several, several):
    assert isinstance(several, Comparison)
    totals = {label: one.total() for label, one in zip(several.labels, several.reports, strict=True)}
    with shown(running, page_of_several) as page:
        found = {row[0]: int(row[8]) for row in rows(page, "#comparison")}
        assert found == totals
        worst = max(totals, key=lambda label: totals[label])
        assert page.locator("#comparison tr.chosen th").inner_text() == worst
        set_epsilon(page, 0.8)
        found = {row[0]: int(row[8]) for row in rows(page, "#comparison")}
        assert found == {
            label: intruders_at(one, 0.8) for label, one in zip(several.labels, several.reports, strict=True)
        }
        page.locator("#reset").click()
        page.locator("#comparison .open", has_text="full").click()
        assert page.locator("section.finding:visible h2").inner_text() == f"{totals['full']} intruder dimensions"
        assert page.locator("#report").input_value() == "1"
        assert page.locator("#recount b").inner_text() == str(totals["full"])
        page.locator("#report").select_option("0")
        assert page.locator("section.finding:visible h2").inner_text() == f"{totals[worst]} intruder dimensions"
        for name in ("all-epsilon", "all-size", "all-types", "all-layers", "all-overlaps"):
            in_view(page, f"#{name}")
        assert page.locator("#all-weights").is_hidden()  # --quick: no weights were tried
        assert page.evaluate("byId('all-layers').data[0].z.flat().reduce((a, b) => a + b)") == sum(totals.values())
        plot = page.locator("#all-layers")
        box = plot.locator(".heatmaplayer image").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 4)
        plot.locator(".hovertext").first.wait_for()
        page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 4)
        page.locator("dialog[open]").wait_for()
        assert page.locator("#report").input_value() == "1"


def test_a_link_to_a_layer_opens_it(running, page_of_several, several):
    with shown(running, page_of_several) as page:
        page.goto("about:blank")
        page.goto(f"{page_of_several.as_uri()}#layer-2-5")
        assert page.locator("dialog[open] h2").inner_text() == several.reports[2].layers[5].name
        assert page.locator("#report").input_value() == "2"


HOSTILE = (
    '<img src=x onerror="document.title=1">',
    "</script><script>document.title=1</script>",
    '<a href="javascript:document.title=1">x</a>',
    "&lt;b&gt;%{x}<br>$\\frac{1}{2}$",
    "\u202egnihton\u2028\ud800",
)


def test_hostile_names_run_nothing_and_stand_as_they_are(running, tmp_path_factory):
    layers = [layer(f"layers.{i}.{name}", [0, 3], module_type=name) for name in HOSTILE for i in range(2)]
    made = [
        report(layers, tuned={"path": f"{name}{i}", "format": name, "rank": 1, "alpha": 1, "scaling": 1.0},
               skipped=({"name": name, "reason": name},), base={"path": name, "format": name, "fingerprint": name})
        for i, name in enumerate(HOSTILE[:4])
    ]  # fmt: skip
    labels = Comparison(tuple(made), (), "0").labels
    matrices = [Similarity(layers[0].name, labels[0], "left", np.eye(5))]
    file = written(tmp_path_factory, spectra.to_html(made, matrices=matrices))
    with shown(running, file) as page:
        title = page.title()
        page.locator("#report").select_option("0")
        for selector in ("#all-size", "#all-types", "#all-layers", "#map .plot", "#by-type", "#matrices .plot"):
            in_view(page, selector)
        page.locator("#map .plot").first.focus()
        page.keyboard.press("ArrowDown")
        page.locator("#map .hovertext").first.wait_for()
        assert layers[1].name in page.locator("#map-status").text_content()
        assert HOSTILE[0] in page.locator("#map .hovertext").first.text_content()
        shown_types = page.locator("#by-type .ytick").all_text_contents()
        assert any(label[1:] and HOSTILE[3].endswith(label[1:]) for label in shown_types), shown_types
        for button in range(0, len(layers), 2):
            page.locator("#layers .open").nth(button).click()
            page.locator("dialog .profile .main-svg").first.wait_for()
            page.locator("dialog .close").click()
        assert rows(page)[0][0] == layers[0].name
        assert page.locator("main img, main a[href^='javascript'], main svg a, dialog img").count() == 0
        assert page.evaluate("document.scripts.length") == 4  # data, library, ours, and plotly that it made
        assert page.title() == title


def test_without_a_script_what_was_found_is_there(running, page_of_several):
    with shown(running, page_of_several, java_script_enabled=False) as page:
        text = page.locator("body").inner_text()
        assert "35 intruder dimensions" in text
        assert "Intruder dimensions: " in text
        assert "need JavaScript" in text
        assert (
            "fine-tunes of" not in page.locator("#map-part").inner_text()
            if page.locator("#map-part").is_visible()
            else True
        )


def test_injected_scripts_are_refused(running, page_of_one):
    refusal = "Executing inline script violates the following Content Security Policy"
    with shown(running, page_of_one, expected=[refusal]) as page:
        refused = page.evaluate(
            """() => new Promise((done) => {
                document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
                const script = document.createElement("script");
                script.textContent = "document.title = 'ran'";
                document.head.append(script);
                setTimeout(() => done("nothing"), 2000);
            })"""
        )
        assert refused.startswith("script-src")
        assert page.title() != "ran"


def test_a_report_of_224_layers_opens_at_once(running, tmp_path_factory):
    """Within a second or two; four times that where other tests share the cores."""
    made = made_up(224)
    times = opened(written(tmp_path_factory, spectra.to_html(made, matrices=made_up_matrices(made))), running)
    assert times["open"] < 4 * LIMIT_SECONDS
    assert times["map"] < 4 * LIMIT_SECONDS
    assert times["recount"] < LIMIT_SECONDS
