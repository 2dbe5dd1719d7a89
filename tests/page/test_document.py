"""The HTML report: what is in the file, without a browser."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectra
from benchmarks.page import made_up, made_up_matrices
from spectra.cli import main
from spectra.errors import UsageError
from spectra.page.data import STEPS, depths, distinct, facets, steps_of
from spectra.page.document import MARK, SCRIPTS, asset
from spectra.page.library import hash_of, plotly_library
from spectra.records.layer import Similarity
from spectra.tasks.similarity import similarity_matrices
from tests.support.pages import data_of
from tests.support.paths import FIXTURES
from tests.support.reports import layer, report


@pytest.fixture(scope="module")
def audited():
    return spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base")


def test_the_same_records_give_the_same_bytes(audited):
    matrices = similarity_matrices(audited)
    assert spectra.to_html(audited, matrices=matrices) == spectra.to_html(audited, matrices=matrices)
    again = spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base")
    one, two = (
        spectra.to_html(replace(item, seconds=None), matrices=similarity_matrices(item)) for item in (audited, again)
    )
    assert one == two


def test_the_policy_lets_run_what_is_there_and_nothing_else(audited):
    html = spectra.to_html(audited)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', html)
    assert policy is not None
    script = html.rpartition("<script>")[2].rpartition("</script>")[0]
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert hash_of(script.encode()) in policy[1]
    assert plotly_library()[1] in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert "http" not in policy[1]
    assert html.startswith(MARK)


def test_what_is_embedded_says_what_the_report_says(audited):
    (found,) = data_of(spectra.to_html(audited))["reports"]
    assert [one["name"] for one in found["layers"]] == [one.name for one in audited.layers]
    for mine, theirs in zip(found["layers"], audited.layers, strict=True):
        assert tuple(mine.get("intruder", ())) == theirs.intruder_indices
        for steps, vector in zip(mine["cosine"], theirs.vectors, strict=True):
            assert 0 <= vector.max_cosine - steps / STEPS < 1.1 / STEPS


@given(st.floats(0, 1), st.integers(1, STEPS))
def test_whole_steps_count_as_floats_do(cosine, epsilon):
    """c < ε just where its steps are below ε's, for every ε of four decimals."""
    assert (steps_of(cosine) < epsilon) == (cosine < epsilon / STEPS)


@pytest.mark.parametrize("epsilon", [0.29, 0.57, 0.58, 0.5, 1.0, 0.0001])
def test_a_cosine_that_is_epsilon_is_not_below_it(epsilon):
    assert steps_of(epsilon) == round(epsilon * STEPS)
    assert steps_of(np.nextafter(epsilon, 0)) == round(epsilon * STEPS) - 1


def test_panels_and_blocks():
    layers = [
        *(layer(f"layers.{i}.self_attn.{name}", module_type=f"self_attn.{name}") for i in range(3) for name in "qk"),
        layer("layers.0.mlp.experts.7.up", module_type="mlp.experts.up"),
        layer("lm_head"),
        layer("unchanged", vectors=()),
    ]  # fmt: skip
    found = facets(layers)
    assert [panel["title"] for panel in found] == ["self_attn.q", "self_attn.k", None]
    assert found[0] == {"title": "self_attn.q", "layers": [0, 2, 4], "labels": ["0", "1", "2"]}
    assert found[2]["layers"] == [6, 7]
    assert depths(layers) == [
        {"label": "0", "layers": [0, 1, 6]}, {"label": "1", "layers": [2, 3]}, {"label": "2", "layers": [4, 5]},
    ]  # fmt: skip
    assert distinct(["a.0.b", "a.0.b"]) == ["a.0.b", "a.0.b"]
    assert distinct(["encoder.block.3.q", "decoder.block.3.q"]) == ["encoder", "decoder"]


