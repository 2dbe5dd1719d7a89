"""Base spectra kept on disk: found again, never wrong, never half there."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.cli import main
from spectra.files.checkpoint import open_checkpoint
from spectra.runs.cache import SpectrumCache
from spectra.svd import Spectrum, short_spectrum
from spectra.tasks.cache import readable_size
from tests.support.commands import run
from tests.support.kept_spectra import a_family, engines, flags, kept, rewrite, verdicts, weights
from tests.support.paths import FIXTURES, MEMBERS

BASE, LORA = FIXTURES / "base", FIXTURES / "lora-r4"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Where spectra are kept by default during a test."""
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def fixtures_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    spectra.cache(BASE, cache=folder)
    return folder


@pytest.fixture
def family(rng, make_base, make_adapter):
    return a_family(rng, make_base, make_adapter)


# What is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (24, 48), (48, 24), (1, 9), (9, 1)])
def test_round_trip(rng, make_base, root, shape, dtype):
    W = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    base = open_checkpoint(make_base({"layer.0.q.weight": W}))
    cache, spectrum = SpectrumCache(), short_spectrum(W)
    assert cache.load(base, "layer.0.q.weight", "linear", dtype) is None
    cache.store(base, "layer.0.q.weight", "linear", dtype, spectrum)
    found = cache.load(base, "layer.0.q.weight", "linear", dtype)
    assert found is not None
    np.testing.assert_array_equal(found.s, spectrum.s)
    np.testing.assert_array_equal(found.residuals, spectrum.residuals)
    assert found.s.dtype == found.residuals.dtype == np.float64
    assert found.vectors.dtype == dtype
    assert torch.equal(found.vectors, spectrum.vectors)
    assert found.vectors.T.is_contiguous(), "products with the transpose are what it is for"
    for name in ("side", "orthogonality", "shape", "method", "rounding"):
        assert getattr(found, name) == getattr(spectrum, name)
    (file,) = kept(root)
    assert file.stat().st_mode & 0o777 == _ordinary_mode(root)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    assert cache.load(base, "layer.0.q.weight", "linear", other) is None
    assert cache.load(base, "layer.0.q.weight", "conv1d", dtype) is None
    assert cache.load(base, "layer.1.q.weight", "linear", dtype) is None


def _ordinary_mode(folder):
    (folder / "x").touch()
    return (folder / "x").stat().st_mode & 0o777


def test_every_layout_is_kept_as_audits_read_it(rng, make_base, monkeypatch):
    tensors = {
        "h.0.attn.c_attn.weight": rng.normal(size=(16, 48)),
        "h.0.attn.c_attn.bias": rng.normal(size=48),
        "h.0.attn.c_proj.weight": rng.normal(size=(16, 16)),
        "wte.weight": rng.normal(size=(50, 16)),
        "conv.weight": rng.normal(size=(8, 4, 3, 3)),
        "dense.weight": rng.normal(size=(12, 20)),
    }
    tensors = {name: value.astype("f4") for name, value in tensors.items()}
    tensors["half.weight"] = torch.from_numpy(rng.normal(size=(20, 12))).bfloat16()
    tensors["wide.weight"] = rng.normal(size=(20, 12))
    folder = make_base(tensors, config={"model_type": "gpt2"})
    made = spectra.cache(folder)
    assert [item.name for item in made.skipped] == ["h.0.attn.c_attn.bias"]
    layouts = {layer.name: (layer.pair.layout, layer.dtype, layer.shape) for layer in made.layers}
    assert layouts == {
        "h.0.attn.c_attn.weight": ("conv1d", "float32", (48, 16)),
        "h.0.attn.c_proj.weight": ("conv1d", "float32", (16, 16)),
        "wte.weight": ("embedding", "float32", (16, 50)),
        "conv.weight": ("conv", "float32", (8, 36)),
        "dense.weight": ("linear", "float32", (12, 20)),
        "half.weight": ("linear", "float32", (20, 12)),
        "wide.weight": ("linear", "float64", (20, 12)),
    }
    base, cache = open_checkpoint(folder), SpectrumCache()
    for layer in made.layers:
        dtype = getattr(torch, layer.dtype)
        found = cache.load(base, layer.name, layer.pair.layout, dtype)
        W = layer.pair.read_base(base, torch.float64, "cpu")
        assert isinstance(found, Spectrum)
        assert found.side == ("left" if W.shape[0] <= W.shape[1] else "right")
        G = W @ W.T if found.side == "left" else W.T @ W
        X, s2 = found.vectors.double(), torch.from_numpy(found.s**2)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert float((X * s2 @ X.T - G).norm()) < tolerance * float(G.norm())
    tuned = make_base({name: torch.as_tensor(value) * 1.5 for name, value in tensors.items()}, "tuned")
    shutil.copy(folder / "config.json", tuned)
    load, hits = SpectrumCache.load, {}

    def spy(cache, base, name, *form):
        found = load(cache, base, name, *form)
        hits[name] = found is not None
        return found

    monkeypatch.setattr(SpectrumCache, "load", spy)
    assert "stale_cache" not in flags(spectra.audit(tuned, folder))
    assert hits == dict.fromkeys(layouts, True)


