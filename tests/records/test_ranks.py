"""The record of ranks: to JSON and back, and as a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from spectra.errors import UsageError
from spectra.records.ranks import RankReport
from tests.support.ranks import model_of


def test_json_goes_round():
    made = model_of(3)
    value = json.loads(made.to_json())
    assert value["schema"] == "spectra.ranks/1"
    assert value["suggestion"]["config"] == made.suggestion.peft_config()
    assert value["layers"][0]["curve"] == [list(point) for point in made.layers[0].curve]
    again = RankReport.from_dict(value)
    assert again == made
    assert again.to_json() == made.to_json()
    nothing = replace(made, suggestion=None)
    assert RankReport.from_dict(json.loads(nothing.to_json())) == nothing
    canonical = made.to_dict(canonical=True)
    assert not {"seconds"} & canonical.keys()
    assert "path" not in canonical["base"]
    assert "workers" not in canonical["settings"]
    with pytest.raises(UsageError, match=r"spectra\.report/1"):
        RankReport.from_dict({"schema": "spectra.report/1"})
