"""Spectra of a base computed before they are needed: interrupted, out of room, and by the command."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import spectra
from spectra.files.checkpoint import open_checkpoint
from spectra.runs.cache import ABANDONED
from spectra.tasks.cache import plan_cache, readable_size
from tests.support.commands import run
from tests.support.kept_spectra import a_family, engines, kept, weights
from tests.support.paths import FIXTURES, ROOT

BASE, LORA = FIXTURES / "base", FIXTURES / "lora-r4"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Where spectra are kept by default during a test."""
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def family(rng, make_base, make_adapter):
    return a_family(rng, make_base, make_adapter)


# Interruptions and room


def test_an_interrupted_write_leaves_nothing(capsys, family, root, monkeypatch):
    base, _, _ = family

    replace = Path.replace

    def interrupt(self, target):
        if str(target).endswith(".safetensors"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    code, _, err = run(capsys, "cache", base)
    assert code == 130
    assert err == "spectra: interrupted\n"
    assert [file.name for file in root.glob("*/*")] == ["base.json"], "neither a layer nor a temporary file"


def test_a_killed_run_leaves_whole_layers_only_and_the_next_goes_on(family, root):
    base, _, adapter = family
    # Dies while the third file is written: after base.json and one layer.
    code = """
import os, sys
from spectra.files import whole
from spectra.cli import main
count = 0
def die(fd):
    global count
    count += 1
    if count == 3:
        os._exit(9)
whole.os.fsync = die
main(["cache", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, base], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    assert done.returncode == 9
    (first,) = kept(root)
    (left,) = root.glob("*/.*.part")
    assert len(spectra.cache(base, dry_run=True).there) == 1
    assert [layer.engine for layer in spectra.audit(adapter, base).layers] == ["cached", "exact", "exact"]
    before = first.stat()
    made = spectra.cache(base)
    assert ([layer.name for layer in made.there], len(made.written)) == (["layer.0.q.weight"], 2)
    after = first.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "not written again"
    assert left.exists(), "somebody may still be writing"
    os.utime(left, (0, left.stat().st_mtime - ABANDONED - 1))
    spectra.cache(base)
    assert not left.exists()
    assert engines(spectra.audit(adapter, base)) == {"cached"}


def test_a_full_disk_is_one_line(capsys, family, root, monkeypatch):
    base, _, _ = family

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spectra.files.whole.os.fsync", full)
    code, _, err = run(capsys, "cache", base)
    assert code == 2
    assert "could not be written: No space left on device" in err
    assert err.count("\n") == 1
    assert not [file for file in root.rglob("*") if file.is_file()]


def test_too_little_room_is_said_before_anything_is_written(capsys, family, root, monkeypatch):
    base, _, _ = family
    wanted = spectra.cache(base, dry_run=True).bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, wanted - 1))
    code, out, err = run(capsys, "cache", base)
    assert (code, out) == (2, "")
    assert f"need {readable_size(wanted)}" in err
    assert str(root) in err
    assert err.count("\n") == 1
    assert not root.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, wanted))
    assert run(capsys, "cache", base)[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert run(capsys, "cache", base)[0] == 0, "what is there needs no more room"


# The command


def test_dry_run_writes_nothing_and_says_the_size(capsys, family, root):
    base, _, _ = family
    code, out, err = run(capsys, "cache", base, "--dry-run")
    assert (code, err) == (0, "")
    assert not root.exists()
    numbers = 3 * (32 * 32 * 4 + 2 * 32 * 8)  # vectors of the short side, values and residuals
    planned = spectra.cache(base, dry_run=True)
    assert (planned.bytes, planned.written, planned.there) == (numbers, (), ())
    assert f"3 layers, {readable_size(numbers)} in {planned.folder}; none of them there already" in out
    run(capsys, "cache", base, "--include", "layer.1")
    assert "1 of them there already" in run(capsys, "cache", base, "--dry-run")[1]
    assert run(capsys, "cache", base)[1].splitlines()[-1].startswith("2 written, 1 found in order")
    assert "all of them there already" in run(capsys, "cache", base, "--dry-run")[1]
    on_disk = 0
    for file in kept(root):
        content = file.read_bytes()
        on_disk += len(content) - 8 - int.from_bytes(content[:8], "little")
        assert int.from_bytes(content[:8], "little") < 2000, "what is not counted is small"
    assert on_disk == numbers


def test_layers_are_chosen_as_in_audits(capsys, root):
    code, out, _ = run(capsys, "cache", BASE, "--include", "q_proj", "--exclude", "layers.3")
    assert code == 0
    assert "3 layers" in out
    assert "left out by --include or --exclude" in out
    assert all("q_proj" in file.name for file in kept(root))
    assert len(kept(root)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([LORA], "this is an adapter"),
        (["no-such-base"], "no such file or folder"),
        ([BASE, "--include", "no such layer"], "nothing to decompose"),
        ([BASE, "--device", "nonsense"], "expected cpu or cuda"),
        ([BASE, "--device", "meta"], "expected cpu or cuda"),
        ([BASE, "--threads", "0"], "at least 1"),
    ],
)
def test_bad_usage(capsys, root, arguments, words):
    code, out, err = run(capsys, "cache", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not root.exists()


def test_bad_dtype():
    with pytest.raises(spectra.SpectraError, match="float16"):
        spectra.cache(BASE, dtype="float16")


def test_a_weight_that_cannot_be_decomposed_does_not_stop_the_rest(capsys, rng, make_base):
    tensors = weights(rng, *(f"layer.{i}.q.weight" for i in range(3)))
    tensors["layer.1.q.weight"][3, 4] = float("nan")
    base = make_base(tensors)
    code, out, err = run(capsys, "cache", base)
    assert code == 2
    assert err.count("\n") == 1
    assert f"{base / 'model.safetensors'}: layer.1.q.weight: 1 of 1,280 values are NaN" in err
    assert out.splitlines()[-1].startswith("2 written")
    made = spectra.cache(base)
    assert [item.name for item in made.failed] == ["layer.1.q.weight"]
    assert len(made.there) == 2


def test_progress(capsys, family, monkeypatch):
    seen = []
    spectra.cache(family[0], progress=lambda *state: seen.append(state))
    done, work, names = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == pytest.approx(work[-1])
    assert names == ("layer.0.q", "layer.1.q", "layer.2.q")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "%|" in run(capsys, "cache", family[0])[2]
    assert run(capsys, "cache", family[0], "--quiet")[2] == ""


def test_threads_are_put_back(family):
    before = torch.get_num_threads()
    seen = []
    spectra.cache(family[0], threads=before + 1, progress=lambda *_: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("command", [["cache", "--help"], ["audit", "--help"]])
def test_help_needs_no_torch(command):
    code = f"""
import sys
from spectra.cli import main
try:
    main({command!r})
except SystemExit:
    pass
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_the_plan_names_each_weight_once(rng, make_base):
    tensors = weights(rng, "model.embed_tokens.weight", "lm_head.weight", "norm.weight", shape=(20, 8))
    tensors["norm.weight"] = torch.ones(8)
    layers, skipped = plan_cache(open_checkpoint(make_base(tensors)), (), (), "float32")
    assert sorted(layer.name for layer in layers) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert [item.name for item in skipped] == ["norm.weight"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_700, "1.0 MB"),
        (21.5e9, "21.5 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes_for_people(size, text):
    assert readable_size(size) == text
