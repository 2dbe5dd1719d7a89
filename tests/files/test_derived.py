"""Weights that follow from what is stored: how they are named, read, matched and accounted for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra import audit
from spectra.adapters import plan_updates
from spectra.errors import CorruptFileError, SpectraError
from spectra.files import stored
from spectra.files.checkpoint import open_checkpoint
from spectra.files.derived import Derived, Unreadable, Weights, read_rows
from spectra.files.headers import TensorInfo
from spectra.pairing.pairs import pair_layers


def halves(weights: Weights, config: Mapping[str, Any]):
    """``X.packed`` and ``X.scale`` stand for their product, ``X.weight``."""
    for name, info in weights.items():
        if name.endswith(".packed"):
            scale = name.replace("packed", "scale")

            def make(read, rows=None, name=name, scale=scale):
                return read(name, rows).float() * read(scale).float()

            yield Derived(
                name.replace("packed", "weight"), "F32", info.shape, info.file, info.span, (name, scale), make,
                "halves", "halves",
            )  # fmt: skip
        if name.endswith(".mystery"):
            weight = name.replace("mystery", "weight")
            yield Unreadable(weight, "U8", (), info.file, info.span, (name,), "stored by a mystery")


def in_two(weights: Weights, config: Mapping[str, Any]):
    """``X.both.weight`` is cut into ``X.upper.weight`` and ``X.lower.weight``."""
    for name, info in weights.items():
        if name.endswith(".both.weight"):
            half = info.shape[0] // 2
            for part, start in (("upper", 0), ("lower", half)):

                def make(read, rows=None, whole=info, start=start, half=half):
                    first, last, _ = (rows or slice(None)).indices(half)
                    return read_rows(whole, read, slice(start + first, start + last))

                yield Derived(
                    name.replace("both", part), info.dtype, (half, info.shape[1]), info.file, info.span,
                    info.sources if isinstance(info, Derived) else (name,), make, f"{part} half", part_of=name,
                )  # fmt: skip


@pytest.fixture
def makers(monkeypatch):
    monkeypatch.setattr(stored, "MAKERS", (halves, in_two))


def write(folder, tensors):
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def stored_halves(seed=0):
    torch.manual_seed(seed)
    return {
        "a.q.packed": torch.randn(12, 8), "a.q.scale": torch.tensor([2.0]), "a.both.packed": torch.randn(16, 8),
        "a.both.scale": torch.tensor([0.5]), "a.o.weight": torch.randn(8, 8), "a.k.mystery": torch.ones(3),
    }  # fmt: skip


def test_what_is_made_takes_the_place_of_what_it_is_made_of(tmp_path, makers):
    tensors = stored_halves()
    opened = open_checkpoint(write(tmp_path / "base", tensors))
    assert set(opened.weights) == {"a.q.weight", "a.upper.weight", "a.lower.weight", "a.o.weight", "a.k.weight"}
    assert torch.equal(opened.load("a.q.weight"), tensors["a.q.packed"] * 2)
    assert torch.equal(opened.load("a.q.weight", rows=3), tensors["a.q.packed"][:3] * 2)
    assert torch.equal(opened.load("a.o.weight", rows=slice(2, 5)), tensors["a.o.weight"][2:5])
    both = tensors["a.both.packed"] / 2
    assert torch.equal(opened.load("a.upper.weight"), both[:8])
    assert torch.equal(opened.load("a.lower.weight", rows=slice(1, 4)), both[9:12])


def test_parts_read_no_more_than_they_need(tmp_path, makers, monkeypatch):
    opened = open_checkpoint(write(tmp_path / "base", stored_halves()))
    asked = []
    read = type(opened).read

    def noted(self, name, **how):
        asked.append((name, how["rows"]))
        return read(self, name, **how)

    monkeypatch.setattr(type(opened), "read", noted)
    opened.load("a.lower.weight")
    assert asked == [("a.both.packed", slice(8, 16)), ("a.both.scale", None)]


def test_what_a_maker_gets_wrong_is_found(tmp_path, monkeypatch):
    def wrong(weights, config):
        info = weights["a.o.weight"]
        yield Derived(
            "a.o.weight",
            "F32",
            (4, 16),
            info.file,
            info.span,
            ("a.o.weight",),
            lambda read, rows: read("a.o.weight", rows),
        )

    monkeypatch.setattr(stored, "MAKERS", (wrong,))
    opened = open_checkpoint(write(tmp_path / "base", stored_halves()))
    with pytest.raises(CorruptFileError, match=r"a\.o\.weight.*\[4, 16\].*\[8, 8\]"):
        opened.load("a.o.weight")


def test_both_sides_are_matched_by_what_is_made(tmp_path, makers):
    """The same fine-tune, packed on one side or on both, is audited as its plain twin is."""
    packed = stored_halves()
    plain: dict[str, torch.Tensor] = {}
    packed.pop("a.k.mystery")
    for name in ("a.q", "a.both"):
        value = packed[f"{name}.packed"] * packed[f"{name}.scale"]
        parts = {"a.upper": value[:8], "a.lower": value[8:]} if name == "a.both" else {name: value}
        plain |= {f"{part}.weight": half for part, half in parts.items()}
    plain["a.o.weight"] = packed["a.o.weight"]
    torch.manual_seed(1)
    tuned = {name: value + 0.3 * torch.randn(value.shape) for name, value in plain.items()}
    base, twin = write(tmp_path / "packed", packed), write(tmp_path / "plain", plain)
    fine = write(tmp_path / "tuned", tuned)
    one, other = audit(fine, base), audit(fine, twin)
    assert len(one.layers) == 4
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert (mine.name, mine.shape) == (theirs.name, theirs.shape)
        cosines = [[vector.max_cosine for vector in layer.vectors] for layer in (mine, theirs)]
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)
    backwards = audit(base, fine)  # a packed fine-tune
    assert {layer.name for layer in backwards.layers} == {"a.q", "a.upper", "a.lower", "a.o"}
    assert not backwards.skipped


def test_every_tensor_is_accounted_for_and_the_unreadable_named(tmp_path, makers):
    tensors = stored_halves()
    opened = open_checkpoint(write(tmp_path / "base", tensors))
    plan = plan_updates(opened)
    used = {name for update in plan.updates for name in update.tensors}
    assert used | {"a.k.mystery"} == set(tensors)
    assert [(item.name, item.reason) for item in plan.skipped] == [("a.k", "stored by a mystery")]
    other = write(tmp_path / "tuned", {"a.k.weight": torch.randn(4, 4), "a.o.weight": torch.randn(8, 8)})
    pairing = pair_layers(opened, open_checkpoint(other), plan_updates(open_checkpoint(other)))
    assert [pair.name for pair in pairing.pairs] == ["a.o"]
    assert ("a.k", "stored by a mystery") in [(item.name, item.reason) for item in pairing.skipped]


@pytest.mark.parametrize("prefix", ["", "model.", "transformer."])
def test_thousands_of_names_with_one_ending_are_matched_at_once(tmp_path, prefix):
    """Each name is looked at once: time grows with their number, not with its square."""
    count = 10_000
    base = write(tmp_path / "base", {f"model.layers.{i}.q.weight": torch.ones(4, 16) for i in range(count)})
    tuned = write(tmp_path / "tuned", {f"{prefix}layers.{i}.q.weight": torch.ones(4, 16) for i in range(count)})
    opened, fine = open_checkpoint(base), open_checkpoint(tuned)
    plan = plan_updates(fine)
    started = time.process_time()
    pairing = pair_layers(opened, fine, plan)
    assert time.process_time() - started < 3
    assert len(pairing.pairs) == count
    assert all(pair.base.name == f"model.layers.{pair.name.split('.')[-2]}.q.weight" for pair in pairing.pairs)


def test_names_without_end_cost_nothing(tmp_path):
    deep = ".".join(["a"] * 240)
    base = write(tmp_path / "base", {f"{deep}.{i}.weight": torch.ones(16, 16) for i in range(2000)})
    tuned = write(tmp_path / "tuned", {f"b.{i}.{deep}.weight": torch.ones(16, 16) for i in range(2000)})
    opened, fine = open_checkpoint(base), open_checkpoint(tuned)
    started = time.process_time()
    with pytest.raises(SpectraError, match="is this the wrong base"):
        pair_layers(opened, fine, plan_updates(fine))
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("tensors", "name", "others"),
    [
        ({"a.both.weight": (8, 4), "a.upper.weight": (5, 7)}, "a.upper.weight", ["a.both.weight", "a.upper.weight"]),
        ({"a.q.packed": (8, 4), "a.q.scale": (1,), "a.q.mystery": (3,)}, "a.q.weight", ["a.q.packed", "a.q.mystery"]),
    ],
)
def test_two_weights_of_one_name_are_an_error(tmp_path, makers, tensors, name, others):
    """A stored tensor with the name of a made one would be dropped silently, and so would one of two made ones."""
    home = write(tmp_path / "base", {key: torch.ones(shape) for key, shape in tensors.items()})
    with pytest.raises(CorruptFileError, match="two weights have this name") as error:
        open_checkpoint(home).weights  # noqa: B018
    assert all(repr(other) in str(error.value) for other in [name, *others])


def test_many_quantised_tensors_take_no_time_for_each_other(tmp_path):
    tensors = {
        f"m.{i}.weight": TensorInfo(f"m.{i}.weight", "F8_E4M3", (4, 4), tmp_path, (16 * i, 16)) for i in range(50_000)
    }
    before = time.process_time()
    made = spectra.files.stored.derive(tensors, {})
    assert len(spectra.files.stored.weights_of(tensors, made)) == len(made) == 50_000
    assert time.process_time() - before < 10
