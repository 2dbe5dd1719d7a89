"""From a tensor as stored to the matrix that is analysed, ``(out_features, in_features)``.

What decides is the *layout* of the module a tensor belongs to:

=============  ======================  =========================================
layout         stored as               analysed as
=============  ======================  =========================================
``linear``     (out, in)               as it is
``conv1d``     (in, out), GPT-2's own  transposed
``embedding``  (V, d)                  transposed to (d, V): it maps tokens to d
``conv``       (out, in/groups, k…)    flattened to (out, in/groups · k…)
=============  ======================  =========================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from spectra.files.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["linear", "conv1d", "embedding", "conv"]
Role = Literal["linear", "embedding", "head", "conv"]

# Families whose transformers implementation stores its projections as (in, out).
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

_EMBEDDING = re.compile(
    r"embed(_in|_tokens|_positions|_scale)?|\w*embeddings?|wte|wpe|shared|(tokens|positions)_embed"
    r"|relative_attention_bias|(per_layer_token|token|position)_embd|token_types"  # the last are GGUF's
)
_HEAD = re.compile(
    r"^(lm_head|embed_out|output_projection|classifier|score|qa_outputs|seq_relationship|vocab_projector|logits)$"
)
# What convolutions are called, or what they are in.
_CONVOLUTION = re.compile(r"conv|patch|downsampl|upsampl|(^|\.)(ups|downs|to_rgb)\.")
LARGEST_KERNEL = 16  # in any dimension; larger ones are of patches, and named so
_HEAD_PARENTS = frozenset({"classifier", "cls", "predictions", "lm_head", "score"})
# The embedding that a head without a tensor of its own in the file shares its weight with.
TIED = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")


def role_of(module: str, ndim: int) -> Role:
    """What a module is, from its name: the paper counts no embeddings and no heads."""
    parts = module.split(".")
    if ndim > 2:
        return "conv"
    if module == "output" or _HEAD.match(parts[-1]) or _HEAD_PARENTS.intersection(parts[:-1]):
        return "head"
    return "embedding" if _EMBEDDING.fullmatch(parts[-1]) else "linear"


def matrix_shape(stored: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """The shape of :func:`as_matrix` of a tensor stored with this shape."""
    if layout == "conv":
        return stored[0], math.prod(stored[1:])
    rows, columns = stored
    return (rows, columns) if layout == "linear" else (columns, rows)


def as_matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """The stored tensor as the matrix that is analysed; a view where possible."""
    if layout == "conv":
        return tensor.flatten(1)
    return tensor if layout == "linear" else tensor.T


def as_stored(matrix: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The analysed matrix as a tensor is stored: what :func:`as_matrix` turns back into it."""
    return (matrix if layout in ("linear", "conv") else matrix.T).reshape(shape)


def is_convolution(name: str, shape: tuple[int, ...], bias: TensorInfo | None = None) -> bool:
    """Whether a tensor (out, in, k…) is a convolution's, rather than a stack of matrices or of other things.

    It is by its name; by its kernel where that is small in two or three dimensions, or is one; and by a small kernel in
    one dimension with a bias as long as its first.
    """
    if len(shape) < 3 or _CONVOLUTION.search(name):
        return len(shape) > 2
    kernel = shape[2:]
    if max(kernel) > LARGEST_KERNEL:
        return False
    return len(kernel) > 1 or kernel == (1,) or (bias is not None and bias.shape == shape[:1])


class Orientation:
    """Decides, from a base's headers and config, which of its modules are stored transposed.

    Only modules with the names that GPT-2's kind of Conv1D has are in question.  The biases decide
    first: one that is as long as its weight's second dimension, and not as its first, belongs to a
    weight stored (in, out), and square weights follow what their siblings show.  Then the family.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]):
        family = config.get("model_type")
        self._family = family if isinstance(family, str) else None
        self._seen: bool | None = None
        for name, info in tensors.items():
            parts = name.split(".")
            if len(parts) < 2 or parts[-1] != "weight" or parts[-2] not in CONV1D_MODULES or len(info.shape) != 2:
                continue
            bias = tensors.get(name.removesuffix("weight") + "bias")
            if bias and info.shape[0] != info.shape[1] and bias.shape in (info.shape[:1], info.shape[1:]):
                self._seen = bias.shape == info.shape[1:]

    def is_transposed(self, module: str) -> bool:
        """Whether this linear module of the base stores (in, out)."""
        if module.split(".")[-1] not in CONV1D_MODULES:
            return False
        return self._family in CONV1D_FAMILIES if self._seen is None else self._seen

    def is_known(self, module: str) -> bool:
        """Whether :meth:`is_transposed` rests on more than the absence of evidence."""
        known = self._family in CONV1D_FAMILIES if module.split(".")[-1] in CONV1D_MODULES else self._family is not None
        return known or self._seen is not None

    def layout_of_update(
        self, module: str, shape: tuple[int, int], wanted: Layout | None, stored: tuple[int, ...]
    ) -> Layout | None:
        """The layout in which a stored base tensor fits an update of ``shape`` (out, in), or None.

        ``wanted`` is what the update's own form demands; without it the shapes decide, and for
        square weights what is known of the base.  (``fan_in_fan_out`` as saved is that of the last
        module wrapped, so it decides nothing.)
        """
        if wanted is not None:
            fits = len(stored) > 2 if wanted == "conv" else len(stored) == 2
            return wanted if fits and matrix_shape(stored, wanted) == shape else None
        if stored == shape and (shape[0] != shape[1] or not self.is_transposed(module)):
            return "linear"
        return "conv1d" if stored == shape[::-1] else None

    def layout_of(self, module: str, shape: tuple[int, ...]) -> Layout:
        """The layout of a base tensor that belongs to ``module``."""
        role = role_of(module, len(shape))
        if role == "conv":
            return "conv"
        if role == "embedding":
            return "embedding"
        return "conv1d" if self.is_transposed(module) else "linear"
