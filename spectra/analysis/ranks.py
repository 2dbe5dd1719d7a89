"""Which rank and which alpha a layer gets: from the singular values of its update to a suggested LoRA config.

A suggestion says what a LoRA of that shape *could* hold of the change that was trained, at what cost.  That training it
would find the same change does not follow.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from spectra.adapters.peft.naming import ModuleNames
from spectra.analysis import measures
from spectra.errors import UsageError
from spectra.records.energy import break_even_rank, lora_parameters, norm_fro, rank_of_energy
from spectra.records.ranks import Choice, LayerRank, Suggestion
from spectra.records.report import module_type

ENERGY = 0.9
SCALING = 2.0  # alpha = 2r; Shuttleworth et al. 2024, arXiv 2410.21228
DIGITS = 7  # of the singular values kept: those of float32
# Which layers share a rank.
GROUPS: Mapping[str, Callable[[LayerRank], str]] = {
    "layer": lambda layer: layer.name,
    "type": lambda layer: layer.module_type,
    "model": lambda layer: "",
}
LEFT_OUT = {
    "embedding": "an embedding: LoRA usually leaves it as it is, modules_to_save would train it whole",
    "head": "a head: usually new or small, and trained whole by modules_to_save",
    "conv": "a convolution: only linear layers get a suggestion",
}
UNCHANGED = "unchanged"
TOO_THIN = "too thin: no low-rank update would be smaller than the weight"
PACKED = "a packed projection: PEFT adapts the attention it belongs to as one"


def layer_rank(
    singular_values: np.ndarray,
    shape: tuple[int, int],
    *,
    name: str,
    role: str,
    kind: str,
    trained_rank: int | None,
    parameters: int,
    base_norm_fro: float,
) -> LayerRank:
    """The record of one layer from the singular values of dW (float64, descending; of a low-rank dW its r suffice)."""
    size = norm_fro(singular_values)
    kept = min(singular_values.size, break_even_rank(shape))
    # Only entries that were trained one by one have noise for a bulk: that of a rescaled or rotated base is none.
    edge = measures.noise_edge(singular_values, shape) if kind in ("dense", "merged") else None
    return LayerRank(
        name=name, module_type=module_type(name), role=role, shape=shape, kind=kind, trained_rank=trained_rank,
        parameters=parameters, update_norm_fro=size,
        update_norm_relative=size / base_norm_fro if base_norm_fro > 0 else None,
        rank_90=rank_of_energy(singular_values, 0.9), rank_99=rank_of_energy(singular_values, 0.99),
        effective_rank=measures.effective_rank(singular_values),
        stable_rank=measures.stable_rank(size, float(singular_values[0]) if singular_values.size else 0.0),
        noise_edge=edge, noise_rank=None if edge is None else int((singular_values > edge).sum()),
        values=tuple(_rounded(value) for value in singular_values[:kept]),
        rest_norm=_rounded(norm_fro(singular_values[kept:])),
    )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _plain(value: float) -> float:  # as PEFT's own configs have it
    return int(value) if value == int(value) else value


def suggest(
    layers: Sequence[LayerRank],
    *,
    energy: float = ENERGY,
    max_rank: int | None = None,
    by: str = "layer",
    use_rslora: bool = False,
    alpha: str | float | None = None,
    other_modules: Iterable[str] = (),
) -> Suggestion | None:
    """The smallest LoRA that holds ``energy`` of each layer's ‖dW‖_F²; None where no linear layer changed.

    Parameters
    ----------
    energy, max_rank : in (0, 1]; at least 1.  No rank goes beyond the layer's break-even rank either.
    by : which layers get the same rank, the highest that one of them needs: none ("layer"), those of a
        module "type", or all ("model").
    use_rslora : scale by alpha/√r (Kalajdzievski 2023, arXiv 2312.03732).
    alpha : a number, or a multiple of each layer's rank such as "2r".  By default "2r"; with rsLoRA the
        whole number, one for all layers, that brings the most common rank's scaling closest to 2.
    other_modules : further modules of the model, which short names in the config may not match.

    Raises
    ------
    UsageError : a value that makes no sense.
    """
    if not 0 < energy <= 1:
        raise UsageError(f"energy = {energy}; expected a share above 0 and up to 1")
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"max_rank = {max_rank}; expected at least 1")
    if by not in GROUPS:
        raise UsageError(f"by = {by!r}; expected one of {', '.join(GROUPS)}")
    multiple, fixed = _alpha_rule(alpha, use_rslora)
    left_out = [{"name": layer.name, "reason": reason} for layer in layers if (reason := why_not(layer))]
    targets = [layer for layer in layers if not why_not(layer)]
    if not targets:
        return None
    ranks = _ranks(targets, energy, max_rank, by)
    others = [*(item["name"] for item in left_out), *other_modules]
    names = ModuleNames({layer.name: layer.module_type for layer in targets}, others)
    r, rank_pattern = names.pattern(ranks)
    if multiple is not None:
        alphas = {name: _plain(multiple * rank) for name, rank in ranks.items()}
    else:
        common = fixed if fixed is not None else max(1, round(SCALING * math.sqrt(r)))
        alphas = dict.fromkeys(ranks, _plain(common))
    lora_alpha, alpha_pattern = names.pattern(alphas)
    root = math.sqrt if use_rslora else float
    choices = tuple(
        Choice(
            layer.name, rank, alphas[layer.name], alphas[layer.name] / root(rank), layer.error_at(rank),
            _capped(layer, rank, energy, max_rank), lora_parameters(layer.shape, rank), layer.dense_parameters,
        )
        for layer, rank in zip(targets, ranks.values(), strict=True)
    )  # fmt: skip
    largest = max(layer.update_norm_fro for layer in layers)  # scaled, so that squares do not underflow
    sizes = np.array([layer.update_norm_fro for layer in targets]) / largest
    lost = np.array([choice.relative_error for choice in choices]) * sizes
    held, everything = float(np.sum(sizes**2)), sum((layer.update_norm_fro / largest) ** 2 for layer in layers)
    target_modules, exclude_modules = names.targets()
    return Suggestion(
        energy=energy, max_rank=max_rank, by=by, use_rslora=use_rslora,
        alpha_rule=f"{multiple:g}r" if multiple is not None else f"{lora_alpha:g}",
        r=r, lora_alpha=lora_alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
        target_modules=target_modules, exclude_modules=exclude_modules, choices=choices, left_out=tuple(left_out),
        parameters=sum(choice.parameters for choice in choices),
        dense_parameters=sum(choice.dense_parameters for choice in choices),
        trained_parameters=sum(layer.parameters for layer in targets),
        relative_error=math.sqrt(float(np.sum(lost**2)) / held),
        left_out_share=max(0.0, 1 - held / everything),
        rescaled=sum(layer.rescaled for layer in targets),
    )  # fmt: skip


def why_not(layer: LayerRank) -> str | None:
    """Why a layer gets no suggestion, or None."""
    if layer.role in LEFT_OUT:
        return LEFT_OUT[layer.role]
    if layer.name.endswith("in_proj_weight"):
        return PACKED
    if not layer.update_norm_fro > 0:
        return UNCHANGED
    return layer.unnamed or (None if layer.break_even_rank else TOO_THIN)


def _alpha_rule(alpha: str | float | None, use_rslora: bool) -> tuple[float | None, float | None]:
    """(multiple of the rank, fixed value), of which one at most is not None."""
    if alpha is None:
        return (None, None) if use_rslora else (SCALING, None)
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?\s*(r)?", str(alpha).strip())
    value = float(match[1] or 1) if match and (match[1] or match[2]) else 0.0
    if not (match and 0 < value < math.inf):
        raise UsageError(f"alpha = {alpha!r}; expected a positive number or a multiple of the rank such as 2r")
    return (value, None) if match[2] else (None, value)


def own_rank(layer: LayerRank, energy: float, max_rank: int | None) -> int:
    """The rank that :func:`suggest` gives a layer that shares it with no other."""
    return min(layer.rank_at(energy) or layer.break_even_rank, max_rank or layer.break_even_rank)


def _ranks(targets: Sequence[LayerRank], energy: float, max_rank: int | None, by: str) -> dict[str, int]:
    group, needs = GROUPS[by], defaultdict[str, int](int)
    for layer in targets:
        needs[group(layer)] = max(needs[group(layer)], own_rank(layer, energy, None))
    most = max_rank or max(needs.values())
    return {layer.name: min(needs[group(layer)], layer.break_even_rank, most) for layer in targets}


def _capped(layer: LayerRank, rank: int, energy: float, max_rank: int | None) -> str | None:
    needed = layer.rank_at(energy)
    if needed is not None and needed <= rank:
        return None
    return "max_rank" if rank == max_rank else "break_even"
