"""``spectra inspect`` as people call it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from tests.support.commands import run
from tests.support.paths import FIXTURES, ROOT

LORA, BASE, FULL = (str(FIXTURES / name) for name in ("lora-r4", "base", "full"))


def test_inspect(capsys):
    code, out, _ = run(capsys, "inspect", LORA, FULL, "--base", BASE)
    assert code == 0
    assert "peft-lora" in out
    assert "28 matched" in out
    assert "29 matched" in out
    code, out, _ = run(capsys, "inspect", LORA, "--format", "json")
    found = json.loads(out)[0]
    assert found["facts"]["rank"] == 4
    assert len([update for update in found["updates"] if update["base_tensor"]]) == 28
    _, out, _ = run(capsys, "inspect", LORA, "--verbose")
    assert "q_proj.lora_A.weight  F32 [4, 160]" in out


def test_inspect_names_what_it_does_not_read(capsys, make_base, make_adapter, rng):
    W = rng.normal(size=(8, 8)).astype("f4")
    words = rng.normal(size=(20, 8)).astype("f4")
    base = make_base({"q.weight": W, "embed_tokens.weight": words})
    tuned = make_base({"q.weight": W + 1, "embed_tokens.weight": np.concatenate([words, words[:3]])}, "tuned")
    second = make_adapter({"q": (np.ones((8, 1), "f4"), np.ones((1, 8), "f4"))})
    second.rename(tuned / "second")
    (tuned / "assets").mkdir()
    (tuned / "training_args.bin").write_bytes(b"")
    code, out, err = run(capsys, "inspect", str(tuned), "--base", str(base))
    assert (code, err) == (0, "")
    assert "  not read   also here: second/\n" in out
    assert "embed_tokens: vocabulary resized from 20 to 23 rows: the 20 shared ones are compared" in out
    _, out, _ = run(capsys, "audit", str(tuned), "--base", str(base), "--verbose")
    assert out.endswith("\nskipped: 1\n  second/: other weights beside the model's own; they were not read\n")
    assert "also here" not in run(capsys, "audit", str(tuned), "--base", str(base))[1]


def test_inspect_goes_on_after_a_bad_path(capsys, tmp_path):
    code, out, err = run(capsys, "inspect", str(tmp_path / "nothing"), BASE)
    assert code == 2
    assert BASE in out
    assert "no such file" in err


def test_inspect_names_what_does_not_fit(capsys, make_adapter, make_base, rng):
    tuned = make_adapter({"layer.0.q": (np.ones((3, 1), "f4"), np.ones((1, 3), "f4"))})
    other = make_base({"layer.0.q.weight": np.ones((8, 8), "f4")}, "other")
    code, out, err = run(capsys, "inspect", str(tuned), "--base", str(other))
    assert code == 2
    assert "wrong base" in out  # beside what could be told
    assert err.count("spectra: error:") == 1
    assert "wrong base" in err


def test_inspect_needs_no_torch():
    code = "import sys; from spectra.cli import main; main(['inspect', sys.argv[1]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, LORA], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
