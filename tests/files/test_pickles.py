"""Pickled weights: refused unless allowed, then read as torch reads them, without running anything."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.adapters import plan_updates
from spectra.cli import main
from spectra.errors import CorruptFileError, UnsafeFileError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.pickles import read_pickle
from tests.support import hostile
from tests.support.hostile import MIB, SECONDS
from tests.support.paths import FIXTURES, ROOT
from tests.support.pickled import ADAPTER, BIN, CASES, GOOD, INDEX, archive
from tests.support.seeds import each_seed

NAME = "model.layers.{}.mlp.up_proj.weight"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    return hostile.outcomes_of("pickled", tmp_path_factory.mktemp("pickled"))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_pickle(outcomes, name):
    found, err = outcomes[name], outcomes[name]["err"]
    assert found["code"] == 2, err
    assert err.startswith("spectra: error: ")
    assert err[:-1].isprintable()
    for word in CASES[name].words:
        assert word in err
    assert found["seconds"] <= SECONDS
    assert found["mib"] <= MIB
    assert found["events"] == [], "written, started, connected"
    assert found["changed"] == []
    assert hostile.CANARY not in err + found["out"]
    outside = Path(found["home"]).resolve() / "outside"
    assert not any(outside in Path(opened).resolve().parents for opened in found["opened"])


def test_the_builders_own_archive_is_read(tmp_path):
    """The control: what the cases change one thing of."""
    (tmp_path / BIN).write_bytes(archive(GOOD))
    tensors, aside = read_pickle(tmp_path / BIN)
    assert [info.shape for info in tensors.values()] == [(8, 8), (8, 8)]
    assert aside == {}
    for info in open_checkpoint(tmp_path, allow_pickle=True).tensors.values():
        assert torch.equal(open_checkpoint(tmp_path, allow_pickle=True).read(info.name), torch.zeros(8, 8))


def test_any_bytes_in_an_archive(tmp_path):
    """Nothing but errors of our own, or tensors within the file that torch reads alike."""
    rng, good, place, read = np.random.default_rng(0), archive(GOOD), tmp_path / BIN, 0
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        place.write_bytes(content)
        said = str(place)
        try:
            opened = open_checkpoint(place, allow_pickle=True)
            read += 1
            for name, info in opened.tensors.items():
                assert info.size <= 64
                opened.read(name)
        except spectra.SpectraError as error:
            said = str(error)
        assert said.startswith(str(place))
    assert read > 100, "most of the zeros do not matter"


def random_state(rng):
    """A state dict such as models have, and what is in it that is no tensor."""
    state: dict[str, object] = {}
    aside: dict[str, str] = {}
    first = torch.zeros(())
    for index in range(int(rng.integers(1, 9))):
        shape = tuple(int(size) for size in rng.integers(0 if index else 1, 7, size=int(rng.integers(0, 4))))
        value = torch.from_numpy(np.array(rng.normal(size=shape))).to(FLOATS[int(rng.integers(4))])
        kind = rng.integers(8)
        if kind == 0 and value.ndim > 1:
            value = value.transpose(0, 1)
        elif kind == 1 and value.ndim and value.shape[0] > 2:
            value = value[1:-1]
        elif kind == 2 and state:
            value = first  # shared
        elif kind == 3:
            value = torch.nn.Parameter(value)
        elif kind == 4:
            value = torch.arange(value.numel()).to([torch.int64, torch.int32, torch.uint8, torch.bool][index % 4])
        elif kind == 5 and value.ndim == 2:
            value = value[:, ::2]
        state[NAME.format(index)] = value
        first = value if index == 0 else first
    if rng.integers(2):
        state["epoch"], aside["epoch"] = 7, "number"
        state["note"], aside["note"] = "text", "text"
    return state, aside


@each_seed(range(40))
def test_pickles_are_read_as_torch_reads_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    state, aside = random_state(rng)
    within = [None, "state_dict", "model", "module"][seed % 4]
    stored = state
    if within:
        steps = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
        stored = {within: state, "epoch": 3, "optimizer": steps}
        aside = {f"{within}.{name}": why for name, why in aside.items()} | {
            "epoch": "number",
            "optimizer": "dictionary",
        }
    torch.save(stored, tmp_path / BIN)
    opened = open_checkpoint(tmp_path, allow_pickle=True)
    assert opened.layout == "pickle"
    expected = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert list(opened.tensors) == list(expected)
    assert opened.aside.keys() == aside.keys()
    assert all(word in opened.aside[name] for name, word in aside.items())
    for name, value in expected.items():
        info = opened.tensors[name]
        found = opened.read(name, digest=True)
        assert found.dtype == value.dtype
        assert info.shape == tuple(value.shape) == tuple(found.shape)
        assert torch.equal(found, value.detach())
        if value.ndim and value.shape[0] > 1:
            assert torch.equal(opened.read(name, rows=slice(1)), value.detach()[:1])
        if value.is_contiguous() and value.numel():  # the bytes where the header says
            with info.file.open("rb") as file:
                file.seek(info.span[0])
                raw = file.read(info.span[1])
            assert (
                raw
                == value.detach()
                .clone(memory_format=torch.contiguous_format)
                .view(-1)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
    assert opened.fingerprint().covers == "contents"
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(
        {name: value.detach().clone().contiguous() for name, value in expected.items()}, whole / "model.safetensors"
    )
    same = open_checkpoint(whole)
    assert same.fingerprint(hash_contents=True) == opened.fingerprint(hash_contents=True)
    assert open_checkpoint(tmp_path, allow_pickle=True).fingerprint(hash_contents=True) == opened.fingerprint()
    if any(info.size == 0 and info.is_float for info in opened.tensors.values()):
        with pytest.raises(CorruptFileError, match="saved incompletely"):
            plan_updates(opened)
        return
    skipped = {item.name for item in plan_updates(opened).skipped}
    assert skipped >= aside.keys()


def as_pickle(folder: Path, target: Path, *, shards: int = 1) -> Path:
    """A copy of a checkpoint or an adapter whose weights are pickled."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, target)
    adapter = (folder / "adapter_model.safetensors").exists()
    state = load_file(folder / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    if shards == 1:
        torch.save(state, target / (ADAPTER if adapter else BIN))
        return target
    names = list(state)
    files = {name: f"pytorch_model-{index % shards + 1:05d}-of-{shards:05d}.bin" for index, name in enumerate(names)}
    for shard in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == shard}, target / shard)
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return target


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """The fixtures' base, a full fine-tune and an adapter, pickled."""
    home = tmp_path_factory.mktemp("fixtures")
    as_pickle(FIXTURES / "base", home / "base", shards=3)
    as_pickle(FIXTURES / "full", home / "full")
    as_pickle(FIXTURES / "lora-r4", home / "lora-r4")
    return home