def test_matrices_are_those_of_the_worst_layers(audited):
    found = similarity_matrices(audited, number=3, size=20)
    worst = sorted((one.intruders for one in audited.layers), reverse=True)[:3]
    by_name = {one.name: one for one in audited.layers}
    assert [by_name[one.name].intruders for one in found] == worst
    for one in found:
        assert one.cosines.shape == (20, 20)
        exact = {vector.index: vector for vector in by_name[one.name].vectors}
        for index, vector in exact.items():
            if vector.base_index is not None and vector.base_index < 20:
                assert one.cosines[vector.base_index, index] == pytest.approx(vector.max_cosine, abs=1e-4)  # float32's
            if vector.intruder:
                assert one.cosines[:, index].max() < 0.5
    assert similarity_matrices(audited, number=0) == []
    whole = spectra.layer_spectra([FIXTURES / "lora-r4"], FIXTURES / "base", include=[found[0].name], size=20)
    np.testing.assert_allclose(found[0].cosines, whole[0].cosines, atol=1e-5)
    shown = data_of(spectra.to_html(audited, matrices=whole))["reports"][0]["matrices"]
    assert list(shown) == [str(list(by_name).index(found[0].name))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_large_weights_are_not_decomposed_for_a_picture(make_base, make_adapter, monkeypatch, side):
    """From 1024 on by Lanczos: the same numbers as a full decomposition gives."""
    import torch

    from spectra.svd import decompose_gram
    from spectra.tasks import similarity

    torch.manual_seed(0)
    W0 = torch.randn(1100, 1300) / 36
    U, V = torch.linalg.qr(torch.randn(1100, 16)).Q, torch.linalg.qr(torch.randn(1300, 16)).Q
    W0 += U * torch.linspace(12, 4, 16) @ V.T
    base = make_base({"layers.0.up.weight": W0})
    adapter = make_adapter({"layers.0.up": (3 * torch.randn(1100, 2) / 8, torch.randn(2, 1300) / 8)})
    found = spectra.audit(adapter, base, side=side)
    assert found.total("all") > 0
    monkeypatch.setattr(similarity, "decompose_gram", lambda *_, **__: pytest.fail("decomposed"))
    (fast,) = similarity_matrices(found, size=12)
    monkeypatch.setattr(similarity, "decompose_gram", decompose_gram)
    monkeypatch.setattr(similarity, "ROOMY", 10_000)
    (slow,) = similarity_matrices(found, size=12)
    np.testing.assert_allclose(fast.cosines, slow.cosines, atol=2e-3)


def test_a_weight_that_lanczos_cannot_tell_is_left_out(make_base, make_adapter, monkeypatch, audited):
    from spectra.tasks import similarity

    monkeypatch.setattr(similarity, "ROOMY", 1)
    monkeypatch.setattr(similarity, "leading_pairs", lambda *_: None)
    assert similarity_matrices(audited) == []


def test_names_are_text_in_what_is_written():
    hostile = '<img src=x onerror="alert(1)">'
    made = report(
        [layer(hostile, [0])],
        tuned={"path": hostile, "format": hostile, "rank": 8, "alpha": 16, "scaling": 2.0},
        base={"path": "</script><script>alert(2)</script>", "format": "x", "fingerprint": "x", "caveat": hostile},
        skipped=({"name": hostile, "reason": hostile},),
    )
    html = spectra.to_html(
        made, matrices=[Similarity(hostile, hostile, "left", np.eye(3))], unreadable=[OSError(hostile)]
    )
    assert "<img" not in html
    assert html.count("<script") == 3
    assert html.count("</script>") == 3
    separators = chr(0x2028) + chr(0x2029) + "\ud800"
    odd = spectra.to_html(report([layer(f"a{separators}b\x00\x1b[31m", [0])])).encode()  # also that it encodes
    assert separators[0].encode() not in odd
    assert b"\x00" not in odd
    assert b"\x1b" not in odd


def test_odd_reports_have_a_page():
    assert "nothing changed" in spectra.to_html(report([layer("a", status="unchanged", vectors=())])).lower()
    broken = layer("a", status="failed", vectors=(), error="a: <holds> NaN", measures={})
    html = spectra.to_html(report([broken]))
    assert "1 layer could not be analysed" in html
    assert "a: &lt;holds&gt; NaN" in html
    assert "No layer could be judged" in spectra.to_html(report([layer("pooler", range(3), noise_like_base=True)]))
    with pytest.raises(UsageError, match="no report"):
        spectra.to_html([])


def test_without_plotly_that_is_said_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["audit", "nowhere-at-all", "--html", str(tmp_path / "page.html")]) == 2
    assert "pip install 'intruder-spectra[html]'" in capsys.readouterr().err


