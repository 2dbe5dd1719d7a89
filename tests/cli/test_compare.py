"""``spectra compare`` and ``spectra plot`` as people call them."""

from __future__ import annotations

import csv
import io
import json
import re
import sys

import pytest

from spectra.cli import main
from spectra.cli.options import SETTINGS
from spectra.plots.kinds import KINDS
from tests.support.paths import FIXTURES

BASE = ("--base", str(FIXTURES / "base"))
MAGIC = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF"}


def run(capsys, *arguments):
    code = main([str(item) for item in arguments])
    return code, *capsys.readouterr()


def of(*members):
    return [FIXTURES / member for member in members]


def test_the_options_are_the_pipelines_own():
    import inspect

    from spectra import audit_many

    assert set(inspect.signature(audit_many).parameters) - {"tuned", "base", "progress", "on_unreadable"} == (
        SETTINGS | {"resume", "executor"}
    )


def test_table(capsys):
    code, out, err = run(capsys, "compare", *of("lora-r1", "lora-r4", "full"), *BASE, "--draws", 2)
    assert (code, err) == (0, "")
    blocks = [block.splitlines() for block in out.split("\n\n")]
    titles = [block[0].split("  ")[0].strip() for block in blocks]
    assert titles == [
        "base", "update", "intruders", "by module type", "at epsilon =", "among the top k =", "of W0 + s·dW, s =",
        "overlap of updates",
    ]  # fmt: skip
    for block in blocks[1:]:
        assert [line.split()[0] for line in block[1:4]] == ["lora-r1", "lora-r4", "full"]
    # The size of the update stands beside the rank.
    rank, size = (blocks[1][0].index(word) for word in ("rank", "‖dW‖/‖W0‖"))
    assert rank < size
    assert blocks[1][2].split()[:8] == ["lora-r4", "peft-lora", "4", "8", "2", "49,664", "3.9%", "0.275"]
    assert blocks[2][2].split()[:3] == ["lora-r4", "35", "12.5%"]
    assert "(2 draws)" in out
    assert max(len(line) for line in out.splitlines()) <= 150


def test_quick_leaves_out_what_takes_long(capsys):
    code, out, _ = run(
        capsys, "compare", *of("lora-r1", "full"), *BASE, "--quick", "--verbose", "--include", "layers.0."
    )
    assert code == 0
    assert "Random:" not in out
    assert "Free up to" not in out
    assert "intruders by layer" in out
    assert re.search(r"^model\.layers\.0\.self_attn\.v_proj +\d +\d$", out, flags=re.MULTILINE)


def test_ascii_where_the_terminal_knows_no_more(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    members = [str(path) for path in of("lora-r1", "full")]
    assert main(["compare", *members, *BASE, "--draws", "1", "--include", "layers.0."]) == 0
    text = raw.getvalue().decode("ascii")
    assert "?" not in text
    assert "|dW|/|W0|" in text


def test_formats_and_files(capsys, tmp_path):
    arguments = ["compare", *of("lora-r1", "full"), *BASE, "--quick", "--include", "layers.0."]
    code, out, _ = run(capsys, *arguments, "--format", "json")
    assert code == 0
    value = json.loads(out)
    assert value["schema"] == "spectra.comparison/1"
    assert [row["label"] for row in value["summary"]] == ["lora-r1", "full"]
    code, out, _ = run(capsys, *arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row["intruders"]) for row in rows] == [row["intruders"] for row in value["summary"]]
    for name in ("a.json", "a.csv", "a.txt"):
        for _ in range(2):  # the second time over our own
            code, out, err = run(capsys, *arguments, "-o", tmp_path / name)
            assert (code, out) == (0, "")
            assert "wrote" in err
    (tmp_path / "mine.json").write_text('{"precious": true}')
    code, out, err = run(capsys, *arguments, "-o", tmp_path / "mine.json")
    assert code == 2
    assert "not overwritten" in err
    assert (tmp_path / "mine.json").read_text() == '{"precious": true}'


def test_merges(capsys):
    r4, r16 = of("lora-r4", "lora-r16")
    code, out, _ = run(
        capsys,
        "compare",
        r4,
        "--merge",
        f"{r4}=0.5",
        f"{r16}=0.5",
        "--merge",
        r16,
        *BASE,
        "--quick",
        "--include",
        "layers.0.",
    )
    assert code == 0
    assert re.search(r"^0\.5\*lora-r4 \+ 0\.5\*lora-r16 +merged", out, flags=re.MULTILINE)
    assert re.search(r"^1\*lora-r16 +merged", out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "nothing to compare"),
        (["compare", "--merge", "lora-r4=x", *BASE], "'x' is no number"),
        (["compare", FIXTURES / "full"], "--base"),
        (["compare", FIXTURES / "lora-r4", "--draws", "-1"], "draws = -1"),
        (["compare", FIXTURES / "nothing", *BASE], "no such file"),
        (["plot", "epsilon"], "nothing to compare"),
        (["plot", "similarity"], "nothing to draw"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--size", "-1"], "size = -1"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--merge", FIXTURES / "lora-r4"], "--merge"),
        (["plot", "similarity", "c.json"], "no singular vectors"),
        (["plot", "epsilon", "c.json", "--top-k", "3"], "--top-k is for fine-tunes"),
        (["plot", "similarity", FIXTURES / "lora-r4", "--size", "0"], "size = 0"),
        (["compare", "--merge", f"{FIXTURES / 'lora-r4'}=nan"], "expected a finite number"),
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


@pytest.mark.parametrize("ending", MAGIC)
@pytest.mark.parametrize("kind", KINDS)
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


def test_a_path_with_an_equals_sign(capsys, tmp_path):
    (tmp_path / "x=1").symlink_to(FIXTURES / "lora-r1")
    code, out, err = run(capsys, "compare", "--merge", tmp_path / "x=1", *BASE, "--quick", "--include", "layers.0.")
    assert code == 0, err
    assert "1 fine-tune," in out
