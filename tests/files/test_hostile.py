"""What is broken or made to harm ends in one line and exit code 2, at once, in little memory, and does nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz, planted
from spectra.adapters import plan_updates
from spectra.errors import CorruptFileError, SpectraError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.headers import read_header
from tests.support import hostile, hostile_formats  # noqa: F401  which registers its cases
from tests.support.hostile import CASES
from tests.support.paths import FIXTURES, ROOT

GROUP = 100  # cases that one process runs


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    names = list(CASES)
    groups = {name: names[at // GROUP * GROUP :][:GROUP] for at, name in enumerate(names)}
    return hostile.Outcomes("hostile", tmp_path_factory.mktemp("hostile"), groups)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_case(outcomes, name):
    found = outcomes[name]
    hostile.check_refused(found, CASES[name].mib)
    for word in CASES[name].words:
        assert word in found["err"]
    assert found["events"] == [], "written, started, connected"


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


def test_what_is_not_hostile_is_read(tmp_path, capsys):
    """The control: the builders' own adapter and shards, untouched."""
    arguments = hostile.prepare(tmp_path / "a", hostile.Case("adapter", hostile.adapter, ()))
    assert hostile.silently(arguments) == 0
    box = hostile.Case("shards", hostile.shards, ())
    assert hostile.silently(hostile.prepare(tmp_path / "s", box)) == 0


# Any bytes, any structure: nothing but errors of our own.

WORDS = st.sampled_from(["w", "shape", "dtype", "data_offsets", "__metadata__", "F32", "weight_map", "a.safetensors"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=4)
)
SIZES = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64])
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "C64", "f32"]) | LEAVES,
    "shape": st.lists(SIZES, max_size=4) | VALUES,
    "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | VALUES,
})  # fmt: skip
HEADERS = st.dictionaries(st.text(max_size=8), ENTRIES | VALUES, max_size=4) | VALUES
PLACE = Path("model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / PLACE


def outcome(action, path):
    """What it returns, or None where it raises an error of our own, which names the path."""
    said = ""
    try:
        return action()
    except SpectraError as error:
        said = str(error)
    assert said.startswith(str(path))
    return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(header=HEADERS, data=st.binary(max_size=40))
def test_any_header(place, header, data):
    hostile.raw(place, header, data)
    tensors = outcome(lambda: read_header(place), place)
    if tensors is None:
        return
    assert isinstance(header, dict)
    assert set(tensors) == set(header) - {"__metadata__"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.binary(max_size=200), data=st.binary(max_size=8))
def test_any_bytes_in_a_header(place, text, data):
    hostile.raw(place, b"{" + text, data)
    with pytest.raises(CorruptFileError):
        read_header(place)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=VALUES)
@example(value={"weight_map": {"w": "a.safetensors"}})
def test_any_index(place, value):
    folder = place.parent / "indexed"
    folder.mkdir(exist_ok=True)
    hostile.arrays(folder / "a.safetensors", {"w": np.ones((2, 2))})
    (folder / hostile.INDEX).write_text(json.dumps(value))
    found = outcome(lambda: open_checkpoint(folder), folder)
    if found is not None:
        assert set(found.tensors) == {"w"}
        assert value["weight_map"] == {"w": "a.safetensors"}


FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "init_lora_weights",
    "target_modules", "modules_to_save", "layers_to_transform", "bias", "base_model_name_or_path", "revision",
    "alora_invocation_tokens", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    config=st.dictionaries(st.sampled_from(FIELDS), VALUES | st.dictionaries(st.text(max_size=9), VALUES, max_size=3))
)
def test_any_configuration(place, config):
    box = place.parent / "adapted"
    box.mkdir(exist_ok=True)
    hostile.adapter(box, **config)
    plan = outcome(lambda: plan_updates(open_checkpoint(box)), box)
    if plan is not None:
        assert all(math.isfinite(update.scaling) for update in plan.updates if update.scaling is not None)


def test_a_link_within_the_folder_is_followed(tmp_path):
    (tmp_path / "files").mkdir()
    hostile.whole(tmp_path / "files" / "a")
    (tmp_path / PLACE).symlink_to("files/a")
    assert len(open_checkpoint(tmp_path).tensors) == 2


def test_a_link_that_the_user_names_is_followed(tmp_path):
    hostile.whole(tmp_path / "a.safetensors")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / PLACE).symlink_to(tmp_path / "a.safetensors")
    assert len(open_checkpoint(tmp_path / "home" / PLACE).tensors) == 2
    (tmp_path / "linked").symlink_to(FIXTURES / "lora-r4")
    assert open_checkpoint(tmp_path / "linked").layout == "peft folder"


def test_links_of_a_hub_snapshots_subfolder_are_followed(tmp_path):
    unet = tmp_path / "models--a--b" / "snapshots" / "abc" / "unet"
    unet.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    hostile.whole(tmp_path / "models--a--b" / "blobs" / "1")
    (unet / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/1")
    assert len(open_checkpoint(unet).tensors) == 2


def test_a_short_run_of_the_fuzzer(tmp_path):
    found = fuzz.run_fuzz(seed=0, headers=3000, scratch=tmp_path)
    assert found.crashes == ()
    assert found.headers == 3000
    assert found.kept > 20, "guided by what is new"
    assert found.accepted > 0


def test_planted_bugs_are_found(tmp_path):
    """Those that take few inputs; ``python -m benchmarks.fuzz --self-test`` looks for all."""
    quick = [bug for bug in planted.PLANTED if bug.quick]
    assert len(quick) >= 4
    for bug in quick:
        assert planted.inputs_until_found(bug, tmp_path / bug.says, most=20_000) is not None, bug.name


def test_planted_bugs_fit_the_package():
    for bug in planted.PLANTED:
        text = (ROOT / "spectra" / bug.module).read_text(encoding="utf-8")
        assert text.count(bug.old) == 1, bug.name
