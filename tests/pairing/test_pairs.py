"""Matching base and tuned, one to one, with everything accounted for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.adapters import plan_updates
from spectra.errors import AdapterError, UsageError, WrongBaseError
from spectra.files.checkpoint import open_checkpoint
from spectra.pairing.pairs import pair_layers
from tests.support.paths import FIXTURES, MEMBERS
from tests.support.problems import f32


def pairs_of(base, tuned, **options):
    opened = open_checkpoint(tuned)
    return pair_layers(open_checkpoint(base), opened, plan_updates(opened), **options)


def matches(base, tuned):
    return {pair.name: pair.base.name for pair in pairs_of(base, tuned).pairs}


@pytest.mark.parametrize("member", MEMBERS)
def test_every_tensor_is_analysed_or_skipped(member):
    tuned = open_checkpoint(FIXTURES / member)
    plan = plan_updates(tuned)
    used = [name for update in plan.updates for name in update.tensors]
    assert len(used) == len(set(used))
    skipped = {item.name for item in plan.skipped}
    assert set(used) | skipped == set(tuned.tensors)
    assert not set(used) & skipped
    pairing = pairs_of(FIXTURES / "base", FIXTURES / member)
    named = {pair.update.module for pair in pairing.pairs} | {item.name for item in pairing.skipped}
    assert {update.module for update in plan.updates} <= named


@pytest.mark.parametrize(
    ("base_prefix", "tuned_prefix"),
    [("", ""), ("", "bert."), ("bert.", ""), ("bert.", "roberta."), ("model.", "base_model."), ("", "a.b.c."),
     ("model.language_model.", "language_model.model."), ("language_model.model.", "model.language_model.")],
)  # fmt: skip
def test_prefixes_come_and_go(rng, make_base, make_adapter, base_prefix, tuned_prefix):
    names = [f"layer.{i}.{kind}" for i in range(3) for kind in ("q", "k")]
    base = make_base({f"{base_prefix}{name}.weight": f32(rng, 4, 4) for name in names})
    tuned = make_adapter({f"{tuned_prefix}{name}": (f32(rng, 4, 1), f32(rng, 1, 4)) for name in names})
    assert matches(base, tuned) == {f"{tuned_prefix}{name}": f"{base_prefix}{name}.weight" for name in names}


def test_what_no_prefix_explains_is_a_wrong_base(rng, make_base, make_adapter):
    base = make_base({"decoder.layer.0.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter({"encoder.layer.0.q": (f32(rng, 4, 1), f32(rng, 1, 4))})
    with pytest.raises(WrongBaseError, match=r"lora_A.*not in .*wrong base"):
        matches(base, tuned)


def test_two_candidates_are_an_error_that_shows_them(rng, make_base, make_adapter):
    base = make_base({f"{side}.layer.0.q.weight": f32(rng, 4, 4) for side in ("encoder", "decoder")})
    tuned = make_adapter({"layer.0.q": (f32(rng, 4, 1), f32(rng, 1, 4))})
    with pytest.raises(WrongBaseError, match=r"'decoder\.layer\.0\.q\.weight', 'encoder\.layer\.0\.q\.weight'"):
        matches(base, tuned)


def test_the_prefix_that_serves_most_decides(rng, make_base, make_adapter):
    tensors = {f"encoder.layer.{i}.q.weight": f32(rng, 4, 4) for i in range(3)}
    base = make_base(tensors | {"decoder.layer.0.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter({f"layer.{i}.q": (f32(rng, 4, 1), f32(rng, 1, 4)) for i in range(3)})
    assert matches(base, tuned) == {f"layer.{i}.q": f"encoder.layer.{i}.q.weight" for i in range(3)}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("layers", "language", "found"), [(4, 3, False), (4, 4, False), (4, 5, False), (7, 7, True)])
def test_a_tower_is_not_taken_for_the_language_model(rng, make_base, make_adapter, whole, layers, language, found):
    """It may well have more of the layers that were tuned in another model than the language model has."""
    base = {f"language_model.model.layers.{i}.self_attn.q_proj.weight": f32(rng, 16, 16) for i in range(language)}
    base |= {f"vision_tower.layers.{i}.self_attn.q_proj.weight": f32(rng, 16, 16) for i in range(6)}
    modules = [f"layers.{i}.self_attn.q_proj" for i in range(layers)]
    if whole:
        tuned = make_base({f"{module}.weight": f32(rng, 16, 16) for module in modules}, "tuned")
    else:
        tuned = make_adapter({module: (f32(rng, 16, 2), f32(rng, 2, 16)) for module in modules})
    base = make_base(base)
    if found:
        assert matches(base, tuned) == {module: f"language_model.model.{module}.weight" for module in modules}
        return
    with pytest.raises(WrongBaseError) as error:
        matches(base, tuned)
    if not whole or layers > language:  # whole models of which each could be two are not in the base at all
        assert "could be any of 'language_model.model.layers.0" in str(error.value)
        assert "'vision_tower.layers.0" in str(error.value)


def test_shapes_tell_candidates_apart(rng, make_base, make_adapter):
    base = make_base({"encoder.layer.0.q.weight": f32(rng, 4, 4), "decoder.layer.0.q.weight": f32(rng, 6, 4)})
    tuned = make_adapter({"layer.0.q": (f32(rng, 6, 1), f32(rng, 1, 4))})
    assert matches(base, tuned) == {"layer.0.q": "decoder.layer.0.q.weight"}


def test_adapter_of_another_size_is_a_wrong_base(rng, make_base, make_adapter):
    base = make_base({"layer.0.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter({"layer.0.q": (f32(rng, 8, 1), f32(rng, 1, 8))})
    with pytest.raises(WrongBaseError, match=r"shape \[8, 8\].*shape \[4, 4\].*wrong base"):
        matches(base, tuned)


def test_full_checkpoint_of_another_size_is_a_wrong_base(rng, make_base):
    base = make_base({"layer.0.q.weight": f32(rng, 4, 4), "layer.1.q.weight": f32(rng, 4, 4)})
    other = make_base({"layer.0.q.weight": f32(rng, 4, 4), "layer.1.q.weight": f32(rng, 5, 4)}, "tuned")
    with pytest.raises(WrongBaseError, match=r"layer\.1\.q\.weight.*\[5, 4\].*\[4, 4\]"):
        matches(base, other)


def test_a_checkpoint_with_nothing_in_common_is_a_wrong_base(rng, make_base):
    base = make_base({"layer.0.q.weight": f32(rng, 4, 4)})
    other = make_base({"block.7.mixer.weight": f32(rng, 4, 4)}, "tuned")
    with pytest.raises(WrongBaseError, match="only 0 of its 1 matrices"):
        matches(base, other)


def test_full_checkpoint_accounts_for_both_sides(rng, make_base):
    shared = {"layer.0.q.weight": f32(rng, 4, 4), "norm.weight": f32(rng, 4)}
    base = make_base(shared | {"cls.predictions.weight": f32(rng, 9, 4), "steps": torch.zeros(2, 2, dtype=torch.int64)})
    tuned = make_base(shared | {"classifier.weight": f32(rng, 2, 4), "steps": torch.ones(2, 2, dtype=torch.int64)}, "t")
    pairing = pairs_of(base, tuned)
    assert [pair.name for pair in pairing.pairs] == ["layer.0.q"]
    reasons = {item.name: item.reason for item in pairing.skipped}
    assert set(reasons) == {"norm.weight", "cls.predictions", "classifier", "steps"}
    assert "new module" in reasons["classifier"]
    assert "only in the base" in reasons["cls.predictions"]
    assert "I64" in reasons["steps"]


def test_resized_vocabulary_compares_the_shared_rows(rng, make_base):
    words = f32(rng, 30, 8)
    base = make_base({"embed_tokens.weight": words, "layer.0.q.weight": f32(rng, 8, 8)})
    more = np.concatenate([words + 0.1 * f32(rng, 30, 8), f32(rng, 5, 8)])
    tuned = make_base({"embed_tokens.weight": more, "layer.0.q.weight": f32(rng, 8, 8)}, "tuned")
    report = spectra.audit(tuned, base)
    layer = next(layer for layer in report.layers if layer.role == "embedding")
    assert layer.shape == (8, 30)
    assert "from 30 to 35 rows" in layer.notes[0]
    expected = spectra.find_intruders(words.T, more[:30].T)
    assert [v.max_cosine for v in layer.vectors] == pytest.approx([v.max_cosine for v in expected.vectors], abs=1e-5)


def test_replaced_head_is_skipped(rng, make_base):
    q = f32(rng, 8, 8)
    base = make_base({"classifier.weight": f32(rng, 2, 8), "layer.0.q.weight": q})
    tuned = make_base({"classifier.weight": f32(rng, 5, 8), "layer.0.q.weight": q}, "tuned")
    assert any("replaced head" in item.reason for item in pairs_of(base, tuned).skipped)


def test_modules_to_save_is_a_dense_update_or_a_new_module(rng, make_base, make_adapter):
    base = make_base({"layer.0.q.weight": f32(rng, 8, 8), "dense.weight": f32(rng, 8, 8)})
    extra = {
        "base_model.model.dense.modules_to_save.default.weight": f32(rng, 8, 8),
        "base_model.model.dense.original_module.weight": f32(rng, 8, 8),
        "base_model.model.classifier.weight": f32(rng, 2, 8),
        "base_model.model.classifier.bias": f32(rng, 2),
    }
    tuned = make_adapter({"layer.0.q": (f32(rng, 8, 1), f32(rng, 1, 8))}, extra=extra)
    pairing = pairs_of(base, tuned)
    assert {pair.name: pair.update.kind for pair in pairing.pairs} == {"layer.0.q": "low_rank", "dense": "dense"}
    assert len(pairing.skipped) == 3


def test_two_tensors_for_one_base_weight(rng, make_base):
    weight = f32(rng, 4, 4)
    base = make_base({"layer.0.q.weight": weight})
    tuned = make_base({"bert.layer.0.q.weight": weight, "model.layer.0.q.weight": weight + 1}, "tuned")
    with pytest.raises(WrongBaseError, match="both match"):
        matches(base, tuned)


def test_square_transposed_weight_that_nothing_tells_about(rng, make_base, make_adapter):
    base = make_base({"layer.0.c_proj.weight": f32(rng, 4, 4)})
    tuned = make_adapter({"layer.0.c_proj": (f32(rng, 4, 1), f32(rng, 1, 4))}, fan_in_fan_out=True)
    with pytest.raises(AdapterError, match=r"fan_in_fan_out.*config\.json"):
        matches(base, tuned)


@pytest.mark.parametrize("family", ["vision-encoder-decoder", None])
def test_biases_show_transposed_weights_in_any_family(rng, make_base, make_adapter, family):
    tensors = {
        "decoder.h.0.c_attn.weight": f32(rng, 4, 12),
        "decoder.h.0.c_attn.bias": f32(rng, 12),
        "decoder.h.0.c_proj.weight": f32(rng, 4, 4),
    }
    base = make_base(tensors, config={"model_type": family} if family else None)
    B, A = f32(rng, 4, 1), f32(rng, 1, 4)
    pair = pairs_of(base, make_adapter({"decoder.h.0.c_proj": (B, A)})).pairs[0]
    assert pair.layout == "conv1d"


def test_biases_show_plain_weights_in_a_family_of_transposed_ones(rng, make_base, make_adapter):
    tensors = {
        "h.0.c_attn.weight": f32(rng, 12, 4),
        "h.0.c_attn.bias": f32(rng, 12),
        "h.0.c_proj.weight": f32(rng, 4, 4),
    }
    base = make_base(tensors, config={"model_type": "gpt2"})
    pair = pairs_of(base, make_adapter({"h.0.c_proj": (f32(rng, 4, 1), f32(rng, 1, 4))})).pairs[0]
    assert pair.layout == "linear"


@pytest.mark.parametrize("name", ["proj.weight", "dense.weight", "q.weight"])
def test_a_new_head_is_not_taken_for_another_module(rng, make_base, name):
    layers = {f"bert.layer.{i}.{kind}.weight": f32(rng, 6, 6) for i in range(2) for kind in ("q", "dense")}
    base = make_base(layers | {"bert.pooler.proj.weight": f32(rng, 6, 6)})
    tuned = make_base({key: value + 1 for key, value in layers.items()} | {name: f32(rng, 6, 6)}, "tuned")
    pairing = pairs_of(base, tuned)
    assert {pair.base.name for pair in pairing.pairs} == set(layers)
    reasons = {item.name: item.reason for item in pairing.skipped}
    assert reasons[name.removesuffix(".weight")] == "the base has no weight of this name"
    assert "only in the base" in reasons["bert.pooler.proj"]


def test_what_is_left_out_is_not_said_to_be_missing(rng, make_base):
    layers = {f"layer.{i}.q.weight": f32(rng, 6, 6) for i in range(3)}
    base = make_base({f"bert.{key}": value for key, value in layers.items()})
    pairing = pairs_of(base, make_base(layers, "tuned"), include=["layer.1"])
    assert sorted(item.name for item in pairing.skipped) == ["layer.0.q", "layer.2.q"]


def test_top_level_parameters_match_across_prefixes(rng, make_base):
    base = make_base({"bert.pos_table": f32(rng, 6, 6), "bert.layer.0.q.weight": f32(rng, 6, 6)})
    tuned = make_base({"pos_table": f32(rng, 6, 6), "layer.0.q.weight": f32(rng, 6, 6)}, "tuned")
    assert set(matches(base, tuned).values()) == {"bert.pos_table", "bert.layer.0.q.weight"}


def test_lora_on_a_resized_vocabulary(rng, make_base, make_adapter):
    words = f32(rng, 50, 8)
    base = make_base({"embed_tokens.weight": words})
    A, B = f32(rng, 2, 52), f32(rng, 8, 2)
    prefix = "base_model.model.embed_tokens.lora_embedding_"
    tuned = make_adapter({}, extra={f"{prefix}A": A, f"{prefix}B": B}, r=2)
    layer = spectra.audit(tuned, base).layers[0]
    assert "from 50 to 52 rows" in layer.notes[0]
    expected = spectra.find_intruders(words.T, B=B, A=A[:, :50])
    assert layer.intruder_indices == expected.intruders
    assert layer.vectors[0].sigma == pytest.approx(expected.vectors[0].sigma)


def test_the_copy_of_a_resized_embedding_is_compared_by_the_shared_rows(rng, make_base, make_adapter):
    words = f32(rng, 50, 8)
    base = make_base({"embed_tokens.weight": words})
    prefix = "base_model.model.embed_tokens."
    factors = {f"{prefix}lora_embedding_A": f32(rng, 2, 52), f"{prefix}lora_embedding_B": f32(rng, 8, 2)}
    for copy, flags in ((words, ()), (f32(rng, 50, 8), ("base_copy_differs",))):
        rows = np.concatenate([copy, f32(rng, 2, 8)])
        tuned = make_adapter({}, extra={**factors, f"{prefix}base_layer.weight": rows}, r=2)
        assert spectra.audit(tuned, base).layers[0].flags == flags


def test_embedding_factors_for_a_vector(rng, make_base, make_adapter):
    base = make_base({"embed_tokens.weight": f32(rng, 8)})
    extra = {
        f"base_model.model.embed_tokens.lora_embedding_{x}": f32(rng, *s) for x, s in (("A", (1, 8)), ("B", (8, 1)))
    }
    with pytest.raises(WrongBaseError, match="does not fit"):
        spectra.audit(make_adapter({}, extra=extra), base)


def test_kernels_that_differ(rng, make_base, make_adapter):
    base = make_base({"conv.weight": f32(rng, 6, 6, 6, 1)})
    tuned = make_adapter({"conv": (f32(rng, 6, 1, 1, 1), f32(rng, 1, 6, 3, 2))})
    with pytest.raises(WrongBaseError, match="does not fit"):
        spectra.audit(tuned, base)


def test_packed_bases_are_skipped_by_name(rng, make_base, make_adapter):
    base = make_base(
        {"model.layer.0.q.qweight": torch.zeros(4, 4, dtype=torch.int32), "model.layer.1.q.weight": f32(rng, 4, 4)}
    )
    tuned = make_adapter({f"layer.{i}.q": (f32(rng, 4, 1), f32(rng, 1, 4)) for i in range(2)})
    assert "GPTQ" in pairs_of(base, tuned).skipped[0].reason


def test_grouped_convolution_is_skipped_with_its_reason(rng, make_base, make_adapter):
    base = make_base({"conv.weight": f32(rng, 8, 2, 3, 3), "layer.0.q.weight": f32(rng, 4, 4)})
    modules = {"conv": (f32(rng, 8, 1, 1, 1), f32(rng, 1, 4, 3, 3)), "layer.0.q": (f32(rng, 4, 1), f32(rng, 1, 4))}
    pairing = pairs_of(base, make_adapter(modules))
    assert [pair.name for pair in pairing.pairs] == ["layer.0.q"]
    assert "2 groups" in pairing.skipped[0].reason


def test_quantised_base_is_skipped_with_its_reason(rng, make_base, make_adapter):
    base = make_base({"layer.0.q.weight": torch.zeros(4, 4, dtype=torch.uint8), "layer.1.q.weight": f32(rng, 4, 4)})
    tuned = make_adapter({f"layer.{i}.q": (f32(rng, 4, 1), f32(rng, 1, 4)) for i in range(2)})
    pairing = pairs_of(base, tuned)
    assert [pair.name for pair in pairing.pairs] == ["layer.1.q"]
    assert "U8" in pairing.skipped[0].reason


def test_include_and_exclude(rng, make_base, make_adapter):
    names = [f"layer.{i}.{kind}_proj" for i in range(12) for kind in "qkv"]
    base = make_base({f"{name}.weight": f32(rng, 4, 4) for name in names})
    tuned = make_adapter({name: (f32(rng, 4, 1), f32(rng, 1, 4)) for name in names})
    chosen = pairs_of(base, tuned, include=["layer.*.q_proj", "k_proj"], exclude=["layer.1*"])
    expected = [f"layer.{i}.{kind}_proj" for i in (0, *range(2, 10)) for kind in "kq"]
    assert [pair.name for pair in chosen.pairs] == expected
    assert len(chosen.pairs) + len(chosen.skipped) == len(names)
    with pytest.raises(UsageError, match="nothing to analyse"):
        spectra.audit(tuned, base, include=["nothing like it"])


def test_a_config_written_by_peft_has_only_known_fields():
    config = json.loads((FIXTURES / "lora-r4" / "adapter_config.json").read_text())
    assert config["peft_version"]
    assert plan_updates(open_checkpoint(FIXTURES / "lora-r4")).facts["rank"] == 4


def test_three_dimensions_are_not_flattened_unless_they_are_a_convolutions(rng, make_base):
    """JetMoe's stacks are cut into experts; others of which nothing is known are skipped, not flattened."""
    tensors = {
        "model.layers.0.mlp.input_linear.weight": f32(rng, 4, 32, 16),
        "model.layers.0.mlp.output_linear.weight": f32(rng, 4, 16, 16),
        "model.layers.0.self_attention.experts.input_linear.weight": f32(rng, 4, 24, 16),
        "model.layers.0.self_attention.experts.output_linear.weight": f32(rng, 4, 16, 24),
        "decoder.layers.0.gating.weight": f32(rng, 3, 8, 5),
        "encoder.conv.weight": f32(rng, 6, 4, 3),
    }
    config = {"model_type": "jetmoe", "hidden_size": 16}
    base = make_base(tensors, config=config)
    tuned = make_base({name: value + f32(rng, *value.shape) for name, value in tensors.items()}, "tuned", config)
    pairing = pairs_of(base, tuned)
    shapes = {pair.name: pair.shape for pair in pairing.pairs}
    assert shapes.pop("encoder.conv") == (6, 12)
    at = "model.layers.0"
    for index in range(4):
        assert shapes.pop(f"{at}.mlp.experts.{index}.gate_up_proj") == (32, 16)
        assert shapes.pop(f"{at}.mlp.experts.{index}.down_proj") == (16, 16)
        assert shapes.pop(f"{at}.self_attention.experts.{index}.input_linear") == (24, 16)
        assert shapes.pop(f"{at}.self_attention.experts.{index}.output_linear") == (16, 24)
    assert not shapes
    (skipped,) = pairing.skipped
    assert skipped.name == "decoder.layers.0.gating.weight"
    assert "no convolution by name, kernel or bias" in skipped.reason