def verdicts(report):
    """All but what the last digits of sums change, which depend on where in memory a matrix begins."""
    rows = []
    for layer in json.loads(report.to_json())["layers"]:
        vectors = [
            (one["index"], round(one["sigma"], 3), one["base_index"], one["intruder"]) for one in layer["vectors"]
        ]
        rows.append((layer["name"], layer["shape"], layer["status"], layer["role"], layer["update"], vectors))
    return rows


@pytest.mark.parametrize("name", ["full", "lora-r4"])
def test_an_audit_of_pickles_is_that_of_safetensors(pickled, name):
    expected = spectra.audit(FIXTURES / name, FIXTURES / "base")
    found = spectra.audit(pickled / name, pickled / "base", allow_pickle=True)
    assert verdicts(found) == verdicts(expected)
    assert found.tuned["fingerprint"] == expected.tuned["fingerprint"]
    assert found.base["fingerprint_headers"] == expected.base["fingerprint_headers"]
    assert found.base["format"] == "sharded pickle"
    assert found.settings == expected.settings, "no setting of the result"


COMMANDS = (
    ("audit", "{tuned}"), ("inspect", "{tuned}"), ("compare", "{tuned}", "--quick"), ("ranks", "{tuned}"),
    ("cache", "{base}", "--dry-run"), ("repair", "{tuned}", "--scale", "0.5", "--dry-run"),
    ("plot", "top-k", "{tuned}", "--quick", "-o", "{out}/a.svg"),
    ("plot", "similarity", "{tuned}", "-o", "{out}/b.svg"),
    ("extract", "{full}", "--to", "{out}/extracted"),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_the_option_and_needs_it(pickled, tmp_path, capsys, command):
    places = {"tuned": pickled / "lora-r4", "full": pickled / "full", "base": pickled / "base", "out": tmp_path}
    words = [word.format(**places) for word in command]
    words += [] if command[0] == "cache" else ["--base", str(pickled / "base")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--allow-pickle" in said
    assert "convert" in said
    assert main([*words, "--allow-pickle"]) == 0


def test_a_repaired_adapter_is_written_as_safetensors(pickled, tmp_path, capsys):
    words = ["repair", str(pickled / "lora-r4"), "--base", str(pickled / "base"), "--allow-pickle", "--quiet"]
    for scale, home in (("0.5", tmp_path / "half"), ("1", tmp_path / "same")):
        assert main([*words, "--scale", scale, "--to", str(home)]) == 0
        assert not (home / ADAPTER).exists()
        assert open_checkpoint(home).layout == "peft folder"
        assert main(["verify", str(home), "--allow-pickle", "--quiet"]) == 0
    kept, source = load_file(tmp_path / "same" / "adapter_model.safetensors"), torch.load(pickled / "lora-r4" / ADAPTER)
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], source[name]) for name in kept)
    capsys.readouterr()


def test_a_pickled_checkpoint_is_not_repaired_in_place(pickled, tmp_path):
    with pytest.raises(UsageError, match="convert it first"):
        spectra.repair(pickled / "full", pickled / "base", to=tmp_path / "out", scale=0.5, allow_pickle=True)
    assert not (tmp_path / "out").exists()


