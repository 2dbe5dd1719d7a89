"""Names of tensors without what wraps modules in training."""

from __future__ import annotations

import numpy as np
import pytest

from spectra.errors import CorruptFileError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.headers import Renamed, TensorInfo
from spectra.files.wrapped import by_own_names, own_name


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("_orig_mod.a.b.weight", "a.b.weight"),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.b.weight", "a.b.weight"),
        ("a.b._orig_mod.weight", "a.b.weight"),
        ("a.my_orig_mod.weight", "a.my_orig_mod.weight"),
        ("a.b._orig_mod", "a.b._orig_mod"),
        ("_orig_modules.weight", "_orig_modules.weight"),
    ],
)
def test_own_names(name, own):
    assert own_name(name) == own


def test_values_are_those_of_the_file(make_base, rng):
    values = {f"a.{i}._orig_mod.weight": rng.normal(size=(3, 4)).astype("f4") for i in range(3)}
    checkpoint = open_checkpoint(make_base(values))
    assert list(checkpoint.tensors) == ["a.0.weight", "a.1.weight", "a.2.weight"]
    for i in range(3):
        assert np.array_equal(checkpoint.read(f"a.{i}.weight"), values[f"a.{i}._orig_mod.weight"])


def test_two_of_one_name_are_refused(make_base):
    folder = make_base({name: np.ones((2, 2), "f4") for name in ("a._orig_mod.weight", "a.weight")})
    with pytest.raises(CorruptFileError, match="without what wraps modules in training it has the name of"):
        open_checkpoint(folder)


def test_what_is_read_by_its_name_keeps_it(tmp_path):
    info = TensorInfo("_orig_mod.a", "F4", (2, 2), tmp_path / "f", (0, 2))
    renamed = by_own_names([info])["a"]
    assert isinstance(renamed, Renamed)
    assert renamed.stored is info