def test_float64_has_spectra_of_its_own(family):
    base, _, adapter = family
    spectra.cache(base, dtype="float64")
    assert engines(spectra.audit(adapter, base, dtype="float64")) == {"cached"}
    assert engines(spectra.audit(adapter, base)) == {"exact"}
    assert len(spectra.cache(base).written) == 3, "beside the others"
    assert len(spectra.cache(base, dtype="float64").there) == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("member", MEMBERS)
def test_audits_use_them_and_say_the_same(fixtures_cache, member, side):
    found = spectra.audit(FIXTURES / member, BASE, side=side, cache=fixtures_cache)
    exact = spectra.audit(FIXTURES / member, BASE, side=side, engine="exact", cache=False)
    fine = spectra.audit(FIXTURES / member, BASE, side=side, engine="exact", dtype="float64", cache=False)
    assert verdicts(found) == verdicts(exact) == verdicts(fine)
    assert exact.total("all") > 0
    assert "stale_cache" not in flags(found)
    # What the engine leaves open is decided by the exact one, and rarely.
    assert all("settled_in_float64" in layer.flags for layer in found.layers if layer.engine != "cached")
    assert sum(layer.engine == "cached" for layer in found.layers) >= len(found.layers) - 1
    for layer, same in zip(found.layers, fine.layers, strict=True):
        for mine, theirs in zip(layer.vectors, same.vectors, strict=True):
            low, high = mine.max_cosine_bounds
            assert theirs.max_cosine is not None
            assert low - 1e-6 <= theirs.max_cosine <= high + 1e-6
            assert mine.sigma == pytest.approx(theirs.sigma, rel=1e-5)


def test_audit_looks_where_it_is_told(capsys, fixtures_cache):
    def used(*options):
        code, out, _ = run(capsys, "audit", LORA, "--format", "json", *options)
        assert code == 0
        return {layer["engine"] for layer in json.loads(out)["layers"]}

    assert used() == {"exact"}, "nothing is where it looks by default"
    assert used("--cache", fixtures_cache) == {"cached"}
    assert used("--cache", fixtures_cache, "--workers", "2") == {"cached"}
    assert run(capsys, "cache", BASE)[0] == 0
    assert used() == {"cached"}
    assert used("--no-cache") == {"exact"}
    with pytest.raises(SystemExit) as caught:
        main(["audit", str(LORA), "--cache", "x", "--no-cache"])
    assert caught.value.code == 2


def test_auditing_writes_nothing(root):
    assert engines(spectra.audit(LORA)) == {"exact"}
    assert not root.exists()


# A base that changed


def test_a_changed_base_is_noticed(capsys, family, rng, root):
    base, tensors, adapter = family
    assert run(capsys, "cache", base)[2] == ""
    assert engines(spectra.audit(adapter, base)) == {"cached"}
    before = kept(root)
    rewrite(base, weights(rng, *tensors))
    found = spectra.audit(adapter, base)
    assert engines(found) == {"exact"}
    assert "stale_cache" not in flags(found)
    assert verdicts(found) == verdicts(spectra.audit(adapter, base, cache=False))
    assert SpectrumCache().stale_for(open_checkpoint(base)) == (before[0].parent,)
    code, out, err = run(capsys, "cache", base)
    assert code == 0
    size = readable_size(sum(file.stat().st_size for file in before))
    assert f"{base} has changed since it was cached" in err
    assert f"({size} in {before[0].parent})" in err
    assert err.count("\n") == 1
    assert "none of them there already" in out
    assert engines(spectra.audit(adapter, base)) == {"cached"}
    shutil.rmtree(before[0].parent)
    assert SpectrumCache().stale_for(open_checkpoint(base)) == ()
    assert run(capsys, "cache", base)[2] == ""


