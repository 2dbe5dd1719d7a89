"""What a tensor is: its role, and whether it is a convolution."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectra.files.headers import TensorInfo
from spectra.files.orientation import is_convolution, role_of


@pytest.mark.parametrize(
    ("name", "ndim", "role"),
    [
        ("bert.embeddings.word_embeddings", 2, "embedding"),
        ("model.embed_tokens", 2, "embedding"),
        ("transformer.wte", 2, "embedding"),
        ("shared", 2, "embedding"),
        ("lm_head", 2, "head"),
        ("classifier.dense", 2, "head"),
        ("cls.predictions.transform.dense", 2, "head"),
        ("score", 2, "head"),
        ("encoder.layer.3.attention.self.query", 2, "linear"),
        ("model.layers.3.mlp.up_proj", 2, "linear"),
        ("pooler.dense", 2, "linear"),
        ("electra.embeddings_project", 2, "linear"),
        ("encoder.embedding_hidden_mapping_in", 2, "linear"),
        ("model.layers.0.mlp.shared_expert_gate", 2, "linear"),
        ("bert.embeddings.token_type_embeddings", 2, "embedding"),
        ("embeddings.class_embedding", 2, "embedding"),
        ("vision.patch_conv", 4, "conv"),
    ],
)
def test_roles(name, ndim, role):
    assert role_of(name, ndim) == role


@pytest.mark.parametrize(
    ("name", "shape", "bias", "expected"),
    [
        ("conv1.weight", (8, 4, 40), False, True),
        ("visual.patch_embed.proj.weight", (8, 3, 2, 14, 14), False, True),
        ("vision_model.embeddings.patch_embedding.weight", (8, 3, 32, 32), False, True),
        ("layer1.0.downsample.0.weight", (8, 4, 1, 1), False, True),
        ("neck.0.weight", (8, 4, 3, 3), False, True),
        ("attn.to_q.weight", (8, 8, 1), False, True),
        ("resblocks.3.weight", (8, 4, 7), True, True),
        ("resblocks.3.weight", (8, 4, 7), False, False),
        ("depth_decoder.layers.0.fc1.weight", (8, 32, 16), False, False),  # Moshi's, one matrix a codebook
        ("experts_like.weight", (8, 32, 64), True, False),
        ("time_maa", (1, 1, 64), False, False),
        ("q.weight", (8, 4), True, False),
    ],
)
def test_what_is_a_convolution(name, shape, bias, expected):
    own = TensorInfo("bias", "F32", shape[:1], Path("x"), (0, 0)) if bias else None
    assert is_convolution(name, shape, own) is expected
