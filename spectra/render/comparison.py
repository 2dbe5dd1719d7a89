"""A comparison for people, as plain text, and as CSV: one row a fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from spectra.errors import UsageError
from spectra.records import sweeps
from spectra.records.comparison import Comparison
from spectra.records.report import Report
from spectra.render.chance import by_chance
from spectra.render.columns import decimals, failures, in_ascii, number, percent, plural, table
from spectra.render.coverage import partial, unseen
from spectra.render.table import as_csv

EPSILONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DEPTHS = (1, 2, 3, 5, 10, 20, 50, 100)
SHARED_WIDTH = 12  # of a column of the overlap matrix

NOTES = {
    "size": "‖dW‖₂/σ₁ and the ranks are means over layers; r₉₀ directions hold 90 % of ‖dW‖².",
    "counts": "‖dW‖/‖W0‖ is the mean over layers. ‖dW‖₂/θ is the largest update of a layer beside the size at which a "
    "random one has its first\nintruder. Counts at different ranks compare only where the updates are of similar size. "
    "They are of layers whose base is no plain\nnoise; all is of every layer. By chance: the count of random updates "
    "with dW's singular values, and how far a random total lies from\nit. Level puts the share into a word. Energy: "
    "the intruders' share of Σσ² over the vectors compared. In base: the share of dW's energy\nwithin the base's own "
    "top directions. Kept: how much of the base's top subspace is still the tuned one's. Shift:\n"
    "‖σ(W1)−σ(W0)‖/‖σ(W0)‖.",
    "null": "p: how often random updates ({draws} draws a layer) have as many intruders or more; near 1, dW has fewer "
    "than its size and\nrank alone would bring, near 0 more.",
    "faint": "In {faint} of {layers} layers dW is so small that random updates have none; none were drawn there.",
    "free": "Free up to: the weight s at which W0 + s·dW has its first intruder (outside noise-like bases); 1 is the "
    "adapter as it is, {most:g} the largest tried.",
    "overlap": "How much of the smaller update's top directions lies in the other's: 1 is all, and random directions "
    "share about {random}.",
}


def render_comparison(comparison: Comparison, *, verbose: bool = False, ascii_only: bool = False) -> str:
    """Size beside rank, counts, module types, sweeps over ε, k and the adapter's weight, and overlaps."""
    sections = [
        _partial(comparison),
        _facts(comparison),
        _updates(comparison),
        _counts(comparison),
        _module_types(comparison),
        _sweep(comparison, "at epsilon =", EPSILONS, _at_epsilon),
        _sweep(comparison, "among the top k =", _depths(comparison), _at_depth),
        _weights(comparison),
        _overlaps(comparison),
        _layers(comparison) if verbose else "",
        _problems(comparison),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return in_ascii(text) if ascii_only else text


def to_csv(comparison: Comparison) -> str:
    """The rows of :meth:`Comparison.rows`."""
    rows = comparison.rows()
    return as_csv(list(rows[0]), rows)


def _facts(comparison: Comparison) -> str:
    settings = comparison.reports[0].settings
    count = len(comparison.reports)
    what = f"{count} checkpoints of one training run" if comparison.is_trajectory else plural(count, "fine-tune")
    stored = comparison.base.get("quantised")
    note = f"\n           note: stored as {stored}; counts are relative to its dequantised weights" if stored else ""
    return (
        f"base       {comparison.base['path']}{note}\n"
        f"compared   {what}, by the top {settings['top_k']} {settings['side']} singular "
        f"vectors of each layer, epsilon {number(settings['epsilon'])}"
    )


def _updates(comparison: Comparison) -> str:
    header = ["update", "method", "rank", "alpha", "scaling", "parameters", "of full", "‖dW‖₂/σ₁",
              "eff. rank", "stable rank", "r₉₀"]  # fmt: skip
    rows = [
        [
            row["label"], row["method"], number(row["rank"]), number(row["alpha"]), number(row["scaling"], 3),
            f"{row['trainable_parameters']:,}", percent(row["trainable_ratio"]),
            decimals(row["update_norm_spectral_relative"]),
            decimals(row["effective_rank"], 1), decimals(row["stable_rank"], 1), decimals(row["rank_90"], 1),
        ]
        for row in comparison.rows()
    ]  # fmt: skip
    return table(header, rows, left=(0, 1)) + "\n" + NOTES["size"]


def _counts(comparison: Comparison) -> str:
    rows = comparison.rows()
    deep = any(row["null_p_value"] is not None for row in rows)
    curves = any(layer.weights is not None for report in comparison.reports for layer in report.layers)
    header = ["intruders", "‖dW‖/‖W0‖", "‖dW‖₂/θ", "total", "by chance"]
    header += ["p"] if deep else []
    header += ["share", "energy", "all", "in base", "kept", "shift"]
    header += ["free up to"] if curves else []
    lines = []
    for row, report in zip(rows, comparison.reports, strict=True):
        cells = [
            row["label"], decimals(row["update_norm_relative"]), decimals(row["update_over_threshold"], 2),
            str(row["intruders"]), by_chance(report.expected_by_chance),
            *([decimals(row["null_p_value"], 2)] if deep else []),
            f"{row['intruders'] / max(row['vectors_compared'], 1):.1%}", percent(row["intruder_energy_share"]),
            str(row["intruders_all"]), percent(row["rho_k"]), percent(row["principal_overlap"]),
            decimals(row["spectrum_shift"]),
        ]  # fmt: skip
        tried = sweeps.by_weight(report)
        most = f"> {tried[-1][0]:g}" if tried else "-"
        cells += [most if row["threshold"] is None else f"{row['threshold']:.2f}"] if curves else []
        lines.append([*cells, row["intruder_level"] + (" (partial)" if report.coverage.is_partial else "")])
    text = table([*header, "level"], lines, left=(0, len(header))) + "\n" + NOTES["counts"]
    if deep:
        nulls = [layer.null for report in comparison.reports for layer in report.layers if layer.null]
        text += "\n" + NOTES["null"].format(draws=nulls[0]["draws"])
        faint = sum(not null.get("drawn", True) for null in nulls)
        text += "\n" + NOTES["faint"].format(faint=faint, layers=len(nulls)) if faint else ""
    return text + ("\n" + NOTES["free"].format(most=max(_tried(comparison))) if curves else "")


def _tried(comparison: Comparison) -> list[float]:
    """The adapter weights that were tried."""
    return [weight for report in comparison.reports for weight, _ in sweeps.by_weight(report)]


def _module_types(comparison: Comparison) -> str:
    kinds = sorted({kind for report in comparison.reports for kind in report.summary["by_module_type"]})
    lines = []
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        by_type = report.summary["by_module_type"]
        judged = {kind: str(row["intruders"]) for kind, row in by_type.items() if row["layers"]}
        lines.append([label, *(judged.get(kind, "-") for kind in kinds)])
    last = [kind.rpartition(".")[2] for kind in kinds]
    header = last if len(set(last)) == len(last) else kinds
    return table(["by module type", *header], lines, left=(0,))


def _sweep(comparison: Comparison, title: str, values: Sequence[float], count: Callable[[Report, Any], str]) -> str:
    """One row a fine-tune, one column a value."""
    lines = [
        [label, *(count(report, value) for value in values)]
        for label, report in zip(comparison.labels, comparison.reports, strict=True)
    ]
    return table([title, *(number(value) for value in values)], lines, left=(0,)) if values else ""


def _at_epsilon(report: Report, epsilon: float) -> str:
    try:
        return str(sweeps.intruders_at(report, epsilon))
    except UsageError:  # only bounds are known, and they do not say
        return "-"


def _at_depth(report: Report, top_k: int) -> str:
    return str(sweeps.intruders_at(report, top_k=top_k))


def _depths(comparison: Comparison) -> list[int]:
    most = comparison.reports[0].settings["top_k"]
    return sorted({depth for depth in DEPTHS if depth < most} | {most})


def _weights(comparison: Comparison) -> str:
    tried = sorted(set(_tried(comparison)))
    if not tried:
        return ""
    shown = [weight for place, weight in enumerate(tried) if (place - tried.index(1.0)) % 2 == 0 or weight == 1]

    def count(report: Report, weight: float) -> str:
        counts = dict(sweeps.by_weight(report))
        return str(counts[weight]) if weight in counts else "-"

    return _sweep(comparison, "of W0 + s·dW, s =", shown, count)


def _overlaps(comparison: Comparison) -> str:
    if not comparison.overlaps:
        return ""
    labels = comparison.labels
    by_pair = {(item["a"], item["b"]): item for item in comparison.overlaps}
    lines = []
    for a, label in enumerate(labels):
        cells = (by_pair.get((min(a, b), max(a, b))) for b in range(len(labels)))
        lines.append([label, *("·" if cell is None else f"{cell['overlap']:.2f}" for cell in cells)])
    bare = [label.removesuffix(".safetensors").removesuffix(".gguf") for label in labels]
    bare = bare if len(set(bare)) == len(bare) else list(labels)
    short = [label if len(label) <= SHARED_WIDTH else "…" + label[1 - SHARED_WIDTH :] for label in bare]
    randoms = sorted(by_pair[pair]["random"] for pair in combinations(range(len(labels)), 2) if pair in by_pair)
    low, high = f"{randoms[0]:.2f}", f"{randoms[-1]:.2f}"
    note = NOTES["overlap"].format(random=low if low == high else f"{low} to {high}")
    return table(["overlap of updates", *short], lines, left=(0,)) + "\n" + note


def _layers(comparison: Comparison) -> str:
    """Each layer's count in each fine-tune."""
    names = list(dict.fromkeys(layer.name for report in comparison.reports for layer in report.layers))
    counts = [{layer.name: layer.intruders for layer in report.layers} for report in comparison.reports]
    lines = [[name, *(str(intruders[name]) if name in intruders else "-" for intruders in counts)] for name in names]
    return table(["intruders by layer", *comparison.labels], lines, left=(0,))


def _problems(comparison: Comparison) -> str:
    lines = [
        f"{label}: {line}"
        for label, report in zip(comparison.labels, comparison.reports, strict=True)
        for line in failures(report.failed)
    ]
    noisy = {layer.name for report in comparison.reports for layer in report.layers if layer.noise_like_base}
    if noisy:
        lines.append(
            f"note: the base of {plural(len(noisy), 'layer')} is plain noise, where anything moves the vectors: only "
            "counts named all have them"
        )
    return "\n".join(lines)


def _partial(comparison: Comparison) -> str:
    """Which fine-tunes are compared in part alone, and why."""
    lines = []
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        said = partial(report)
        if said is not None:
            lines += [f"Partial: of {label}, {said}.", *(f"  {line}" for line in unseen(report))]
    return "\n".join(lines)
