"""The records that the numeric side makes for reports and figures; they need nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Vector:
    """One singular vector of W1 with its verdict.

    Attributes
    ----------
    index : its 0-based rank in W1; 0 is the largest singular value.
    sigma : its singular value, in the units of W.
    max_cosine : max |cos| over W0's singular vectors, or None where it was not needed.
    max_cosine_bounds : an enclosure of the exact value.
    base_index, base_sigma : the vector of W0 it resembles most, or None.
    base_capture : the norm of its projection on the top base vectors that hold 90 % of W0's energy.
    decided_by : "svd", "certificate" or "bound".
    intruder : the verdict.
    flags : "cluster", "base_cluster", "tie_across_k", "null_space", "borderline".
    """

    index: int
    sigma: float
    max_cosine: float | None
    max_cosine_bounds: tuple[float, float]
    base_index: int | None
    base_sigma: float | None
    base_capture: float | None
    decided_by: str
    intruder: bool
    flags: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LayerSpectra:
    """Singular values and cosines of one layer of one fine-tune, as arrays.

    Attributes
    ----------
    name, module_type : the layer.
    tuned : the fine-tune, by a short name.
    kind : of its update: "low_rank", "row_scaled" and "column_scaled" (DoRA), "hadamard" (LoHa), "kronecker" (LoKr),
        "scaled" (IA3), "rotated" (OFT, BOFT), "mixed" (GLoRA), "replaced_rows" (trainable tokens), "added",
        "dense", or "merged".
    shape : (m, n) of the weight.
    side, epsilon : which singular vectors were compared, and what counts as an intruder.
    base_values, tuned_values, update_values : (p,) all singular values of W0, W1 and dW = W1 − W0 in
        float64, descending, p = min(m, n); of a low-rank dW its r values.
    cosines : (rows, columns) |cos| of W0's leading singular vectors (rows) with W1's (columns).
    vectors : the verdicts on W1's leading vectors, one a column.
    noise_edge : the largest singular value that plain noise of the size of a dense dW's bulk would
        have, or None; see :func:`spectra.analysis.measures.noise_edge`.
    random_floor : the mean max |cos| of a random direction with W0's vectors, or None.
    """

    name: str
    module_type: str
    tuned: str
    kind: str
    shape: tuple[int, int]
    side: str
    epsilon: float
    base_values: np.ndarray
    tuned_values: np.ndarray
    update_values: np.ndarray
    cosines: np.ndarray
    vectors: tuple[Vector, ...]
    noise_edge: float | None
    random_floor: float | None = None


@dataclass(frozen=True, eq=False)
class Similarity:
    """How the leading singular vectors of one tuned weight relate to the base's.

    Attributes
    ----------
    name : the layer.
    tuned : the fine-tune, by a short name.
    side : "left" or "right".
    cosines : (rows, columns) |cos| of W0's leading singular vectors (rows) with W1's (columns), the largest
        singular value first.
    """

    name: str
    tuned: str
    side: str
    cosines: np.ndarray
