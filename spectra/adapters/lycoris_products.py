"""LoCon, LoHa, LoKr and whole differences of LyCORIS: what is added to a weight; and DoRA of these.

As ``lycoris`` 4.1 writes them, and ``networks/loha.py`` and ``lokr.py`` of sd-scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from spectra.adapters.factors import alpha_of, check_factors, scalar
from spectra.adapters.peft.method import MethodUpdate, Slot, all_of, dimensions, equal
from spectra.adapters.peft.products import product, whole_or_product
from spectra.adapters.plan import FORMULAS, UpdateKind
from spectra.errors import AdapterError
from spectra.files.checkpoint import TensorInfo
from spectra.files.orientation import Orientation

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.files.orientation import Layout
    from spectra.updates.algebra import Update

KNOWN = frozenset(["alpha", "on_input"])  # read with the headers, and trained by nobody
WHOLE_LOKR = "both factors are whole, so that the scaling is 1, as lycoris loads it; rsLoRA would not show"


@dataclass(frozen=True)
class LycorisUpdate(MethodUpdate):
    """The factors of one module; ``component``, ``name`` and ``joint`` are those of ``StoredFactors``.

    ``dora`` says over what the norms in ``dora_scale`` were taken; ``base_names`` has the base's tensor, once it is
    known.
    """

    component: str = ""
    name: str = ""
    joint: str = "_"
    dora: Literal["rows", "columns"] | None = None
    base_names: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return self.base_names or (f"{self.name}.weight",)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Those that were trained first: messages name the first."""
        return tuple(info.name for _, info in sorted(self.factors, key=lambda item: item[0] in KNOWN))

    @property
    def parameters(self) -> int:
        return sum(info.size for name, info in self.factors if name not in KNOWN)

    @property
    def formula(self) -> str:
        plain = FORMULAS[self.kind]
        if self.dora is None or self.kind in ("row_scaled", "column_scaled"):
            return plain
        return f"W1 = m/‖X‖ ⊙ X, norms by {self.dora.removesuffix('s')}, X = W0 + {plain.removeprefix('dW = ')}"

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        if self.dora is not None:
            side = stored[0] if self.dora == "rows" else stored[1]
            if self._info("dora_scale").size != side:
                return False
        return self.holds(shape, stored)

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        """Whether the change, without DoRA, is one of a weight stored so, a matrix of ``shape``."""
        return shape == self.shape

    def fits_stored(self, stored: tuple[int, ...]) -> bool:
        return self.layout_in(stored, _PLAIN) is not None

    def placed(self, name: str, stored: tuple[int, ...]) -> LycorisUpdate:
        return replace(self, module=name.removesuffix(".weight"), base_names=(name,))

    def looked_for(self, names: tuple[str, ...]) -> LycorisUpdate:
        return replace(self, base_names=names)

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.multiplied import Normed

        change = self.change(values)
        if self.dora is None:
            return change
        return Normed(change, values["dora_scale"].flatten(), columns=self.dora == "columns")

    def change(self, values: Mapping[str, Tensor]) -> Update:
        """The update without DoRA, from its factors in float64."""
        raise NotImplementedError


_PLAIN = Orientation({}, {})  # LyCORIS wraps no module that stores its weight transposed


def _sides(factors: Mapping[str, TensorInfo], core: str, a: str, b: str) -> tuple[int, int]:
    """(out, in·k…) of a ``product``."""
    if core not in factors:
        return factors[a].shape[0], math.prod(factors[b].shape[1:])
    return factors[a].shape[1], factors[b].shape[1] * math.prod(factors[core].shape[2:])


def _check_product(module: str, slot: Slot, core: str, a: str, b: str) -> int:
    """The rank of a·b, whose shapes fit each other."""
    left, right = all_of(module, slot, a, b)
    dimensions((2,), left, right)
    rank = right.shape[0]
    because = f"{right.name!r} has rank {rank}"
    if core in slot:
        cores = slot[core]
        if len(cores.shape) < 3:
            raise AdapterError(cores.file, f"expected ({rank}, {rank}, …), found shape {list(cores.shape)}", cores.name)
        equal(cores, 0, rank, because)
        equal(cores, 1, rank, because)
        equal(left, 0, rank, because)
    else:
        equal(left, 1, rank, because)
    return rank


@dataclass(frozen=True)
class LoConUpdate(LycorisUpdate):
    """lora_up (out, r), lora_down (r, in, k…), lora_mid (r, r, k…) between them: a LoRA below DoRA."""

    @property
    def kind(self) -> UpdateKind:
        return {"rows": "row_scaled", "columns": "column_scaled", None: "low_rank"}[self.dora]  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        up, down, mid = self._info("lora_up"), self._info("lora_down"), dict(self.factors).get("lora_mid")
        return up.shape[0], math.prod((*down.shape[1:], *(() if mid is None else mid.shape[2:])))

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        mid = dict(self.factors).get("lora_mid")
        kernel = (self._info("lora_down") if mid is None else mid).shape[2:]
        return shape == self.shape and (kernel == stored[2:] or all(size == 1 for size in (*kernel, *stored[2:])))

    def change(self, values: Mapping[str, Tensor]) -> Update:
        import torch

        from spectra.updates.algebra import LowRank

        assert self.scaling is not None
        A = values["lora_down"].flatten(1)
        if "lora_mid" in values:
            A = torch.einsum("ij...,jn->in...", values["lora_mid"], A).flatten(1)
        return LowRank(values["lora_up"].flatten(1), A, self.scaling)


