"""SmolLM2 as it is shipped, a GGUF file of Q4_1 blocks, as the base of a LoRA that was really trained on it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import spectra
from benchmarks.language_model import Member, examples, prepared, taught
from benchmarks.options import Options
from spectra.files.checkpoint import open_checkpoint
from spectra.render.inspection import render_inspection
from tests.support.published import SMOLLM2, language_model

pytestmark = language_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the GGUF file, a folder of its weights in float32, an adapter of five steps)."""
    assert SMOLLM2 is not None
    assert SMOLLM2.submodule_search_locations
    (file,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    home = tmp_path_factory.mktemp("smollm2")
    with prepared(Options(scratch=home)) as (folder, model, encode):
        tuned = taught(model, Member("lora", 4, 5e-2), examples(encode)[:20], steps=5)
        tuned.save_pretrained(home / "adapter")
        (folder / "base").rename(home / "base")
    return file, home / "base", home / "adapter"


def test_the_weights_are_those_that_transformers_reads(trained):
    file, base, _ = trained
    mine, theirs = open_checkpoint(file), open_checkpoint(base)
    names = [name for name, info in theirs.weights.items() if len(info.shape) > 1]
    assert len(names) == 211
    for name in names:
        assert torch.equal(mine.load(name).float(), theirs.load(name).float()), name


def test_it_is_audited_as_the_weights_that_its_blocks_stand_for(trained):
    file, base, adapter = trained
    from_blocks, from_floats = (spectra.audit(adapter, path, cache=False) for path in (file, base))
    assert len(from_blocks.layers) == 210
    assert not from_blocks.failed
    assert from_blocks.total("all") > 20
    for mine, theirs in zip(from_blocks.layers, from_floats.layers, strict=True):
        assert (mine.name, mine.intruders, mine.status) == (theirs.name, theirs.intruders, theirs.status)
    assert from_blocks.base_quantised
    assert not from_floats.base_quantised


def test_it_is_inspected_compared_and_repaired(trained, tmp_path):
    file, base, adapter = trained
    inspected = render_inspection([spectra.inspect(adapter, file)])
    assert "Q4_1" in inspected
    first = ["layers.0."]
    compared = [spectra.compare([adapter], path, include=first, draws=2, cache=False) for path in (file, base)]
    rows = [{key: value for key, value in one.rows()[0].items() if key != "seconds"} for one in compared]
    assert rows[0]["intruders"] == rows[1]["intruders"] > 0
    assert rows[0]["update_norm_relative"] == pytest.approx(rows[1]["update_norm_relative"])
    repairs = [
        spectra.repair(adapter, path, scale=0.5, to=tmp_path / path.name, include=first, cache=False)
        for path in (file, base)
    ]
    assert len(repairs[0].changed) == len(repairs[1].changed) > 0
    assert spectra.verify(tmp_path / file.name, file).holds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = spectra.audit(tmp_path / file.name, file, include=first, cache=False)
    assert after.total("all") <= compared[0].reports[0].total("all")
