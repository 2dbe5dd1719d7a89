"""What LyCORIS trains besides plain LoRA: LoHa, LoKr, OFT, BOFT, (IA)³, GLoRA, whole differences, and DoRA of these.

Read as ``lycoris`` 4.1 writes them, and ``networks/loha.py``, ``lokr.py`` and ``oft.py`` of sd-scripts.  Keys are
``<module>.<factor>``; a ``scalar`` that was trained is in the factors already.  Scalings are alpha/r, where alpha is
stored so that this holds for rsLoRA, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from spectra.adapters.lycoris_multiplied import glora, ia3, oft
from spectra.adapters.lycoris_products import KNOWN, LycorisUpdate, difference, locon, loha, lokr
from spectra.adapters.peft.method import Slot
from spectra.adapters.unsupported import foreign_method
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.checkpoint import TensorInfo

DORA = (
    "dora_scale could hold the norms of the rows of W0 + dW (one per output, shape (out, 1, …)) or of its columns (one "
    "per input, shape (1, in, …)), and this shape does not say which"
)
SIDES = {
    "rows": "dora_scale holds the norms of the rows of W0 + dW, one per output",
    "columns": "dora_scale holds the norms of the columns of W0 + dW, one per input",
}

# Which factor tells the method, the factors it has, how it is read, and whether DoRA goes with it.
_Read = Callable[[str, Slot], LycorisUpdate]
_METHODS: tuple[tuple[str, str, _Read, bool], ...] = (
    ("LoHa", r"hada_(w[12]_[ab]|t[12])", loha, True),
    ("LoKr", r"lokr_(w[12](_[ab])?|t[12])", lokr, True),
    ("OFT", r"oft_blocks(\.[0-9]{1,3})?|oft_diag|rescale", oft, False),
    ("(IA)³", r"on_input|weight", ia3, False),
    ("GLoRA", r"[ab][12]\.weight", glora, False),
    ("a whole difference", r"diff", difference, False),
    ("LoCon", r"lora_(down|up|mid)", locon, True),
)


METHODS = tuple(label for label, *_ in _METHODS)


def is_lycoris(factors: Iterable[str]) -> bool:
    """Whether the factors of a module are those of a method of LyCORIS other than plain LoRA."""
    return any(re.fullmatch(pattern, factor) for factor in factors for _, pattern, *_ in _METHODS[:-1])


def read_module(module: str, component: str, name: str, joint: str, slot: Slot) -> LycorisUpdate:
    """The update of one module from its factors by name.

    Raises
    ------
    AdapterError : they contradict each other.
    UnsupportedMethodError : there is one that no method has, or the meaning of one is not certain.
    """
    slot = {
        factor.removesuffix(".weight") if factor.startswith("lora_") else factor: info for factor, info in slot.items()
    }
    matches = [(method, [one for one in slot if re.fullmatch(method[1], one)]) for method in _METHODS]
    (label, _, read, with_dora), own = next((item for item in matches if item[1]), (_METHODS[-1], []))
    for factor, info in slot.items():
        known = factor in own or factor == "alpha" or (with_dora and factor == "dora_scale")
        if not known:
            other = None if own else foreign_method((info.name,))
            why = f"this is {other[1]}" if other else f"beside {label}, this version cannot read {factor[:80]}"
            raise UnsupportedMethodError(info.file, why, info.name)
        if not info.is_float and factor not in KNOWN:
            raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
    update = read(module, slot)
    scale = slot.get("dora_scale")
    notes = update.notes
    dora = None if scale is None else _dora(scale)
    if dora is not None:
        notes = (*notes, SIDES[dora])
    return replace(
        update, factors=tuple(slot.items()), component=component, name=name, joint=joint, dora=dora, notes=notes
    )


def _dora(info: TensorInfo) -> Literal["rows", "columns"]:
    """Over what the norms were taken, by the shape."""
    others = [size for dimension, size in enumerate(info.shape) if dimension > 1]
    if len(info.shape) > 1 and all(size == 1 for size in others) and min(info.shape[:2]) == 1 < max(info.shape[:2]):
        return "rows" if info.shape[1] == 1 else "columns"
    raise UnsupportedMethodError(info.file, f"its shape is {list(info.shape)}: {DORA}", info.name)