def locon(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    up, down = all_of(module, slot, "lora_up", "lora_down")
    rank = check_factors(down, up, slot.get("lora_mid"))
    return LoConUpdate(module, (), rank, *alpha_of(slot.get("alpha"), rank))


@dataclass(frozen=True)
class LoHaUpdate(LycorisUpdate):
    """hada_w1_a (out, r), hada_w1_b (r, in·k…) and hada_w2 likewise; beside hada_t1 and hada_t2, a is (r, out)."""

    @property
    def kind(self) -> UpdateKind:
        return "hadamard"

    @property
    def shape(self) -> tuple[int, int]:
        return _sides(dict(self.factors), "hada_t1", "hada_w1_a", "hada_w1_b")

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        core = dict(self.factors).get("hada_t1")
        return shape == self.shape and (core is None or core.shape[2:] == stored[2:])

    def change(self, values: Mapping[str, Tensor]) -> Update:
        from spectra.updates.algebra import Hadamard

        assert self.scaling is not None
        first = product(values, "hada_t1", "hada_w1_a", "hada_w1_b")
        return Hadamard(*first, *product(values, "hada_t2", "hada_w2_a", "hada_w2_b"), self.scaling)


def loha(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    if "hada_t1" in slot or "hada_t2" in slot:
        all_of(module, slot, "hada_t1", "hada_t2")
    ranks = [_check_product(module, slot, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2)]
    first, second = (_sides(slot, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2))
    other = slot["hada_w2_a"]
    if first != second or ranks[0] != ranks[1]:
        raise AdapterError(
            other.file, f"its product is {list(second)} of rank {ranks[1]}, that of {slot['hada_w1_a'].name!r} "
            f"{list(first)} of rank {ranks[0]}", other.name,
        )  # fmt: skip
    return LoHaUpdate(module, (), ranks[0], *alpha_of(slot.get("alpha"), ranks[0]))


@dataclass(frozen=True)
class LoKrUpdate(LycorisUpdate):
    """lokr_w1 (p, q) and lokr_w2 (s, t, k…), each whole or as a·b, with a core lokr_t2: dW = s · kron(w1, w2)."""

    @property
    def kind(self) -> UpdateKind:
        return "kronecker"

    @property
    def shape(self) -> tuple[int, int]:
        (p, q), (s, t) = _lokr_sides(dict(self.factors), 1), _lokr_sides(dict(self.factors), 2)
        return p * s, q * t

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        factors = dict(self.factors)
        kernels = [factors[name].shape[2:] for name in ("lokr_t2", "lokr_w2") if name in factors]
        return shape == self.shape and all(kernel in ((), stored[2:]) for kernel in kernels)

    def change(self, values: Mapping[str, Tensor]) -> Update:
        from spectra.updates.algebra import Kronecker

        assert self.scaling is not None
        first, second = (whole_or_product(values, f"lokr_w{number}", f"lokr_t{number}") for number in (1, 2))
        return Kronecker(*first, *second, self.scaling)


def _lokr_sides(factors: Mapping[str, TensorInfo], number: int) -> tuple[int, int]:
    whole = factors.get(f"lokr_w{number}")
    if whole is not None:
        return whole.shape[0], math.prod(whole.shape[1:])
    return _sides(factors, f"lokr_t{number}", f"lokr_w{number}_a", f"lokr_w{number}_b")


def lokr(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    ranks = []
    for number in (1, 2):
        whole = slot.get(f"lokr_w{number}")
        if whole is None:
            parts = (f"lokr_t{number}", f"lokr_w{number}_a", f"lokr_w{number}_b")
            ranks.append(_check_product(module, slot, *parts))
            continue
        for part in (f"lokr_w{number}_a", f"lokr_w{number}_b", f"lokr_t{number}"):
            if part in slot:
                raise AdapterError(whole.file, f"there are both lokr_w{number} and {part}", whole.name)
        if len(whole.shape) < 2 or whole.size == 0 or (number == 1 and len(whole.shape) > 2):
            raise AdapterError(whole.file, f"expected a matrix, found shape {list(whole.shape)}", whole.name)
    if len(set(ranks)) > 1:
        info = slot["lokr_w1_a"]
        raise AdapterError(info.file, f"its rank is {ranks[0]}, that of lokr_w2_a {ranks[1]}", info.name)
    if not ranks:
        alpha = slot.get("alpha")
        return LoKrUpdate(module, (), None, None if alpha is None else scalar(alpha), 1.0, (WHOLE_LOKR,))
    return LoKrUpdate(module, (), ranks[0], *alpha_of(slot.get("alpha"), ranks[0]))


@dataclass(frozen=True)
class DifferenceUpdate(LycorisUpdate):
    """diff, of the weight's own shape: dW whole."""

    @property
    def kind(self) -> UpdateKind:
        return "added"

    @property
    def shape(self) -> tuple[int, int]:
        stored = self._info("diff").shape
        return stored[0], math.prod(stored[1:])

    def holds(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        return stored == self._info("diff").shape

    def change(self, values: Mapping[str, Tensor]) -> Update:
        from spectra.updates.algebra import Added

        return Added(values["diff"].flatten(1), free=True)


def difference(module: str, slot: Slot) -> LycorisUpdate:
    """The update of one module, whose factors fit each other."""
    info = slot["diff"]
    if len(info.shape) < 2 or info.size == 0:
        raise AdapterError(info.file, f"expected a matrix, found shape {list(info.shape)}", info.name)
    return DifferenceUpdate(module, ())
