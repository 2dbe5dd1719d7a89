"""Which figures there are, by the names the command line has for them; needs no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from spectra.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spectra.records.comparison import Comparison
    from spectra.records.report import Report


class Kind(NamedTuple):
    """One figure.

    Attributes
    ----------
    module, function : where in ``spectra.plots`` it is drawn.
    needs : its first argument: "layers", a sequence of :class:`spectra.records.layer.LayerSpectra`, or
        "comparison", a :class:`spectra.records.comparison.Comparison`.
    help : one line for people.
    """

    module: str
    function: str
    needs: Literal["layers", "comparison"]
    help: str

    def draw(self, source: Any) -> Figure:
        """The figure of what it ``needs``; raises UsageError where something is missing for it."""
        figure: Figure = getattr(import_module(f"spectra.plots.{self.module}"), self.function)(source)
        return figure


def figure_of(source: Comparison | Sequence[Report], kind: str) -> Figure:
    """The figure of a comparison, or of reports side by side.

    Raises
    ------
    UsageError : no such kind, or one that needs singular vectors, which records do not hold.
    """
    if kind not in KINDS:
        raise UsageError(f"kind = {kind!r:.80}; expected one of {', '.join(KINDS)}")
    if KINDS[kind].needs == "layers":
        drawn = ", ".join(name for name, one in KINDS.items() if one.needs != "layers")
        raise UsageError(
            f"{kind}: needs singular vectors, which a record does not hold; use spectra.plot(tuned, kind={kind!r}), or "
            f"one of {drawn}"
        )
    from spectra.records.comparison import Comparison

    if not isinstance(source, Comparison):
        source = Comparison(tuple(source), (), source[0].spectra_version)
    return KINDS[kind].draw(source)


KINDS = {
    "similarity": Kind("layers", "similarity_matrix", "layers", "|cos| of every tuned with every pretrained vector"),
    "cosines": Kind("layers", "cosine_profile", "layers", "the best |cos| of each leading tuned vector"),
    "spectra": Kind("layers", "spectra", "layers", "singular values of W0, W0+dW and dW"),
    "layers": Kind("counts", "layer_index_counts", "comparison", "a map of intruders, layer by singular index"),
    "depth": Kind("counts", "counts_by_layer", "comparison", "intruders by depth and module type"),
    "epsilon": Kind("curves", "epsilon_sweep", "comparison", "intruders against the threshold epsilon"),
    "top-k": Kind("curves", "top_k_sweep", "comparison", "intruders among the k leading vectors, against k"),
    "weights": Kind("curves", "weight_curve", "comparison", "intruders against the weight the adapter is given"),
    "ranks": Kind("fine_tunes", "counts_by_rank", "comparison", "intruders and update size against the LoRA rank"),
    "trajectory": Kind("fine_tunes", "trajectory", "comparison", "intruders, size and rank over training steps"),
    "overlap": Kind("fine_tunes", "overlap_matrix", "comparison", "subspace overlap of each two updates"),
    "size": Kind("fine_tunes", "size_and_intruders", "comparison", "intruders against the size of the update"),
}
