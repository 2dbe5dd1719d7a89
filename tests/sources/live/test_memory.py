"""What models in memory can hold, and what reading it costs."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import spectra
from spectra.errors import MissingFileError, UnsupportedMethodError
from spectra.sources.live import base_checkpoint_of
from tests.support.in_memory import Unchanged, adapted, but_for_where
from tests.support.paths import ROOT
from tests.support.peft_models import tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

LAZY = """
import sys, torch, spectra
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 10))
tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.state_dict().items()}
assert len(spectra.audit(tuned, base).layers) == 2
assert not {"peft", "transformers", "diffusers"} & set(sys.modules)
"""

# 24 weights of 4 MB on each side: what reading them takes at most is seen in the process's own high-water mark.
PEAK = """
import resource, sys, torch, spectra
torch.set_num_threads(1)
torch.manual_seed(0)
base = torch.nn.ModuleList([torch.nn.Linear(1024, 1024, bias=False) for _ in range(24)])
tuned = torch.nn.ModuleList([torch.nn.Linear(1024, 1024, bias=False) for _ in range(24)])
small = [torch.nn.ModuleList([torch.nn.Linear(1024, 1024, bias=False)]) for _ in range(2)]
spectra.audit(*small, engine="krylov")  # what the libraries take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = spectra.audit(tuned, base, engine="krylov", hash_contents=True)
assert len(report.layers) == 24
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_not_used_is_not_loaded():
    run(LAZY)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there")
def test_no_copy_of_the_weights_is_made():
    assert int(run(PEAK)) < 40e6  # of 201 MB


def test_what_is_read_is_the_model_itself():
    model = tiny_llama()
    checkpoint = spectra.checkpoint_of(model)
    own = {value.data_ptr() for value in model.parameters()}
    assert {checkpoint.load(name).data_ptr() for name in checkpoint.tensors} == own
    adapter = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    own = {value.data_ptr() for value in adapter.parameters()}
    for checkpoint in (spectra.checkpoint_of(adapter), base_checkpoint_of(adapter)):
        assert {checkpoint.read(name).data_ptr() for name in checkpoint.tensors} <= own
    model.model.embed_tokens.weight.data[3] = 7  # no snapshot: values are those at the time of reading
    assert bool((spectra.checkpoint_of(model).load("model.embed_tokens.weight")[3] == 7).all())


def test_nothing_of_a_model_outlives_the_audit():
    model = tiny_llama()
    kept = [value.detach().clone() for value in model.parameters()]
    report = spectra.audit({name: value + 0.1 for name, value in model.state_dict().items()}, model, top_k=2)
    assert report.layers
    references = sys.getrefcount(model)
    gc.collect()
    assert sys.getrefcount(model) == references
    assert all(torch.equal(one, other) for one, other in zip(kept, model.parameters(), strict=True))


def test_four_bits_in_memory():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    stored = nn.Sequential(
        bnb.nn.Linear4bit(64, 48, quant_type="nf4", compress_statistics=True), bnb.nn.Linear8bitLt(48, 64)
    )
    stored.load_state_dict(net.state_dict())
    stored = stored.to("cpu")
    weight: Any = stored[0].weight
    expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    before = Unchanged(stored)
    checkpoint = spectra.checkpoint_of(stored)
    read = checkpoint.load("0.weight")
    assert torch.allclose(read.double(), expected.double(), atol=1e-6)
    model = adapted(stored, peft.LoraConfig(r=2, target_modules=["0"]))
    found = spectra.audit(model, top_k=3)
    assert found.base["quantised"] == "nf4"
    assert [layer.status for layer in found.layers] == ["analysed"]
    assert before.model is stored


class Odd(torch.Tensor):
    """Stands for the tensors of other libraries, whose values are not in the tensor itself."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*args, **(kwargs or {}))


def test_tensors_of_other_libraries_are_refused_by_name():
    odd = torch.ones(4, 4).as_subclass(Odd)
    with pytest.raises(UnsupportedMethodError, match=r"'a.weight': a Odd, which is not read"):
        spectra.audit({"a.weight": odd}, {"a.weight": torch.ones(4, 4)})
    shared = torch.ones(0)
    shared.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(MissingFileError, match="shared out by ZeRO-3"):
        spectra.audit({"a.weight": shared}, {"a.weight": torch.ones(4, 4)})


def test_models_within_what_runs_them():
    torch.manual_seed(0)
    base, tuned = tiny_llama(), tiny_llama()
    expected = but_for_where(spectra.audit(tuned, base, top_k=2))
    wrappers: list[Any] = [nn.DataParallel, torch.compile]
    for wrap in wrappers:
        assert but_for_where(spectra.audit(wrap(tuned), wrap(base), top_k=2)) == expected


def test_single_modules_compiled_or_parametrised():
    torch.manual_seed(0)
    base, tuned = tiny_llama(), tiny_llama()
    expected = but_for_where(spectra.audit(tuned, base, top_k=2))
    compiled: Any = tuned
    compiled.model.layers[1].mlp = torch.compile(compiled.model.layers[1].mlp)
    assert but_for_where(spectra.audit(tuned, base, top_k=2)) == expected
    normed: Any = tiny_llama()
    torch.nn.utils.parametrizations.weight_norm(normed.model.layers[0].mlp.up_proj)
    report = spectra.audit(normed, base, top_k=2)
    assert "model.layers.0.mlp.up_proj" not in {layer.name for layer in report.layers}
    assert sum("parametrisation" in item["reason"] for item in report.skipped) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    torch.manual_seed(0)
    base, tuned = tiny_llama().cuda(), tiny_llama().cuda()
    before = [Unchanged(base), Unchanged(tuned)]
    one = spectra.audit(tuned, base, top_k=3, device="cuda")
    other = spectra.audit(tuned.state_dict(), base.state_dict(), top_k=3)
    for item in before:
        item.check()
    assert [layer.intruder_indices for layer in one.layers] == [layer.intruder_indices for layer in other.layers]
