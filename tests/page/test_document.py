"""The HTML report: what is in the file, without a browser."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import spectra
from benchmarks.page import made_up, made_up_matrices
from spectra.errors import UsageError
from spectra.page.document import MARK, SCRIPTS, asset
from spectra.page.library import hash_of, plotly_library
from spectra.records.layer import Similarity
from spectra.tasks.similarity import similarity_matrices
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


def test_a_page_names_no_folder_of_this_machine():
    """It is made to be handed on: absolute paths are shown from the working directory, or by their last part."""
    home = "/home/a7b9c/hidden-folder"
    broken = layer("b", status="failed", vectors=(), error=f"{home}/runs/lora/x.safetensors: NaN", measures={})
    made = report(
        [layer("a", [0]), broken],
        tuned={"path": f"{home}/runs/lora", "format": "peft-lora", "rank": 8, "alpha": 16, "scaling": 2.0},
        base={"path": f"{home}/base", "format": "x", "fingerprint": "x"},
    )
    other = replace(made, tuned={**made.tuned, "path": f"{home}/runs/other"})
    problem = OSError(f"{home}/gone: no such file")
    for reports, root, shown in (
        (made, None, "lora"), (made, f"{home}/runs", "lora"), ([made, other], home, "runs/other"),
    ):  # fmt: skip
        html = spectra.to_html(reports, unreadable=[problem], root=root)
        assert "hidden-folder" not in html
        assert "a7b9c" not in html
        assert f"<bdi>{shown}</bdi>" in html
    relative = spectra.to_html(replace(made, tuned={**made.tuned, "path": "fixtures/lora"}))
    assert "<bdi>fixtures/lora</bdi>" in relative


def test_odd_reports_have_a_page():
    assert "nothing changed" in spectra.to_html(report([layer("a", status="unchanged", vectors=())])).lower()
    broken = layer("a", status="failed", vectors=(), error="a: <holds> NaN", measures={})
    html = spectra.to_html(report([broken]))
    assert "1 layer could not be analysed" in html
    assert "a: &lt;holds&gt; NaN" in html
    assert "the base of every changed layer is plain noise" in spectra.to_html(
        report([layer("pooler", range(3), noise_like_base=True)])
    )
    with pytest.raises(UsageError, match="no report"):
        spectra.to_html([])


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
