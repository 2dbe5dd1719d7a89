"""Similarity matrices of the worst layers."""

from __future__ import annotations

import numpy as np
import pytest

import spectra
from spectra.tasks.similarity import similarity_matrices
from tests.support.pages import data_of
from tests.support.paths import FIXTURES


@pytest.fixture(scope="module")
def audited():
    return spectra.audit(FIXTURES / "lora-r4", FIXTURES / "base")


def test_matrices_are_those_of_the_worst_layers(audited):
    found = similarity_matrices(audited, number=3, size=20)
    worst = sorted((one.intruders for one in audited.layers), reverse=True)[:3]
    by_name = {one.name: one for one in audited.layers}
    assert [by_name[one.name].intruders for one in found] == worst
    for one in found:
        assert one.cosines.shape == (20, 20)
        exact = {vector.index: vector for vector in by_name[one.name].vectors}
        for index, vector in exact.items():
            if vector.base_index is not None and vector.base_index < 20:
                assert one.cosines[vector.base_index, index] == pytest.approx(vector.max_cosine, abs=1e-4)  # float32's
            if vector.intruder:
                assert one.cosines[:, index].max() < 0.5
    assert similarity_matrices(audited, number=0) == []
    whole = spectra.layer_spectra([FIXTURES / "lora-r4"], FIXTURES / "base", include=[found[0].name], size=20)
    np.testing.assert_allclose(found[0].cosines, whole[0].cosines, atol=1e-5)
    shown = data_of(spectra.to_html(audited, matrices=whole))["reports"][0]["matrices"]
    assert list(shown) == [str(list(by_name).index(found[0].name))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_large_weights_are_not_decomposed_for_a_picture(make_base, make_adapter, monkeypatch, side):
    """From 1024 on by Lanczos: the same numbers as a full decomposition gives."""
    import torch

    from spectra.svd import decompose_gram
    from spectra.tasks import similarity

    torch.manual_seed(0)
    W0 = torch.randn(1100, 1300) / 36
    U, V = torch.linalg.qr(torch.randn(1100, 16)).Q, torch.linalg.qr(torch.randn(1300, 16)).Q
    W0 += U * torch.linspace(12, 4, 16) @ V.T
    base = make_base({"layers.0.up.weight": W0})
    adapter = make_adapter({"layers.0.up": (3 * torch.randn(1100, 2) / 8, torch.randn(2, 1300) / 8)})
    found = spectra.audit(adapter, base, side=side)
    assert found.total("all") > 0
    monkeypatch.setattr(similarity, "decompose_gram", lambda *_, **__: pytest.fail("decomposed"))
    (fast,) = similarity_matrices(found, size=12)
    monkeypatch.setattr(similarity, "decompose_gram", decompose_gram)
    monkeypatch.setattr(similarity, "ROOMY", 10_000)
    (slow,) = similarity_matrices(found, size=12)
    np.testing.assert_allclose(fast.cosines, slow.cosines, atol=2e-3)


def test_a_weight_that_lanczos_cannot_tell_is_left_out(make_base, make_adapter, monkeypatch, audited):
    from spectra.tasks import similarity

    monkeypatch.setattr(similarity, "ROOMY", 1)
    monkeypatch.setattr(similarity, "leading_pairs", lambda *_: None)
    assert similarity_matrices(audited) == []


def test_models_in_memory_have_no_matrices(audited):
    from safetensors.torch import load_file

    tuned, base = (load_file(FIXTURES / name / "model.safetensors") for name in ("full", "base"))
    found = spectra.audit(tuned, base, include=["*layers.0.*"])
    assert found.total("all")
    assert found.tuned["in_memory"]
    assert found.base["in_memory"]
    assert similarity_matrices([found, audited], number=1)[0].tuned == "lora-r4"
