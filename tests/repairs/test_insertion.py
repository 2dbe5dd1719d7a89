"""What is put into a model beside its matrices, against peft's own merge."""

from __future__ import annotations

import pytest
import torch

from spectra.pairing.pairs import pair_layers
from spectra.repairs.insertion import carried_beside
from spectra.runs.run import open_run
from spectra.runs.settings import checked_settings
from tests.support.peft_folders import state
from tests.support.peft_methods import METHODS, write
from tests.support.seeds import each_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peft's remarks on what is asked of it
    pytest.mark.usefixtures("every_factor_of_boft"),
]


@each_seed([0, 3, 4, 7])
@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_put_into_a_model_is_the_merge(tmp_path, method, seed):
    model = write(tmp_path, method, seed)
    run = open_run(tmp_path / "adapter", tmp_path / "base", checked_settings())
    pairing = pair_layers(run.base, run.tuned, run.plan)
    carried = {item.base: item.read(run.base, run.tuned) for item in carried_beside(run, pairing)}
    expected = model.double().merge_and_unload().state_dict()
    before = state(tmp_path)
    changed = {name for name, value in expected.items() if value.ndim == 1 and not torch.equal(value, before[name])}
    assert {name for name in carried if name is not None and name.endswith("bias")} == changed
    for name in changed:
        assert torch.linalg.norm(carried[name].double() - expected[name]) <= 1e-6 * torch.linalg.norm(expected[name])