def test_safetensors_come_first(tmp_path):
    torch.save({"w": torch.ones(2, 2)}, tmp_path / BIN)
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path, allow_pickle=True).layout == "safetensors"


def test_a_trainers_state_beside_the_weights_is_not_taken_for_them(tmp_path):
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "weights.pt")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    assert list(open_checkpoint(tmp_path, allow_pickle=True).tensors) == ["w"]


def test_values_are_read_without_unpickling(tmp_path, monkeypatch):
    """Also where the environment would have it otherwise; and a file that changed meanwhile is noticed."""
    torch.save({"w": torch.ones(2, 2)}, tmp_path / BIN)
    opened = open_checkpoint(tmp_path, allow_pickle=True)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with monkeypatch.context() as patched:
        for owner, name in ((torch, "load"), (torch.serialization, "_load"), (pickle, "loads"), (pickle, "Unpickler")):
            patched.setattr(owner, name, None)
        assert torch.equal(opened.read("w"), torch.ones(2, 2))
    for content in (hostile.zipped(tmp_path), b"", b"PK\x03\x04"):
        (tmp_path / BIN).write_bytes(content)
        with pytest.raises(spectra.SpectraError, match="changed"):
            opened.read("w")
    torch.save({"w": torch.ones(3, 2)}, tmp_path / BIN)
    with pytest.raises(spectra.SpectraError, match="changed"):
        opened.read("w")
    (tmp_path / BIN).unlink()
    with pytest.raises(spectra.SpectraError, match="could not be read"):
        opened.read("w")
    assert not (tmp_path.parent / "exploded").exists()


EVERY = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def random_view(rng, dtype):
    """A tensor of that dtype, in any order, of any part of its storage."""
    raw = torch.from_numpy(rng.integers(0, 2 if dtype is torch.bool else 256, size=8 * 4**3, dtype=np.uint8))
    value = raw.view(dtype)[int(rng.integers(3)) :]
    shape = [int(size) for size in rng.integers(0 if rng.random() < 0.1 else 1, 4, size=int(rng.integers(0, 4)))]
    if rng.integers(2):
        strides = [int(stride) for stride in rng.integers(0, 9, size=len(shape))]
        return value.as_strided(shape, strides, int(rng.integers(9)))
    return value[: int(np.prod(shape))].reshape(shape)


def bits(value):
    return torch.empty(value.shape, dtype=value.dtype).copy_(value).view(-1).view(torch.uint8)


@each_seed(range(60))
def test_any_tensor_is_what_torch_loads(tmp_path, seed):
    """Bit for bit, with any strides and offset; also some of its rows."""
    rng = np.random.default_rng(seed)
    state = {f"w{index}": random_view(rng, EVERY[int(rng.integers(len(EVERY)))]) for index in range(8)}
    state["again"] = state["w0"]
    torch.save(state, tmp_path / BIN)
    opened, loaded = open_checkpoint(tmp_path, allow_pickle=True), torch.load(tmp_path / BIN, weights_only=True)
    for name, expected in loaded.items():
        found, info = opened.read(name), opened.tensors[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(found), bits(expected))
        assert info.span[0] + info.span[1] <= (tmp_path / BIN).stat().st_size
        if expected.ndim:
            first, last = sorted(int(row) for row in rng.integers(0, expected.shape[0] + 2, size=2))
            for rows in (slice(first, last), slice(last), slice(first, None, 2)):
                part = opened.read(name, rows=rows)
                assert part.shape == expected[rows].shape
                assert torch.equal(bits(part), bits(expected[rows]))
        if info.as_stored and info.size:
            assert (tmp_path / BIN).read_bytes()[info.span[0] : sum(info.span)] == bytes(bits(expected).tolist())


def test_thousands_of_small_tensors(tmp_path):
    """Each with a storage of its own, and all in one."""
    whole = torch.arange(6000.0)
    torch.save({"own": {}, "model": {f"w{n}": torch.full((1, 1), float(n)) for n in range(6000)}}, tmp_path / BIN)
    opened = open_checkpoint(tmp_path, allow_pickle=True)
    assert len(opened.tensors) == 6000
    assert opened.read("w5999").item() == 5999
    torch.save({f"w{n}": whole[n : n + 1] for n in range(6000)}, tmp_path / BIN)
    assert open_checkpoint(tmp_path, allow_pickle=True).read("w77").item() == 77


def test_a_view_that_is_conjugated_is_refused(tmp_path):
    """Its values are not the ones in the file."""
    torch.save({"w": torch.ones(2, 2, dtype=torch.complex64).conj().imag}, tmp_path / BIN)
    with pytest.raises(UnsafeFileError, match="conjugated or negated"):
        read_pickle(tmp_path / BIN)


def test_inspecting_a_pickle_loads_no_torch(pickled):
    code = (
        "import sys; from spectra.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "inspect", str(pickled / "full"), "--allow-pickle"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pickle" in done.stdout