def test_the_command_writes_a_page_and_replaces_nothing_else(tmp_path, capsys, monkeypatch):
    page, text = tmp_path / "page.html", tmp_path / "mine.html"
    adapter, base = str(FIXTURES / "lora-r4"), str(FIXTURES / "base")
    common = ["audit", adapter, "--base", base, "--include", "*layers.0.*"]
    assert main([*common, "--html", str(page), "--matrices", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Verdict: ")
    assert f"wrote {page} (html)" in said.err
    assert len(data_of(page.read_text())["reports"][0]["matrices"]) == 2
    text.write_text("<!doctype html>\n<p>mine")
    assert main([*common, "--html", str(text)]) == 2
    assert "no report of spectra's" in capsys.readouterr().err
    assert text.read_text() == "<!doctype html>\n<p>mine"
    first = page.read_bytes()
    assert main([*common, "--html", str(page), "--matrices", "0", "--quiet"]) == 0
    assert page.read_bytes() != first
    assert main([*common, "--html", str(page), "-o", str(page), "--format", "json"]) == 2
    assert "the same file" in capsys.readouterr().err
    assert main([*common, "--matrices", "3"]) == 2
    assert main([*common, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "page.html"]


def test_a_page_without_matrices_where_the_files_went_away(tmp_path, capsys, monkeypatch):
    def gone(*_, **__):
        raise UsageError("fixtures/lora-r4: gone")

    monkeypatch.setattr("spectra.tasks.similarity.similarity_matrices", gone)
    page = tmp_path / "page.html"
    assert main(["audit", str(FIXTURES / "lora-r4"), "--include", "*layers.0.*", "--html", str(page)]) == 0
    assert "gone" in capsys.readouterr().err
    assert data_of(page.read_text())["reports"][0]["matrices"] == {}


def test_several_fine_tunes_make_one_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    names = [str(FIXTURES / name) for name in ("lora-r4", "lora-r1", "not-there")]
    code = main(["audit", *names, "--base", str(FIXTURES / "base"), "--include", "*layers.0.*", "--html", str(page)])
    assert code == 2
    html = page.read_text()
    assert [one["label"] for one in data_of(html)["reports"]] == ["lora-r4", "lora-r1"]
    assert "1 fine-tune could not be read" in html
    assert "not-there: no such file" in html


def test_a_comparison_brings_its_overlaps_and_weights(tmp_path):
    page = tmp_path / "page.html"
    names = [str(FIXTURES / name) for name in ("lora-r4", "lora-r1")]
    command = [
        "compare",
        *names,
        "--base",
        str(FIXTURES / "base"),
        "--include",
        "*layers.0.self_attn.*",
        "--draws",
        "2",
    ]
    assert main([*command, "--merge", *names, "--html", str(page), "--quiet"]) == 0
    data = data_of(page.read_text())
    assert len(data["reports"]) == 3
    assert len(data["overlaps"]) == 3
    assert data["reports"][0]["null"]
    assert data["reports"][0]["weights"]
    assert data["reports"][2]["matrices"] == {}  # a merge has no files of its own


def test_a_page_of_224_layers_is_small():
    made = made_up(224)
    size = len(spectra.to_html(made, matrices=made_up_matrices(made)).encode())
    assert size < 3_000_000
    library = len(plotly_library()[0])
    assert size - library < 400_000


def test_our_own_files_stay_small():
    for name in (*SCRIPTS, "page.css", "body.html"):
        assert len(asset(name).splitlines()) <= 450, name
        assert "innerHTML" not in asset(name)


def test_no_output_replaces_another_of_the_same_run(tmp_path, capsys):
    common = ["audit", str(FIXTURES / "lora-r4"), "--base", str(FIXTURES / "base"), "--include", "*layers.0.*q_proj"]
    journal, page = str(tmp_path / "run.jsonl"), str(tmp_path / "new.md")
    assert main([*common, "--resume", journal]) == 0
    kept = Path(journal).read_bytes()
    for more in (["--resume", journal, "--html", journal], ["--resume", journal, "-o", journal], ["-o", journal]):
        assert main([*common, *more]) == 2
        assert Path(journal).read_bytes() == kept
    assert main([*common, "--html", page, "--model-card", page]) == 2
    assert not Path(page).exists()
    notes = tmp_path / "notes.txt"
    notes.write_text("Verdict: guilty, my notes")
    assert main([*common, "-o", str(notes)]) == 2
    assert notes.read_text() == "Verdict: guilty, my notes"
    capsys.readouterr()


def test_models_in_memory_have_no_matrices(audited):
    from safetensors.torch import load_file

    tuned, base = (load_file(FIXTURES / name / "model.safetensors") for name in ("full", "base"))
    found = spectra.audit(tuned, base, include=["*layers.0.*"])
    assert found.total("all")
    assert found.tuned["in_memory"]
    assert found.base["in_memory"]
    assert similarity_matrices([found, audited], number=1)[0].tuned == "lora-r4"