def test_a_change_that_no_key_can_see_is_noticed_by_content(family, rng, root):
    base, tensors, adapter = family
    spectra.cache(base)
    other = weights(rng, *tensors) | {"layer.1.q.weight": tensors["layer.1.q.weight"]}
    rewrite(base, other, later=False)
    found = spectra.audit(adapter, base)
    assert [layer.engine for layer in found.layers] == ["exact", "cached", "exact"]
    assert ["stale_cache" in layer.flags for layer in found.layers] == [True, False, True]
    assert verdicts(found) == verdicts(spectra.audit(adapter, base, cache=False))
    assert len(spectra.cache(base, dry_run=True).there) == 3, "their files look right"
    made = spectra.cache(base)
    assert [layer.name for layer in made.there] == ["layer.1.q.weight"]
    assert [layer.name for layer in made.written] == ["layer.0.q.weight", "layer.2.q.weight"]
    again = spectra.audit(adapter, base)
    assert (engines(again), flags(again)) == ({"cached"}, set())


def test_the_same_base_elsewhere_is_the_same(family, tmp_path, root):
    base, _, adapter = family
    spectra.cache(base)
    shutil.copytree(base, tmp_path / "copy")  # keeps the times
    assert len(spectra.cache(tmp_path / "copy").there) == 3
    assert engines(spectra.audit(adapter, tmp_path / "copy")) == {"cached"}
    paths = json.loads(next(root.glob("*/base.json")).read_text())["paths"]
    assert paths == [str(base.resolve()), str((tmp_path / "copy").resolve())]
    shutil.move(base, tmp_path / "elsewhere")
    assert engines(spectra.audit(adapter, tmp_path / "elsewhere")) == {"cached"}


def test_a_hub_file_is_known_by_its_hash(family, tmp_path):
    base, _, _ = family
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    cache = SpectrumCache()
    for name in ("a" * 64, "b" * 64):
        shutil.copy(base / "model.safetensors", blobs / name)
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    first = cache.folder(open_checkpoint(snapshot))
    os.utime(blobs / ("a" * 64), (1, 1))
    assert cache.folder(open_checkpoint(snapshot)) == first
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / ("b" * 64))
    assert cache.folder(open_checkpoint(snapshot)) != first


def test_each_shard_counts(family, tmp_path):
    _, tensors, _ = family
    folder = tmp_path / "sharded"
    folder.mkdir()
    for i, (name, value) in enumerate(tensors.items()):
        save_file({name: value}, folder / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    cache = SpectrumCache()
    seen = {cache.folder(open_checkpoint(folder))}
    for i in range(3):
        file = folder / f"model-{i}.safetensors"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000_000))
        seen.add(cache.folder(open_checkpoint(folder)))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": "spectra.cache/1", "paths": 3}', '{"paths": []}', "[" * 9999]
)
def test_a_strange_base_file_does_no_harm(family, root, text):
    base, _, _ = family
    made = spectra.cache(base)
    for folder in (made.folder, root / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "base.json").write_text(text)
    (root / "other" / "x.safetensors").touch()
    assert SpectrumCache().stale_for(open_checkpoint(base)) == ()
    assert len(spectra.cache(base).there) == 3


# Files that are none of ours, or broken


def save_as(change):
    def damage(file):
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {name: value.clone() for name, value in load_file(file).items()}
        facts = json.loads(metadata["spectra"])
        change(tensors, facts)
        save_file(tensors, file, {"spectra": json.dumps(facts)})

    return damage


def put(name, value):
    return save_as(lambda tensors, facts: tensors.__setitem__(name, value(tensors[name])))


def claim(**claims):
    return save_as(lambda tensors, facts: facts.update(claims))


