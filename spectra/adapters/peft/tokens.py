"""Trainable tokens: the rows of an embedding, or of a head, that belong to some tokens are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectra.adapters.peft.fields import ConfigFields
from spectra.adapters.peft.keys import TOKENS, unwrapped
from spectra.adapters.peft.method import MethodUpdate, Slot, dimensions
from spectra.adapters.plan import UpdateKind
from spectra.errors import AdapterError
from spectra.files.orientation import Layout, Orientation, role_of

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.updates.algebra import Update


@dataclass(frozen=True)
class TokensUpdate(MethodUpdate):
    """trainable_tokens_delta (tokens, d): the new rows, not what is added to the old ones.

    ``indices`` are the tokens', in the same order; those that the base's vocabulary has not are left out.
    """

    indices: tuple[int, ...] = ()

    @property
    def kind(self) -> UpdateKind:
        return "replaced_rows"

    def layout_in(self, stored: tuple[int, ...], orientation: Orientation) -> Layout | None:
        if len(stored) != 2 or stored[1] != self._info(TOKENS).shape[1]:
            return None
        # Whatever an embedding is called; of heads alone the tokens are rows of the matrix as it is analysed.
        return "linear" if role_of(self.module, 2) == "head" else "embedding"

    def notes_in(self, stored: tuple[int, ...]) -> tuple[str, ...]:
        new = sum(index >= stored[0] for index in self.indices)
        own = f"trainable tokens: {len(self.indices) - new} rows are replaced"
        return (own if not new else f"{own}; {new} others are rows that the base does not have",)

    def why_not_merged(self, stored: tuple[int, ...]) -> str | None:
        new = sum(index >= stored[0] for index in self.indices)
        return f"{new} of its tokens are rows that the base does not have" if new else None

    def form(self, values: dict[str, Tensor], layout: Layout) -> Update:
        import torch

        from spectra.updates.algebra import ReplacedRows

        rows = values[TOKENS]
        return ReplacedRows(torch.tensor(self.indices, device=rows.device), rows, columns=layout == "embedding")


def replaced_tokens(config: ConfigFields, module: str, slot: Slot, copy: str | None = None) -> TokensUpdate:
    """The update of one embedding or head, its tokens as the config has them.

    Raises
    ------
    AdapterError : the config does not say which tokens, or not as many; or the same module has other factors.
    """
    info = slot[TOKENS]
    other = next((tensor for name, tensor in slot.items() if name != TOKENS), None)
    if other is not None:
        raise AdapterError(other.file, f"{info.name!r} replaces rows of the same weight: peft has not both", other.name)
    if not info.is_float:
        raise AdapterError(info.file, f"expected a floating dtype, found {info.dtype}", info.name)
    dimensions((2,), info)
    name = unwrapped(module)
    indices = _indices(config, name)
    if len(indices) != info.shape[0]:
        raise AdapterError(
            info.file, f"it holds {info.shape[0]} rows, but the config names {len(indices)} tokens", info.name
        )
    return TokensUpdate(name, ((TOKENS, info),), base_copy=copy, indices=indices)


def _indices(config: ConfigFields, module: str) -> tuple[int, ...]:
    """The tokens of a module: one list for all, or one for each name that modules end in."""
    key = "token_indices" if config.values.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    given: Any = config.values.get(key)
    if isinstance(given, Mapping):
        fitting = [name for name in given if isinstance(name, str) and module.endswith(name)]
        if len(fitting) != 1:
            named = f"several: {', '.join(map(repr, fitting))}" if fitting else "none"
            raise AdapterError(config.file, f"{key}: of its names, {named} could be {module!r}")
        given = given[fitting[0]]
    if not isinstance(given, list) or not all(type(index) is int and 0 <= index < 1 << 40 for index in given):
        raise AdapterError(config.file, f"{key}: expected the indices of {module!r}'s tokens")
    if len(set(given)) != len(given):
        raise AdapterError(config.file, f"{key}: a token of {module!r} is there twice")
    return tuple(given)
