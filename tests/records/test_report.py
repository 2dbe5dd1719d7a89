"""What a report says of a module's name."""

from __future__ import annotations

from spectra.records.report import module_type


def test_module_types():
    assert module_type("encoder.layer.3.attention.self.query") == "attention.self.query"
    assert module_type("model.layers.11.mlp.up_proj") == "mlp.up_proj"
    assert module_type("pooler.dense") == "pooler.dense"
    assert module_type("blocks.3") == "blocks.3"
    assert module_type("unet.down_blocks.0.transformer_blocks.1.attn1.to_out.0") == "attn1.to_out.0"
    assert module_type("transformer_blocks.1.ff.net.2") == "ff.net.2"
    assert module_type("model.layers.3.mlp.experts.5.down_proj") == "mlp.experts.down_proj"
    assert module_type("model.layers.3.mlp.experts.5") == "mlp.experts"
