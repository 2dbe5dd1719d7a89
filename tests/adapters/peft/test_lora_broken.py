"""LoRAs that are broken, one error each."""

from __future__ import annotations

import numpy as np
import pytest

import spectra
from spectra.errors import AdapterError, UnsupportedMethodError
from tests.support.problems import f32


def corrupt(change):
    """(modules, config) of an adapter after a change."""
    rng = np.random.default_rng(0)
    modules = {"layer.0.q": (f32(rng, 4, 2), f32(rng, 2, 4))}
    extra: dict = {}
    config: dict = {}
    change(modules, extra, config)
    return modules, extra, config


BROKEN = {
    "r differs from the factors": (lambda m, e, c: c.update(r=3), AdapterError, "r = 3"),
    "pattern gives another r": (lambda m, e, c: c.update(rank_pattern={"q": 1}), AdapterError, "r = 1"),
    "r of zero": (lambda m, e, c: c.update(r=0), AdapterError, "at least 1"),
    "r is no number": (lambda m, e, c: c.update(r="two"), AdapterError, "expected a number"),
    "alpha is no number": (lambda m, e, c: c.update(lora_alpha=float("nan")), AdapterError, "expected a number"),
    "pattern is no number": (lambda m, e, c: c.update(alpha_pattern={"q": "x"}), AdapterError, "expected a number"),
    "pattern is no expression": (lambda m, e, c: c.update(rank_pattern={"(": 2}), AdapterError, "regular expression"),
    "pattern that recurses": (lambda m, e, c: c.update(rank_pattern={"(?R)": 2}), AdapterError, "too elaborate"),
    "pattern that unrolls": (
        lambda m, e, c: c.update(rank_pattern={"(?:(?:a{1000}){1000}){1000}": 2}), AdapterError, "too elaborate"),
    "r is a fraction": (lambda m, e, c: c.update(r=2.5), AdapterError, r"r = 2\.5"),
    "r beyond all bounds": (lambda m, e, c: c.update(r=10**400), AdapterError, "expected a number"),
    "switch is no switch": (lambda m, e, c: c.update(use_rslora="false"), AdapterError, "expected true or false"),
    "method is a list": (lambda m, e, c: c.update(peft_type=["LORA"]), AdapterError, "expected a name"),
    "trainable tokens inside": (
        lambda m, e, c: e.update({"base_model.model.emb.token_adapter.trainable_tokens_delta": np.ones((2, 4), "f4")}),
        AdapterError, "expected the indices"),
    "factor of another method inside": (
        lambda m, e, c: e.update({"base_model.model.layer.0.q.ia3_l": np.ones((4, 1), "f4")}),
        UnsupportedMethodError, "IA3"),
    "pattern that never ends": (
        lambda m, e, c: (m.update({"a" * 60 + "q": m.pop("layer.0.q")}), c.update(rank_pattern={"(a|aa)+": 2})),
        AdapterError, "too long"),
    "partner missing": (
        lambda m, e, c: (m.clear(), e.update({"base_model.model.layer.0.q.lora_A.weight": np.ones((2, 4), "f4")})),
        AdapterError, "lora_B is missing"),
    "second adapter": (
        lambda m, e, c: e.update({"base_model.model.layer.0.q.lora_A.other.weight": np.ones((2, 4), "f4")}),
        AdapterError, "several adapters"),
    "integer factor": (
        lambda m, e, c: m.update({"layer.0.q": (np.ones((4, 2), "i4"), np.ones((2, 4), "f4"))}), AdapterError, "I32"),
    "flat factor": (
        lambda m, e, c: m.update({"layer.0.q": (np.ones((4, 2), "f4"), np.ones(8, "f4"))}), AdapterError, "matrix"),
    "dora without magnitudes": (lambda m, e, c: c.update(use_dora=True), AdapterError, "lora_magnitude_vector"),
    "magnitudes without dora": (
        lambda m, e, c: e.update({"base_model.model.layer.0.q.lora_magnitude_vector": np.ones(4, "f4")}),
        AdapterError, "use_dora is false"),
    "unknown option": (lambda m, e, c: c.update(use_qalora=True), UnsupportedMethodError, "use_qalora"),
    "option from the future": (lambda m, e, c: c.update(sparkle={"on": 1}), UnsupportedMethodError, "sparkle"),
    "randomised pissa": (
        lambda m, e, c: c.update(init_lora_weights="pissa_niter_4"), UnsupportedMethodError, "niter.*--initial-adapter",
    ),
    "no method": (lambda m, e, c: c.update(peft_type=None), UnsupportedMethodError, "no peft_type"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapters(rng, make_base, make_adapter, kind):
    change, error, words = BROKEN[kind]
    modules, extra, config = corrupt(change)
    config = {"r": 2} | config
    base = make_base({"layer.0.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter(modules, extra=extra, **config)
    with pytest.raises(error, match=words) as caught:
        spectra.audit(tuned, base)
    assert "adapter" in str(caught.value)


def test_conditional_adapters_say_so(rng, make_base, make_adapter):
    base = make_base({"layer.0.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter({"layer.0.q": (f32(rng, 4, 1), f32(rng, 1, 4))}, alora_invocation_tokens=[1, 2])
    assert spectra.audit(tuned, base).tuned["conditional"] is True
