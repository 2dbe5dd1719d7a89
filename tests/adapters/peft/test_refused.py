"""Methods and options that are known by name and not read, each with the reason."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.adapters import plan_updates
from spectra.adapters.peft import itself
from spectra.adapters.peft.lora import KNOWN_FIELDS, OWN_FIELDS
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import open_checkpoint
from tests.support.paths import FIXTURES
from tests.support.problems import f32

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's remarks on what is asked of it


@pytest.mark.parametrize(
    ("method", "named"),
    [("BOFT", "BOFT"), ("FOURIERFT", "FourierFT"), ("HRA", "HRA"), ("RANDLORA", "RANDLORA"), ("FROD", "FROD")],
)
def test_methods_and_their_factors_are_named(rng, make_base, make_adapter, method, named):
    with pytest.raises(UnsupportedMethodError, match=named):
        spectra.audit(make_adapter({"q": (f32(rng, 4, 1), f32(rng, 1, 4))}, peft_type=method), FIXTURES / "base")


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_methods_that_change_no_weight_say_so(rng, make_base, make_adapter, method):
    with pytest.raises(UnsupportedMethodError, match=f"{method} changes no weight"):
        spectra.audit(make_adapter({"q": (f32(rng, 4, 1), f32(rng, 1, 4))}, peft_type=method), FIXTURES / "base")


READ = {"LORA", "ADALORA", "VERA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "TRAINABLE_TOKENS", *itself.METHODS}
PROMPTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
NOT_MERGED = {"POLY", "XLORA", "LILY", "SHADOW"}  # peft cannot merge them either


@pytest.mark.parametrize("method", sorted(one.value for one in peft.PeftType))
def test_every_method_is_read_or_named(tmp_path, method):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    save_file({"base_model.model.q.something": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    tuned = open_checkpoint(tmp_path)
    if method in READ:
        with pytest.raises(AdapterError) as caught:  # of factors there are none here
            plan_updates(tuned)
        assert ("holds no factor of" in str(caught.value)) == (method != "OFT")
        return
    with pytest.raises(UnsupportedMethodError, match=rf"adapter_config\.json.*{method}") as caught:
        plan_updates(tuned)
    said = {"changes no weight": PROMPTS, "depends on the input": NOT_MERGED, "a vector": {"LN_TUNING", "BEFT"}}
    for words, methods in said.items():
        assert (words in str(caught.value)) == (method in methods)


# What LoRA's options come to; all others are neutral, or have tests of their own.
REFUSED = {
    "use_qalora": True, "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2}, "megatron_config": {"tensor_model_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_that_change_what_factors_mean_are_refused(make_adapter, option):
    folder = make_adapter({"q": (np.ones((4, 2)), np.ones((2, 4)))}, **{option: REFUSED[option]})
    with pytest.raises(UnsupportedMethodError, match=rf"{option}.*cannot be read by this version \("):
        plan_updates(open_checkpoint(folder))


def test_no_field_of_loras_config_is_unknown():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}  # which is not saved
    fields -= {"parameters_to_tie", "modules_to_tie", "target_modules_to_tie"}
    known = KNOWN_FIELDS | OWN_FIELDS | REFUSED.keys() | itself.VARIANTS.keys() | {"target_parameters"}
    assert fields == known & fields, fields - known
    assert known - fields <= {"auto_mapping", "peft_version"}
