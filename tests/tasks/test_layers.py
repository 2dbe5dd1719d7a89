"""The layers of a fine-tune, one at a time, for whoever computes something else."""

from __future__ import annotations

import pytest
import torch

import spectra
from spectra.errors import UsageError, WrongBaseError
from tests.support.paths import FIXTURES

BASE = FIXTURES / "base"


@pytest.mark.parametrize("name", ["lora-r4", "dora-r16", "full"])
def test_the_update_is_what_an_audit_sees(name):
    report = spectra.audit(FIXTURES / name, BASE)
    seen = []
    for layer, W0, update in spectra.iter_layers(FIXTURES / name, BASE):
        measured = report[layer].measures
        size = float(update.delta().double().norm())
        if report[layer].status != "unchanged":
            assert size == pytest.approx(measured["update_norm_fro"], rel=1e-4), layer
            assert float(W0.double().norm()) == pytest.approx(measured["base_norm_fro"], rel=1e-6)
        assert torch.allclose(update.tuned(), W0 + update.delta(), atol=1e-5)
        assert tuple(W0.shape) == report[layer].shape
        assert update.kind == report[layer].update["kind"]
        if update.factors is None:
            assert update.kind != "low_rank"
        else:
            B, A = update.factors
            assert B.shape[1] == A.shape[0] == update.rank
            assert torch.allclose((B @ A).float(), update.delta(), atol=1e-5)
        assert repr(update).startswith(f"<Update of {layer}: {update.kind}, ({W0.shape[0]}, {W0.shape[1]})")
        seen.append(layer)
    assert seen == [layer.name for layer in report]


def test_it_goes_by_the_options(tmp_path):
    names = [name for name, _, _ in spectra.iter_layers(FIXTURES / "lora-r4", BASE, include="*.v_proj")]
    assert len(names) == 4
    (_, W0, _), *_ = spectra.iter_layers(FIXTURES / "lora-r4", BASE, include="*.v_proj", dtype="float64")
    assert W0.dtype == torch.float64


def test_what_does_not_fit_is_said_at_once(make_base, make_adapter, rng):
    base = make_base({"a.weight": rng.normal(size=(8, 8)).astype("float32")})
    tuned = make_adapter({"b": (rng.normal(size=(8, 2)).astype("float32"), rng.normal(size=(2, 8)).astype("float32"))})
    with pytest.raises(WrongBaseError):
        spectra.iter_layers(tuned, base)


def test_a_layer_that_cannot_be_read_is_named(make_base, make_adapter, rng):
    base = make_base({"a.weight": rng.normal(size=(8, 8)).astype("float32")})
    B = rng.normal(size=(8, 2)).astype("float32")
    B[0, 0] = float("nan")
    tuned = make_adapter({"a": (B, rng.normal(size=(2, 8)).astype("float32"))})
    layers = spectra.iter_layers(tuned, base)
    name, _, update = next(layers)  # read, not judged: what is computed of it is the caller's
    assert name == "a"
    assert bool(update.delta().isnan().any())
    with pytest.raises(UsageError, match="expected float32 or float64"):
        spectra.iter_layers(tuned, base, dtype="int8")
