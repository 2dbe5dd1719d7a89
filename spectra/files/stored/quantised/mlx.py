"""What mlx and mlx-lm quantise: codes in words of 32 bits, dense along the inputs, with scales for groups of inputs.

=========  ===========================  ==================================  ======================
mode       ``weight`` (…, out, words)   ``scales`` (…, out, groups)         ``biases``
=========  ===========================  ==================================  ======================
affine     codes of 2 to 8 bits         floats: code · scale + bias         as the scales
mxfp4      four-bit floats (E2M1)       powers of two (E8M0), groups of 32  none
=========  ===========================  ==================================  ======================

The config says ``"quantization": {"group_size": 64, "bits": 4}`` for all modules, and may say otherwise for some, under
their names.  Source: mlx 0.32 ``mx.quantize``, ``mx.dequantize``; mlx-lm 0.32 ``utils.quantize_model``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spectra.files.derived import Derived, Make, Reader, Unreadable
from spectra.files.headers import TensorInfo
from spectra.files.stored.quantised.float8 import E2M1
from spectra.files.stored.quantised.packed import AT_ONCE, WORD, unpack
from spectra.files.stored.quantised.weights import SCALES, Quantised, expect, is_count

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4)}  # inputs in a group, bits


def mlx(checkpoint: Quantised) -> Iterator[Derived | Unreadable]:
    """A weight for each module whose weight is of words and has ``scales`` beside it."""
    for name, codes in checkpoint.weights.items():
        module = name.removesuffix(".weight")
        scales = checkpoint.get(f"{module}.scales")
        if module == name or codes.dtype != "U32" or len(codes.shape) < 2 or scales is None:
            continue
        made = _weight(checkpoint, module, codes, scales)
        if isinstance(made, str):
            yield checkpoint.refused(name, f"quantised (MLX): {made}", [name, *checkpoint.belonging(module, name)])
        else:
            yield made


def _weight(checkpoint: Quantised, module: str, codes: TensorInfo, scales: TensorInfo) -> Derived | str:
    said = _said(checkpoint.config, module)
    if said is None:
        return "config.json does not say how"
    mode = said.get("mode", "affine")
    if not isinstance(mode, str) or mode not in DEFAULTS:
        return f"the mode {str(mode)[:40]!r} is not read by this version"
    size, bits = (said.get(key, default) for key, default in zip(("group_size", "bits"), DEFAULTS[mode], strict=True))
    if (
        not is_count(size, 4096)
        or not is_count(bits)
        or bits not in BITS
        or (mode == "mxfp4" and (size, bits) != DEFAULTS[mode])
    ):
        return f"group_size = {str(size)[:40]} and bits = {str(bits)[:40]} are not read"
    columns = scales.shape[-1] * size if scales.shape else 0
    expect(codes, ("U32",), (*scales.shape[:-1], -(-columns * bits // WORD)))
    biases = None
    if mode == "affine":
        expect(scales, SCALES)
        biases = expect(checkpoint.partner(codes, f"{module}.biases"), SCALES, scales.shape)
    else:
        expect(scales, ("U8",))
    sources = [codes, scales, *([] if biases is None else [biases])]
    named = "mlx mxfp4" if mode == "mxfp4" else f"mlx {bits} bits"
    how = f"{named} in groups of {size}"
    return checkpoint.derived(
        codes.name, (*codes.shape[:-1], columns), sources, _made(codes, scales, biases, bits, size), how, named
    )


def _said(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What the config says of a module's quantisation; None where it says nothing."""
    said = config.get("quantization", config.get("quantization_config"))
    if not isinstance(said, Mapping):
        return None
    own = said.get(module)
    return {**said, **own} if isinstance(own, Mapping) else said if own in (None, True) else None


def _made(codes: TensorInfo, scales: TensorInfo, biases: TensorInfo | None, bits: int, size: int) -> Make:
    def make(read: Reader, rows: slice | None) -> Tensor:
        import torch

        stored, factors = read(codes.name, rows), read(scales.name, rows)
        shift = None if biases is None else read(biases.name, rows).float().flatten(0, -2)
        lead, groups = factors.shape[:-1], factors.shape[-1]
        words, factors = stored.flatten(0, -2), factors.flatten(0, -2)
        made = torch.empty((words.shape[0], groups, size), dtype=torch.float32)
        floats = torch.tensor(E2M1, dtype=torch.float32)
        step = max(AT_ONCE // max(groups * size, 1), 1)
        for begin in range(0, words.shape[0], step):
            part = slice(begin, begin + step)
            values = unpack(words[part], bits, groups * size).reshape(len(words[part]), groups, size)
            if shift is None:
                powers = factors[part].to(torch.int32) - 127
                made[part] = torch.ldexp(floats[values.int()], powers[..., None])
            else:
                made[part] = values * factors[part].float()[..., None] + shift[part][..., None]
        return made.reshape(*lead, groups * size)

    return make
