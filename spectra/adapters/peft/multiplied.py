"""IA3 and OFT: a weight is multiplied, not added to."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.method import MethodUpdate, Slot, all_of, dimensions, named
from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError, UnsupportedMethodError
from spectra.files.orientation import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.updates.algebra import Update


@dataclass(frozen=True)
class Ia3Update(MethodUpdate):
    """ia3_l: (out, 1) scales rows, and the bias; (1, in), of a feed-forward module, columns; (1, channels, 1…)."""

    columns: bool = False

    @property
    def kind(self) -> UpdateKind:
        return "scaled"

    @property
    def formula(self) -> str:
        return f"W1 = l ⊙ W0, by {'column' if self.columns else 'row'}"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return ("conv",) if len(self._info("ia3_l").shape) > 2 else ("linear", "conv1d")

    @property
    def scales_bias(self) -> bool:
        return not self.columns

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        info = self._info("ia3_l")
        if len(stored) > 2:
            return len(stored) == len(info.shape) and info.size == (stored[1] if self.columns else stored[0])
        return info.size == (shape[1] if self.columns else shape[0])

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.algebra import Scaled

        scale = values["ia3_l"].flatten()
        return Scaled(columns=scale) if self.columns else Scaled(rows=scale)


def ia3(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    (info,) = all_of(module, slot, "ia3_l")
    dimensions((2, 4, 5), info)
    given = config.values.get("feedforward_modules") or []
    if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise AdapterError(config.file, "feedforward_modules: expected names")
    # As peft has it: by the end of the name, which need not be a whole part of it.
    feed_forward = None if isinstance(given, str) else any(module.endswith(one) for one in given)
    rows, columns = info.shape[0] != 1, info.shape[1] != 1
    if (rows and columns) or math.prod(info.shape[2:]) != 1 or (rows and len(info.shape) > 2):
        raise AdapterError(info.file, f"expected one row or one column, found shape {list(info.shape)}", info.name)
    if feed_forward is None:
        if len(info.shape) > 2 or rows == columns:
            raise UnsupportedMethodError(
                config.file, "feedforward_modules is one expression, and what it means here cannot be told by "
                f"the shape of {info.name!r}; give names instead"
            )  # fmt: skip
        feed_forward = columns
    elif len(info.shape) == 2 and (rows if feed_forward else columns):
        is_one = "is one" if feed_forward else "is none"
        raise AdapterError(
            info.file, f"its shape is {list(info.shape)}, but by feedforward_modules this module {is_one}", info.name
        )
    return Ia3Update(module, named(slot, "ia3_l"), columns=feed_forward)


@dataclass(frozen=True)
class OftUpdate(MethodUpdate):
    """oft_R.weight (blocks, b(b-1)/2): upper triangles of skew-symmetric Q, of which R is the Cayley transform.

    ``terms`` are those of its truncated series, 0 the exact transform; ``radius`` bounds ‖Q‖, where it is constrained.
    """

    size: int = 1
    shared: bool = False
    terms: int = 0
    radius: float | None = None
    embedding: bool = False

    @property
    def kind(self) -> UpdateKind:
        return "rotated"

    @property
    def formula(self) -> str:
        return f"W1 = {'R·W0' if self.embedding else 'W0·R'}, with R a rotation"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return ("embedding",) if self.embedding else ("linear", "conv")

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        side = shape[0] if self.embedding else shape[1]
        if self.shared:
            return side > 0 and side % self.size == 0
        return side == self.size * self.factors[0][1].shape[0]

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        from spectra.updates.algebra import Rotated

        (triangles,) = values.values()
        return Rotated(cayley(triangles, self.size, self.terms, self.radius), output=self.embedding)


def cayley(triangles: Tensor, size: int, terms: int, radius: float | None) -> Tensor:
    """R (blocks, size, size) from the upper triangles (blocks, size·(size-1)/2) of Q, float64.

    (I - Q)(I + Q)⁻¹, or with ``terms`` the series that peft has in its place, whose Q has the other sign.
    """
    import torch

    Q = torch.zeros(triangles.shape[0], size, size, dtype=triangles.dtype, device=triangles.device)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = triangles
    Q = Q - Q.transpose(1, 2)
    if radius is not None:
        norms = Q.norm(dim=(1, 2), keepdim=True)
        Q = torch.where(norms <= radius, Q, radius * Q / norms)
    one = torch.eye(size, dtype=Q.dtype, device=Q.device)
    if not terms:
        exact: Tensor = torch.linalg.solve(one + Q, one - Q, left=False)
        return exact
    R = one.expand_as(Q).clone()
    if terms > 1:
        R += 2 * Q
    if terms > 2:
        power = Q @ Q
        R += 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R += 2 * power
        R += power @ Q  # the last term once, whatever their number
    return R


MAX_TERMS = 1000  # each is a product of matrices


def oft(config: ConfigFields, module: str, slot: Slot) -> MethodUpdate:
    """The update of one module, checked against the config."""
    name = "oft_embedding_R" if "oft_embedding_R" in slot else "oft_R"
    (info,) = all_of(module, slot, name)
    if len(slot) > 1:
        raise AdapterError(info.file, "there are both oft_R and oft_embedding_R for one module", info.name)
    dimensions((2,), info)
    blocks, elements = info.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    if blocks < 1 or size * (size - 1) // 2 != elements:
        raise AdapterError(
            info.file, f"its shape is {list(info.shape)}; expected b·(b-1)/2 columns for blocks of size b", info.name
        )
    shared = config.switch("block_share")
    if shared and blocks != 1:
        raise AdapterError(info.file, f"block_share is true, but it holds {blocks} blocks", info.name)
    count, wanted = config.whole("r", 0), config.whole("oft_block_size", 0)
    if (count != 0) == (wanted != 0):
        raise AdapterError(config.file, "expected one of r and oft_block_size to be 0, and the other not")
    if not shared and _adjusted(blocks * size, count or wanted) != (blocks if count else size):
        option = f"r = {count}" if count else f"oft_block_size = {wanted}"
        raise AdapterError(info.file, f"it holds {blocks} blocks of {size}, but the config says {option}", info.name)
    terms = config.whole("num_cayley_neumann_terms", 5) if config.values.get("use_cayley_neumann", True) else 0
    config.switch("use_cayley_neumann")
    if terms > MAX_TERMS or (config.values.get("use_cayley_neumann", True) and terms < 1):
        raise AdapterError(config.file, f"num_cayley_neumann_terms = {terms}; expected 1 to {MAX_TERMS}")
    radius = None
    if config.switch("coft"):
        radius = config.number("eps", config.values.get("eps", 6e-5)) / math.sqrt(blocks)
    embedding = name == "oft_embedding_R"
    notes = (
        "OFT turns the input side, so that left singular vectors stay as they are: --side right shows what it does",
    )
    return OftUpdate(
        module, named(slot, name), notes=() if embedding else notes, size=size, shared=shared, terms=terms,
        radius=radius, embedding=embedding,
    )  # fmt: skip


def _adjusted(features: int, wanted: int) -> int:
    """The divisor of ``features`` that peft takes for a wanted one; above, all of them."""
    if features % wanted == 0:
        return wanted
    if wanted >= features:
        return features
    above = next(one for one in range(wanted, features + 1) if features % one == 0)
    below = next(one for one in range(wanted, 0, -1) if features % one == 0)
    return below if wanted - below <= above - wanted else above


def check_oft(config: ConfigFields) -> None:
    """Refuses what earlier versions of peft meant by the same names."""
    if "oft_block_size" not in config.values:
        raise UnsupportedMethodError(config.file, "this OFT is of peft before 0.14, which stored it in another form")
    version = re.match(r"(\d+)\.(\d+)", str(config.values.get("peft_version") or "0.0"))
    old = version is None or (int(version[1]), int(version[2])) < (0, 18)
    if config.values.get("use_cayley_neumann", True) and old:
        raise UnsupportedMethodError(
            config.file, "use_cayley_neumann with a peft_version before 0.18, which had another series in its place"
        )