def at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "text": lambda file: file.write_text("no weights at all, but long enough for a header"),
    "pickle": lambda file: file.write_bytes(pickle.dumps(print)),
    "huge header": lambda file: file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:]),
    "foreign": lambda file: save_file({"vectors": torch.zeros(3, 3)}, file),
    "no facts": lambda file: save_file(load_file(file), file, {"spectra": "{}"}),
    "facts are a list": lambda file: save_file(load_file(file), file, {"spectra": "[]"}),
    "facts nest": lambda file: save_file(load_file(file), file, {"spectra": "[" * 99999}),
    "another layer's": lambda file: shutil.copy(next(f for f in sorted(file.parent.iterdir()) if f != file), file),
    "another schema": claim(schema="spectra.cache/2"),
    "another base": claim(base="0" * 16),
    "another shape": claim(shape=[40, 31]),
    "another dtype": claim(dtype="float64"),
    "the other side": claim(side="left"),
    "no side": claim(side=["right"]),
    "rounding is nan": claim(rounding=float("nan")),
    "rounding is negative": claim(rounding=-1e-9),
    "rounding is no number": claim(rounding="x"),
    "rounding is too large": claim(rounding=10**400),
    "a value missing": put("s", lambda s: s[:-1]),
    "a vector missing": put("vectors", lambda X: X[:-1].contiguous()),
    "vectors in half precision": put("vectors", lambda X: X.half()),
    "values in float32": put("s", lambda s: s.float()),
    "values ascend": put("s", lambda s: s.flip(0)),
    "a value is nan": put("s", at(3, float("nan"))),
    "a value is infinite": put("s", at(0, float("inf"))),
    "a value is negative": put("s", at(-1, -1.0)),
    "a residual is nan": put("residuals", at(0, float("nan"))),
    "a residual is negative": put("residuals", at(0, -1.0)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_broken_is_not_there(family, root, damage):
    base, _, adapter = family
    spectra.cache(base)
    file = next(file for file in kept(root) if "layer-1-" in file.name)
    damage(file)
    opened = open_checkpoint(base)
    assert SpectrumCache().load(opened, "layer.1.q.weight", "linear", torch.float32) is None
    found = spectra.audit(adapter, base)
    assert [layer.engine for layer in found.layers] == ["cached", "exact", "cached"]
    assert verdicts(found) == verdicts(spectra.audit(adapter, base, cache=False))
    made = spectra.cache(base)
    assert [layer.name for layer in made.written] == ["layer.1.q.weight"]
    assert engines(spectra.audit(adapter, base)) == {"cached"}


@pytest.mark.parametrize(
    "damage",
    [put("vectors", at((3, 5), float("nan"))), put("vectors", at(0, 0.0)), put("s", lambda s: s * 1.001)],
    ids=["a vector is nan", "a vector is zero", "values too large"],
)
def test_what_makes_sense_and_is_wrong_is_noticed_by_content(family, root, damage):
    base, _, adapter = family
    spectra.cache(base)
    damage(next(file for file in kept(root) if "layer-1-" in file.name))
    found = spectra.audit(adapter, base)
    assert [layer.engine for layer in found.layers] == ["cached", "exact", "cached"]
    assert flags(found) >= {"stale_cache"}
    assert verdicts(found) == verdicts(spectra.audit(adapter, base, cache=False))
    assert [layer.name for layer in spectra.cache(base).written] == ["layer.1.q.weight"]


def test_a_folder_in_the_way(capsys, family, root):
    base, _, adapter = family
    made = spectra.cache(base)
    file = kept(root)[1]
    file.unlink()
    file.mkdir()
    assert [layer.engine for layer in spectra.audit(adapter, base).layers].count("cached") == 2
    code, _, err = run(capsys, "cache", base)
    assert code == 2
    assert f"{file}: could not be written" in err
    assert err.count("\n") == 1
    assert not list(made.folder.glob(".*"))


def test_a_file_where_the_root_should_be(capsys, family, tmp_path):
    base, _, adapter = family
    (tmp_path / "occupied").touch()
    assert engines(spectra.audit(adapter, base, cache=tmp_path / "occupied")) == {"exact"}
    code, _, err = run(capsys, "cache", base, "--cache", tmp_path / "occupied")
    assert code == 2
    assert "could not be written" in err


def test_names_that_no_file_system_would_take(rng, make_base, root, tmp_path):
    names = [
        "a/b:c",
        "a.b.c",
        "A.b.c",
        "../../evil",
        "/etc/evil",
        "con",
        "aux.",
        "x" * 300,
        "x" * 300 + "y",
        "ü*?",
        ".. ",
    ]
    folder = make_base(weights(rng, *(f"{name}.weight" for name in names), shape=(6, 5)))
    made = spectra.cache(folder)
    assert sorted(layer.name for layer in made.written) == sorted(f"{name}.weight" for name in names)
    files = kept(root)
    assert {file.parent for file in files} == {made.folder}
    assert len({file.name.casefold() for file in files}) == len(names)
    assert all(file.name.isascii() and len(file.name) < 100 for file in files)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "kept"}, "nothing beside them"
    base, cache = open_checkpoint(folder), SpectrumCache()
    for name in names:
        found = cache.load(base, f"{name}.weight", "linear", torch.float32)
        assert found is not None
        expected = np.linalg.svd(base.read(f"{name}.weight").double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.s, expected, rtol=1e-6)
