"""Quantised weights of every form: turned back, refused where they do not fit, audited as the matrices they mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectra
from spectra.cli import main
from spectra.errors import CorruptFileError
from spectra.files.derived import Unreadable
from spectra.files.headers import BITS, TensorInfo
from spectra.files.stored.quantised import quantised
from tests.support.paths import FIXTURES
from tests.support.quantised import (
    AWQ,
    E4M3,
    FP8,
    GPTQ,
    I8,
    PACKED,
    STATE,
    U8,
    A,
    C,
    F,
    G,
    check,
    draw,
    four,
    gptq,
    of_bitsandbytes,
    words,
)


@pytest.mark.parametrize("method", ["bnb", "gptq"])
def test_gpt2s_projections_are_turned_back(opened, make_base, rng, method):
    """transformers turns a Conv1D before it quantises it; the square one must not be taken for what it is not."""
    shape = (64, 64)
    weight = draw(rng, *shape)
    name = "transformer.h.0.attn.c_proj"
    if method == "bnb":
        bnb = pytest.importorskip("bitsandbytes")
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
        stored = {f"{name}.weight": packed}
        stored |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected, settings = of_bitsandbytes(packed, state), None
    else:
        stored, expected = gptq(rng, *shape, bits=4, size=16, act_order=False)
        stored = {f"{name}.{key}": value for key, value in stored.items()}
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    checkpoint = opened(stored | {f"{name}.bias": torch.zeros(64)}, settings, model_type="gpt2")
    check(checkpoint, f"{name}.weight", expected.T, "nf4" if method == "bnb" else "gptq")


def changed(tensors, **changes):
    """The tensors with some others; those that are None left out."""
    made = tensors | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "settings", "tensor", "says"),
    [
        (changed(F, m__weight_scale_inv=torch.ones(3, 3)), FP8, "m.weight_scale_inv", "does not fit"),
        (changed(F, m__weight_scale_inv=words(2, 3)), FP8, "m.weight_scale_inv", "expected F32"),
        ({"m.weight": torch.zeros(4).to(E4M3), "m.weight_scale": torch.ones(2)}, FP8, "m.weight_scale", "vector"),
        (changed(G, m__scales=None), GPTQ, "m.qweight", "is missing: 'm.scales'"),
        (changed(G, m__qzeros=None), GPTQ, "m.qweight", "is missing: 'm.qzeros'"),
        (changed(G, m__scales=torch.ones(3, 32)), GPTQ, "m.scales", r"\[3, 32\]; expected .* \[2, 32\]"),
        (changed(G, m__qzeros=words(2, 5)), GPTQ, "m.qzeros", r"expected I32 of shape \[2, 4\]"),
        (changed(G, m__qweight=words(8, 32).float()), GPTQ, "m.qweight", "expected I32"),
        (changed(G, m__qweight=words(8)), GPTQ, "m.qweight", "expected a matrix"),
        (changed(G, m__g_idx=words(63)[:50]), GPTQ, "m.g_idx", "8 words"),
        (changed(A, m__qzeros=words(2, 3)), AWQ, "m.qzeros", "expected"),
        (changed(A, m__scales=torch.ones(2, 31)), AWQ, "m.scales", "expected"),
        (changed(C, m__weight_packed=words(32, 9)), PACKED, "m.weight_packed", "no group"),
        (changed(C, m__weight_scale=torch.ones(32, 3)), PACKED, "m.weight_packed", "no group"),
        (changed(C, m__weight_shape=torch.tensor([31, 64])), PACKED, "m.weight_packed", r"says \[31, 64\]"),
        (changed(C, m__weight_shape=torch.tensor([32, -64])), PACKED, "m.weight_packed", "says"),
        (changed(C, m__weight_shape=None), PACKED, "m.weight_packed", "is missing"),
        (changed(C, m__weight_zero_point=words(4, 2)), PACKED, "m.weight_packed", "no group"),
        (changed(G, m__weight=torch.ones(32, 64)), GPTQ, "m.weight", "as such and, quantised, as 'm.qweight'"),
        ({"m.SCB": torch.ones(4)}, None, "m.SCB", "is missing: 'm.weight'"),
        ({"m.weight": I8, "m.SCB": torch.ones(5)}, None, "m.SCB", "expected F32"),
        ({"m.weight": words(4, 8), "m.SCB": torch.ones(4)}, None, "m.weight", "expected I8"),
        ({"e.x_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8)}, None, "e.x_blocks", "is missing"),
        (
            {"e.x_blocks": torch.zeros(2, 3, 4, 8, dtype=torch.uint8), "e.x_scales": torch.zeros(2, 3, 4).byte()},
            None,
            "e.x_blocks",
            "expected U8",
        ),
        (
            {"e.x_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8), "e.x_scales": torch.zeros(2, 3, 5).byte()},
            None,
            "e.x_scales",
            "expected U8",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_file_and_tensor(opened, tensors, settings, tensor, says):
    with pytest.raises(CorruptFileError, match=says) as caught:
        opened(tensors, settings).weights  # noqa: B018
    assert caught.value.tensor == tensor
    assert caught.value.path.name == "model.safetensors"


def test_contents_that_do_not_fit(opened, rng):
    """What only the values show is found when they are read, and named as well."""
    other = four(rng) | {"m.weight.quant_map": torch.linspace(-1, 1, 16)}
    with pytest.raises(CorruptFileError, match=r"m\.weight\.quant_map.*not the 16 values of nf4"):
        opened(other, folder="map").load("m.weight")
    index = torch.full((64,), 2, dtype=torch.int32)
    with pytest.raises(CorruptFileError, match=r"m\.g_idx.*beyond the 2"):
        opened(G | {"m.g_idx": index}, GPTQ, folder="index").load("m.weight")


# Whole runs


@pytest.mark.parametrize("form", ["nf4", "fp8", "gptq"])
def test_an_audit_on_a_quantised_base_is_that_on_the_matrices_it_means(opened, make_adapter, rng, form):
    name = "model.layers.0.self_attn.q_proj"
    settings: dict[str, object] | None = None
    if form == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        packed, state = bnb.functional.quantize_4bit(draw(rng, 96, 64), blocksize=64, quant_type="nf4")
        stored = {f"{name}.weight": packed}
        stored |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected = of_bitsandbytes(packed, state)
    elif form == "fp8":
        stored = {f"{name}.weight": draw(rng, 96, 64).to(E4M3), f"{name}.weight_scale": torch.tensor(0.25)}
        expected, settings = stored[f"{name}.weight"].float() * 0.25, {"quant_method": "compressed-tensors"}
    else:
        made, expected = gptq(rng, 96, 64, bits=4, size=32, act_order=True)
        stored = {f"{name}.{key}": value for key, value in made.items()}
        settings = GPTQ | {"desc_act": True}
    base = opened(stored, settings, model_type="llama")
    plain = opened({f"{name}.weight": expected.float()}, folder="plain", model_type="llama")
    adapter = make_adapter({name: (3 * draw(rng, 96, 4).numpy(), draw(rng, 4, 64).numpy())}, r=4)
    one, other = (spectra.audit(adapter, base=place.path, top_k=5).to_dict(canonical=True) for place in (base, plain))
    assert (one["base_quantised"], one["base"]["quantised"]) == (True, form)
    assert (other["base_quantised"], other["base"]["quantised"]) == (False, None)
    (mine,), (theirs,) = one["layers"], other["layers"]
    assert mine.pop("stored_shape") == theirs.pop("stored_shape")
    assert mine["intruders"] > 0
    assert [note for note in mine.pop("notes") if form in note.lower()]
    del theirs["notes"]
    assert mine == theirs
    assert one["summary"] == other["summary"]


def test_a_layer_whose_base_is_not_read_is_skipped_with_the_reason(opened, make_adapter, rng):
    tensors = {"a.W_q": U8, "a.scale": torch.ones(4), "a.zero": torch.ones(4), "b.weight": draw(rng, 12, 10)}
    base = opened(tensors, {"quant_method": "hqq"})
    modules = {name: (draw(rng, 12, 2).numpy(), draw(rng, 2, 10).numpy()) for name in ("a", "b")}
    report = spectra.audit(make_adapter(modules, r=2), base=base.path)
    assert [layer.name for layer in report.layers] == ["b"]
    assert [(item["name"], "HQQ" in item["reason"]) for item in report.skipped] == [("a", True)]


@pytest.mark.parametrize("command", [["audit"], ["inspect"]])
def test_a_broken_one_ends_in_one_line(opened, make_adapter, rng, capsys, command):
    base = opened(four(rng, blocksize=63))
    adapter = make_adapter({"m": (draw(rng, 8, 2).numpy(), draw(rng, 2, 32).numpy())}, r=2)
    paths = [str(adapter), "--base", str(base.path)] if command == ["audit"] else [str(base.path)]
    assert main([*command, *paths]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert STATE in error
    assert "Traceback" not in error


SUFFIXES = (
    "weight", "weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "qweight",
    "qzeros", "scales", "g_idx", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "W_q", "scale", "bias",
    "weight.quant_state.bitsandbytes__nf4", "x_blocks", "x_scales", "weight_scale_2", "weight_global_scale", "B",
    "s", "codebooks", "codes", "weight_scales", "biases", "input_scale",
)  # fmt: skip
SMALL = st.integers(0, 40) | st.sampled_from([64, 128, 2**31, 2**62])
ANYTHING = st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=8) | st.just([128, 128])
METHODS = st.sampled_from(["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "GPTQ", ""]) | ANYTHING


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(SUFFIXES),
        st.tuples(st.sampled_from(["I32", "U8", "I8", "F32", "F16", "F8_E4M3", "I64"]), st.lists(SMALL, max_size=4)),
        min_size=1,
    ),
    st.fixed_dictionaries(
        {"quant_method": METHODS},
        optional={
            "bits": st.sampled_from([2, 3, 4, 8]) | ANYTHING,
            "group_size": st.sampled_from([-1, 32]) | ANYTHING,
            "weight_block_size": st.lists(ANYTHING | SMALL, max_size=3) | ANYTHING,
            "version": ANYTHING,
            "meta": ANYTHING,
            "config_groups": ANYTHING
            | st.dictionaries(
                st.text(max_size=2), ANYTHING | st.fixed_dictionaries({"weights": ANYTHING | st.dictionaries(
                    st.sampled_from(["num_bits", "group_size", "strategy", "symmetric", "type"]), ANYTHING
                )})
            ),
        },
    )
    | ANYTHING,
)  # fmt: skip
def test_no_header_and_no_config_leads_to_any_other_error(stored, said):
    file = FIXTURES / "nothing.safetensors"
    tensors = {}
    for name, (dtype, shape) in stored.items():
        size = math.prod(shape) * BITS[dtype] // 8
        tensors[f"m.{name}"] = TensorInfo(f"m.{name}", dtype, tuple(shape), file, (8, size))
    made, named = [], set()
    try:
        made = list(quantised(tensors, {"quantization_config": said}))
    except CorruptFileError as error:
        named = {error.tensor}
    assert named <= set(tensors)
    used = [name for info in made for name in info.sources]
    assert len(used) == len(set(used))
    assert set(used) <= set(tensors)
    assert all(isinstance(info, Unreadable) or math.prod(info.shape) <= 64 * sum(
        tensors[name].span[1] for name in info.sources) for info in made)  # fmt: skip
