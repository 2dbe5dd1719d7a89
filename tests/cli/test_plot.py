"""``spectra plot`` as people call it."""

from __future__ import annotations

import itertools

import pytest

from spectra.cli import main
from spectra.plots.kinds import KINDS
from tests.support.commands import run
from tests.support.paths import FIXTURES

BASE = ("--base", str(FIXTURES / "base"))
MAGIC = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF"}


def of(*members):
    return [FIXTURES / member for member in members]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "epsilon"], "nothing to compare"),
        (["plot", "similarity"], "nothing to draw"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--size", "-1"], "size = -1"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--merge", FIXTURES / "lora-r4"], "--merge"),
        (["plot", "similarity", "c.json"], "no singular vectors"),
        (["plot", "epsilon", "c.json", "--top-k", "3"], "--top-k is for fine-tunes"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--size", "0"], "size = 0"),
        (["plot", "epsilon", "c.json", FIXTURES / "lora-r4"], "by itself"),
        (["plot", "epsilon", "c.json"], "could not be read"),
        (["plot", "epsilon", FIXTURES / "lora-r4", "-o", "x.gif"], "expected a name that ends in .png"),
        (["plot", "trajectory", FIXTURES / "lora-r4"], "step"),
    ],
)
def test_bad_usage(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_unknown_figures_are_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plot", "pie"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert all(f"'{kind}'" in err or kind in err for kind in KINDS)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A comparison in a file, from which every figure of whole fine-tunes is drawn."""
    file = tmp_path_factory.mktemp("kept") / "comparison.json"
    members = of("lora-r1", "lora-r4", "lora-r16", "lora-r64", "full")
    arguments = ["compare", *members, *BASE, "--draws", 2, "--include", "layers.0.", "--quiet", "-o", file]
    assert main([str(item) for item in arguments]) == 0
    return file


@pytest.mark.parametrize(("kind", "ending"), list(zip(KINDS, itertools.cycle(MAGIC), strict=False)))
def test_every_figure(capsys, tmp_path, kept, kind, ending):
    target = tmp_path / f"figure.{ending}"
    if kind == "trajectory":
        sources = [FIXTURES / "run-r4", "--include", "layers.0."]
    elif KINDS[kind].needs == "layers":
        sources = [*of("lora-r4", "full"), *BASE, "--include", "layers.0.self_attn.v_proj"]
    else:
        sources = [kept]
    for _ in range(2):  # the second time over our own
        code, out, err = run(capsys, "plot", kind, *sources, "-o", target)
        assert (code, out) == (0, ""), err
        assert "wrote" in err
    assert target.read_bytes().startswith(MAGIC[ending])
    other = tmp_path / f"other.{ending}"
    other.write_bytes(MAGIC[ending] + b" somebody else's picture")
    code, _, err = run(capsys, "plot", kind, *sources, "-o", other)
    assert code == 2
    assert "not overwritten" in err


@pytest.mark.parametrize("kind", ["similarity", "cosines", "spectra"])
def test_without_a_layer_the_worst_ones_are_drawn(capsys, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "plot", kind, *of("lora-r4"), "--size", 40)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [f"spectra-{kind}.png"]


def test_saved_reports_are_drawn(capsys, tmp_path):
    saved = []
    for name in ("lora-r4", "lora-r1"):
        saved.append(tmp_path / f"{name}.json")
        assert run(capsys, "audit", FIXTURES / name, "--include", "layers.0.", "-o", saved[-1])[0] == 0
    for kind, sources in (("layers", saved[:1]), ("layers", saved), ("size", saved)):
        code, out, err = run(capsys, "plot", kind, *sources, "-o", tmp_path / "figure.svg")
        assert (code, out) == (0, ""), err
        assert b"<svg" in (tmp_path / "figure.svg").read_bytes()
    for arguments, words in (
        (["overlap", saved[0]], "overlaps need at least two fine-tunes"),
        (["similarity", saved[0]], "holds no singular vectors"),
        (["layers", saved[0], FIXTURES / "lora-r4"], "what was saved is drawn by itself"),
        (["layers", *saved, "-k", "5"], "what was saved is drawn as it was made; --top-k is for fine-tunes"),
    ):
        code, out, err = run(capsys, "plot", *arguments, "-o", tmp_path / "none.png")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
        assert not (tmp_path / "none.png").exists()


def test_a_comparison_is_drawn_by_itself(capsys, tmp_path, kept):
    report = tmp_path / "report.json"
    assert run(capsys, "audit", FIXTURES / "lora-r4", "--include", "layers.0.", "-o", report)[0] == 0
    code, _, err = run(capsys, "plot", "layers", kept, report, "-o", tmp_path / "none.png")
    assert code == 2
    assert "expected a report, or a comparison by itself" in err


def test_counts_by_adapter_weight_from_fine_tunes(capsys, tmp_path):
    target = tmp_path / "weights.svg"
    code, _, err = run(capsys, "plot", "weights", *of("lora-r4"), "--include", "layers.0.", "-o", target)
    assert code == 0, err
    assert b"<svg" in target.read_bytes()


def test_a_comparison_is_not_replaced_by_its_picture(capsys, kept):
    before = kept.read_bytes()
    code, _, err = run(capsys, "plot", "size", kept, "-o", kept, "--format", "png")
    assert code == 2
    assert "no picture of spectra's" in err
    assert kept.read_bytes() == before


def test_similarity_of_a_training_run(capsys, tmp_path):
    code, _, err = run(capsys, "plot", "similarity", FIXTURES / "run-r4", "--size", 20, "-o", tmp_path / "a.png")
    assert code == 0, err


def test_layers_that_cannot_be_drawn_are_named(capsys, tmp_path, make_base, make_adapter, rng):
    home = make_base({name: rng.normal(size=(20, 20)).astype("f4") for name in ("a.weight", "b.weight")})
    B, A = rng.normal(size=(20, 1)).astype("f4"), rng.normal(size=(1, 20)).astype("f4")
    bad = make_adapter({"a": (B, A), "b": (B * float("nan"), A.copy())})
    code, _, err = run(capsys, "plot", "spectra", bad, "--base", home, "-o", tmp_path / "a.png")
    assert code == 2
    assert "b: non_finite" in err
    code, _, err = run(capsys, "plot", "spectra", bad, "--base", home, "--include", "b", "-o", tmp_path / "b.png")
    assert code == 2
    assert "lora_B" in err
    assert "NaN" in err
    assert not (tmp_path / "b.png").exists()
