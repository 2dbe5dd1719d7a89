"""The base's spectra kept from one audit to the next, within the memory given."""

from __future__ import annotations

import torch

import spectra
from spectra.svd import short_spectrum
from spectra.training import Monitor
from tests.support.trainings import LABELS, loop, tiny, verdicts


def test_the_base_is_decomposed_once_and_within_the_memory_given(monkeypatch, tmp_path):
    made = []

    def counted(W0):
        made.append(W0.shape)
        return short_spectrum(W0)

    monkeypatch.setattr("spectra.training.kept.short_spectrum", counted)
    model = tiny()
    watch = Monitor(model, every=2, max_share=None)
    loop(model, watch)
    assert sorted(made) == [(LABELS, 64)] + [(64, 64)] * 4  # the classifier; query and value of two layers
    assert len(watch.history) == 3
    made.clear()
    bounded = Monitor(model, memory=2 * 4 * 64 * 64)
    assert verdicts(bounded.audit(1).report) == verdicts(watch.report)
    assert bounded._spectra.bytes <= 2 * 4 * 64 * 64
    assert made == [(64, 64)] * 2
    Monitor(model, cache=tmp_path).audit(1)
    made.clear()
    disk = Monitor(model, cache=tmp_path)
    assert verdicts(disk.audit(1).report) == verdicts(watch.report)
    assert made == []
    assert disk._spectra.bytes == 0
    other = tiny()
    with torch.no_grad():
        for value in other.parameters():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(9)) / 8)
    assert verdicts(Monitor(other, cache=tmp_path).audit(1).report) == verdicts(spectra.audit(other, engine="exact"))
