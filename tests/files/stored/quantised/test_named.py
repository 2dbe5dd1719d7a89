"""Forms that are known by name alone."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support.quantised import AWQ, E4M3, FP8, GPTQ, I8, PACKED, U8, A, C, F, G, as_bytes, refused, words


@pytest.mark.parametrize(
    ("tensors", "settings", "reason"),
    [
        (G, None, "does not say which"),
        (G, {"quant_method": "auto-round"}, "auto-round"),
        (G, GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (G, GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        (G, GPTQ | {"bits": 5}, "bits = 5"),
        (G, GPTQ | {"bits": [4]}, "bits"),
        (G, GPTQ | {"group_size": "32"}, "group_size"),
        (A, AWQ | {"version": "gemv"}, "gemv"),
        (A, AWQ | {"version": ["gemm"]}, "gemm"),
        (A, AWQ | {"bits": 3}, "bits = 3"),
        (A, AWQ | {"zero_point": False}, "without zero points"),
        (A, AWQ | {"group_size": 0}, "group_size"),
        (C, None, "does not say of how many bits"),
        (C | {"m.weight_g_idx": words(64)}, PACKED, "weight_g_idx"),
        (F, None, "does not say the size of the blocks"),
        (F, {"quant_method": "fp8", "weight_block_size": "128"}, "does not say the size of the blocks"),
        (F | {"m.scale_weight": torch.ones(1)}, FP8, "scale_weight"),
        (F | {"m.weight_scale": torch.ones(1)}, FP8, "weight_scale"),
        ({"m.weight": torch.zeros(8, 8).to(E4M3), "m.weight_scale": torch.ones(8)}, FP8, "unclear side"),
        ({"m.weight": I8, "m.SCB": torch.ones(4), "m.weight_format": U8[0, 0] + 2}, None, "tiled"),
        ({"m.weight.quant_state.bitsandbytes__int4": as_bytes("{}")}, None, "int4"),
        ({"m.W_q": U8, "m.scale": torch.ones(4), "m.zero": torch.ones(4)}, {"quant_method": "hqq"}, "HQQ"),
        ({"m.codes": I8, "m.codebooks": torch.ones(1, 4)}, {"quant_method": "aqlm"}, "AQLM"),
        ({"m.Qidxs": I8}, None, "QuIP#"),
        ({"m.weight": I8, "m.weight_scales": torch.ones(8)}, {"quant_method": "eetq"}, "EETQ"),
        ({"m.weight._data": I8, "m.weight._scale": torch.ones(4, 1)}, None, "quanto"),
        ({"m.weight_qdata": I8, "m.weight_scale": torch.ones(4)}, {"quant_method": "torchao"}, "torchao"),
        (
            {"m.weight": U8, "m.weight_scale": torch.ones(4, 1).to(E4M3), "m.weight_scale_2": torch.ones(())},
            {"quant_method": "modelopt"},
            "NVFP4",
        ),
        (
            {"m.weight_packed": U8, "m.weight_scale": torch.ones(4).to(E4M3), "m.weight_global_scale": torch.ones(1)},
            {"quant_method": "compressed-tensors"},
            "four-bit floats|NVFP4",
        ),
        ({"m.weight": words(4, 8), "m.scales": torch.ones(4, 1), "m.biases": torch.ones(4, 1)}, None, "MLX"),
        ({"m.weight": U8, "m.weight_scale": torch.ones(1)}, {"quant_method": "bitnet"}, "bitnet"),
    ],
)  # fmt: skip
def test_forms_that_are_known_by_name_are_refused_by_it(opened, tensors, settings, reason):
    checkpoint = opened(tensors | {"m.bias": torch.zeros(4), "other": torch.zeros(3, 3)}, settings)
    assert re.search(reason, refused(checkpoint, "m.weight"))
    assert {"m.bias", "other"} <= set(checkpoint.weights)
