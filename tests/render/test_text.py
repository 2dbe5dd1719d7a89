"""The text for people, from reports made by hand: many layers, one layer, odd cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

import spectra
from spectra.errors import UsageError
from spectra.render.text import render_report, render_summary
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report, vector


def picture(text):
    return [line for line in text.splitlines() if "·" in line and not line.startswith("█ intruder")]


@pytest.mark.parametrize(
    ("share", "word"),
    [
        (0, "none"),
        (1, "slight"),
        (10, "slight"),
        (11, "moderate"),
        (100, "moderate"),
        (101, "strong"),
        (1000, "strong"),
    ],
)
def test_levels(share, word):
    """0, up to 1 %, up to 10 %, more: of 1,000 vectors."""
    layers = [layer(f"layers.{i}.q", range(min(10, max(0, share - 10 * i)))) for i in range(100)]
    made = report(layers)
    assert made.intruder_level == made.summary["intruder_level"] == word
    first = render_report(made).splitlines()[0]
    assert word.upper() not in first, "no word that reads like a grade"
    assert len(first) < 140


def test_noise_like_layers_do_not_count():
    noisy = layer("pooler.dense", range(10), noise_like_base=True)
    made = report([layer("layers.0.q"), noisy])
    text = render_report(made)
    assert text.startswith(
        "No intruder dimensions among 10 leading singular vectors of 1 layer (1 noise-like layer apart, with another "
        "10).\n"
    )
    assert "pooler.dense *" in text
    assert (made.total(), made.total("all"), made.compared(), made.compared("all")) == (0, 10, 10, 20)
    assert (made.summary["intruders"], made.summary["intruders_all"]) == (0, 10)
    assert made.summary["by_module_type"]["dense"] == {"layers": 0, "vectors": 0, "intruders": 0, "noise_like": 1}
    assert not any(row["intruders"] for row in made.summary["by_index"])


def test_many_layers_are_drawn_where_they_matter():
    layers = [layer(f"model.layers.{i}.q_proj", [0, 3] if i % 4 == 0 else []) for i in range(224)]
    text = render_report(report(layers))
    rows = picture(text)
    assert len(rows) == 40
    assert all("█··█······" in row for row in rows)
    assert "(184 more layers; --verbose draws all)" in text
    assert len(picture(render_report(report(layers), verbose=True))) == 224
    assert len(text.splitlines()) < 80


def test_layers_of_different_size_and_ties():
    text = render_report(report([layer("layers.0.q", [1], count=3), layer("layers.1.q", [11], count=12)]))
    assert "·█·" in text
    assert "by index: 1 in 1 layer, 11 in 1 layer" in text


def test_borderline_and_ranges():
    vectors = (vector(0, True), vector(1, True), vector(2), vector(3, True), vector(4, False, ("borderline",)))
    one = layer("layers.0.q", [0, 1, 3], vectors=vectors)
    text = render_report(report([one]))
    assert "0-1,3" in text
    assert "██·█░" in text
    assert "1 cosine within 0.001 of epsilon" in text


def test_a_bound_is_shown_as_one():
    certified = replace(vector(0, True), max_cosine=None, max_cosine_bounds=(0.1, 0.499))
    text = render_report(report([layer("layers.0.q", [0], vectors=(certified,))]))
    assert "≤ 0.50" in text
    assert "<= 0.50" in render_report(report([layer("layers.0.q", [0], vectors=(certified,))]), ascii_only=True)


def test_failures_come_before_the_details():
    bad = layer("layers.1.q", vectors=(), status="non_finite", error="tensor x: 3 of 9 values are NaN or infinite")
    text = render_report(report([layer("layers.0.q", [0]), bad]))
    assert text.index("non_finite: layers.1.q") < text.index("worst layers")
    only = render_report(report([bad]))
    assert only.startswith("Cannot tell: the one changed layer could not be analysed.")


def test_narrow_layers_are_warned_about():
    text = render_report(report([layer("layers.0.q", shape=(64, 64))]))
    assert "1 layer narrower than 128" in text


def test_ascii():
    text = render_report(report([layer("layers.0.q", [0])]), ascii_only=True)
    assert text.isascii()
    assert "#........." in text
    assert "?" not in text


def test_summary_aligns():
    text = render_summary([report([layer("layers.0.q", [0])]), report([layer("layers.0.q")])])
    header, first, second = text.splitlines()[:3]
    for word in ("intruders", "layers"):
        end = header.index(word) + len(word)
        assert first[end - 1 : end + 1].strip()
    assert "strong" not in second


def test_unknown_totals():
    with pytest.raises(UsageError, match="baseline"):
        report([layer("a")]).total("new")
    with pytest.raises(UsageError, match="scope"):
        report([layer("a")]).total("nonsense")


def test_any_record_as_text():
    paths = [FIXTURES / "lora-r1", FIXTURES / "lora-r4"]
    reports = spectra.audit_many(paths, include=["layers.0.*"])
    assert spectra.to_text(reports[0]).startswith("Intruder dimensions: ")
    assert spectra.to_text(reports).startswith("fine-tune ")
    assert spectra.to_text(spectra.compare(paths, quick=True, include=["layers.0.*"])).startswith("base ")
    assert spectra.to_text(spectra.ranks(paths[0])).startswith("Suggestion: ")


def test_no_verdict_where_nothing_could_be_judged():
    noisy = layer("layers.0.q", [0], noise_like_base=True)
    bad = layer("layers.1.q", vectors=(), status="non_finite", error="NaN")
    same = layer("layers.2.q", vectors=(), status="unchanged")
    for layers in ([noisy], [bad], [noisy, bad, same]):
        made = report(layers)
        assert made.intruder_level == made.summary["intruder_level"] == "cannot tell"
        assert render_report(made).startswith("Cannot tell: ")
        assert "cannot tell" in render_summary([made, made])
    assert report([same]).intruder_level == "none"
    assert render_report(report([same])).startswith("Nothing changed: 1 weight as in the base.")
    assert "update  " not in render_report(report([same], tuned={"path": "tuned", "format": "full"}))


@pytest.mark.parametrize(("noisy", "said"), [(3, False), (4, True), (31, True)])
def test_a_verdict_from_few_layers_says_so(noisy, said):
    layers = [layer(f"layers.{i}.q", [0], noise_like_base=i > 0) for i in range(noisy + 1)]
    text = render_report(report(layers))
    assert (f"This is from 1 of {noisy + 1} changed layers; the others are noise-like." in text) == said
    assert f"1 of 10 leading singular vectors of 1 layer (10.0%; {noisy} noise-like layer" in text


def test_alike_failures_and_notes_are_said_once():
    failed = [
        layer(f"layers.{i}.q", vectors=(), status="non_finite", error=f"a: layers.{i}.q.lora_A: NaN") for i in range(4)
    ]
    other = layer("layers.9.q", vectors=(), status="failed", error="a: layers.9.q.lora_A: too large")
    note = "vocabulary resized from 9 to 10 rows: the 9 shared ones are compared"
    noted = [layer(name, notes=(note, "tied: as x")) for name in ("lm_head", "embed_tokens")]
    copies = [layer(f"layers.{i}.v", notes=(f"layer_replication: layer {i} is 0",)) for i in range(9)]
    text = render_report(report([*failed, other, *noted, *copies]))
    assert text.count("NaN") == 1
    assert "non_finite: 4 layers, first layers.0.q: a: layers.0.q.lora_A: NaN" in text
    assert "failed: layers.9.q: a: layers.9.q.lora_A: too large" in text
    assert f"note: lm_head, embed_tokens: {note}" in text
    assert "tied" not in text
    assert text.count("layer_replication") == 3
    assert "note: 6 more of this kind" in text


@pytest.mark.parametrize("known", [{"alpha": None, "scaling": 20.0}, {"scaling": 20.0}])
def test_a_scaling_without_an_alpha_is_shown(known):
    made = report([layer("layers.0.q")], tuned={"path": "tuned", "format": "mlx-lora", "rank": 4, **known})
    assert "(mlx-lora, rank 4, scaling 20)" in render_report(made)
