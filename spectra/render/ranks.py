"""A rank report for people and as CSV: first the suggestion, its cost and its loss."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import TypeVar

from spectra.records.ranks import ROW_COLUMNS, LayerRank, RankReport, Suggestion
from spectra.render.columns import in_ascii, method_of, plural, table
from spectra.render.coverage import headline
from spectra.render.table import as_csv

Item = TypeVar("Item")

WIDTH = 110
SHOWN_PATTERNS = 60  # entries of rank_pattern and alpha_pattern up to which the config is printed unasked
SHOWN_LEFT_OUT = 3


def render_ranks(report: RankReport, *, verbose: bool = False, ascii_only: bool = False) -> str:
    """The suggestion, what it costs and loses, the ranks by module type (or layer), alpha, and the config."""
    sections = [headline(report) or "", _answer(report), _facts(report), _problems(report), _table_of(report, verbose)]
    if report.suggestion is not None:
        sections += [fill(about_alpha(report.suggestion), WIDTH), _config(report.suggestion, verbose)]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return in_ascii(text) if ascii_only else text


def to_csv(reports: Sequence[RankReport]) -> str:
    """The rows of :meth:`RankReport.rows`."""
    return as_csv(ROW_COLUMNS, (row for report in reports for row in report.rows()))


def reasons(suggestion: Suggestion) -> list[str]:
    """What the suggestion costs, what it loses, and why these ranks, a sentence or two each."""
    choices, energy = suggestion.choices, suggestion.energy
    errors = [choice.relative_error for choice in choices]
    lines = [
        f"cost       {suggestion.parameters:,} values to train, "
        f"{suggestion.parameters / suggestion.dense_parameters:.1%} of the {suggestion.dense_parameters:,} in these "
        f"weights; the fine-tune stored {suggestion.trained_parameters:,} for them",
        f"loses      {suggestion.relative_error:.1%} of the change over all of them (‖dW − dW_r‖/‖dW‖), "
        f"{_span(errors, '{:.1%}')} by layer",
    ]
    shared = {"layer": "each layer", "type": "each module type", "model": "all layers together"}[suggestion.by]
    why = f"the smallest rank that holds {energy:.4g} of ‖dW‖², for {shared}"
    if energy < 1:
        why += f"; that is, all but {math.sqrt(1 - energy):.0%} of the change's size"
    lines.append(f"why        {why}")
    capped = Counter(choice.capped for choice in choices)
    if capped["max_rank"]:
        lines.append(
            f"           {plural(capped['max_rank'], 'layer')} capped at the largest rank allowed, "
            f"{suggestion.max_rank}"
        )
    if capped["break_even"]:
        lines.append(
            f"           {plural(capped['break_even'], 'layer')} capped at the break-even rank, beyond which factors "
            "store more than the weight"
        )
    if suggestion.left_out:
        reasons_left = Counter(item["reason"] for item in suggestion.left_out)
        share = f"; {suggestion.left_out_share:.0%} of Σ‖dW‖² lies there" if suggestion.left_out_share else ""
        lines.append(f"left out   {plural(len(suggestion.left_out), 'layer')}{share}")
        for reason, count in reasons_left.most_common():
            names = [item["name"] for item in suggestion.left_out if item["reason"] == reason]
            more = ", …" if count > SHOWN_LEFT_OUT else ""
            lines.append(f"           {', '.join(names[:SHOWN_LEFT_OUT])}{more}: {reason}")
    if suggestion.rescaled:
        lines.append(
            f"note       {plural(suggestion.rescaled, 'layer')} trained with DoRA: their dW also holds the rescaling "
            "of the base's rows or columns, which a plain LoRA spends ranks on"
        )
    return lines


def about_alpha(suggestion: Suggestion) -> str:
    """What alpha does, and how sure the choice is."""
    scalings = _span([choice.scaling for choice in suggestion.choices], "{:.3g}")
    if suggestion.use_rslora:
        text = (
            "About alpha: with rsLoRA the scaling is alpha/√r, under which one alpha serves all ranks (Kalajdzievski "
            f"2023, arXiv 2312.03732); here it is {scalings}. Which alpha is best is left to tuning."
        )
    else:
        text = f"About alpha: the scaling is alpha/r, here {scalings}."
    if suggestion.alpha_rule == "2r":
        text += (
            " alpha = 2r is a recommendation of Shuttleworth et al. 2024 (arXiv 2410.21228), not a law: with a fixed "
            "alpha they saw more intruder dimensions and a lower effective rank at high ranks."
        )
    return text + (
        " The best alpha and rank are open questions: Schulman et al. 2025 (“LoRA Without Regret”) keep alpha fixed, "
        "so that the scaling falls as 1/r and one learning rate serves all ranks, and find that adapting all layers "
        "matters more than the rank."
    )


def _answer(report: RankReport) -> str:
    suggestion = report.suggestion
    if suggestion is None:
        unnamed = next((layer.unnamed for layer in report.layers if layer.unnamed and layer.update_norm_fro > 0), None)
        if unnamed:
            return f"Suggestion: none — what changed is {unnamed}."
        return "Suggestion: none — no linear layer changed."
    ranks = [choice.rank for choice in suggestion.choices]
    what = f"r = {suggestion.r}" + (f" ({_span(ranks)} by layer)" if len(set(ranks)) > 1 else "")
    method = "rsLoRA" if suggestion.use_rslora else "LoRA"
    alpha = f"alpha = {suggestion.alpha_rule}"
    lines = [f"Suggestion: {method} with {what}, {alpha}, for {plural(len(ranks), 'layer')}."]
    capped = sum(choice.capped == "break_even" for choice in suggestion.choices)
    if 2 * capped >= len(ranks):
        lines.append("For most of them no rank below break-even is enough: training these weights whole costs no more.")
    return "\n".join(lines)


def _facts(report: RankReport) -> str:
    tuned = report.tuned
    lines = [f"fine-tune  {tuned['path']}  ({method_of(tuned)})"]
    if tuned.get("conditional"):
        lines.append("           conditional: active only after its invocation tokens, which no suggestion covers")
    lines.append(f"base       {report.base['path']}")
    if report.base.get("caveat"):
        lines.append(f"           note: {report.base['caveat']}")
    if report.suggestion is not None:
        lines += reasons(report.suggestion)
    if report.skipped:
        lines.append(f"skipped    {len(report.skipped)} of the fine-tune's tensors: no spectrum, or no base weight")
    return "\n".join(lines)


def _problems(report: RankReport) -> str:
    return "\n".join(f"{item['status']}: {item['name']}: {item['error']}" for item in report.failed)


def _table_of(report: RankReport, verbose: bool) -> str:
    choices = {choice.name: choice for choice in (report.suggestion.choices if report.suggestion else ())}
    groups: dict[str, list[LayerRank]] = defaultdict(list)
    for layer in report.layers:
        groups[layer.name if verbose else layer.module_type].append(layer)
    if not groups:
        return ""
    header = ["layer" if verbose else "by module type", "layers", "shape", "trained", "90%", "99%", "effective",
              "above noise", "suggested", "break-even", "loses", "‖dW‖/‖W0‖"]  # fmt: skip
    rows = []
    for name, layers in groups.items():
        chosen = [choices[layer.name] for layer in layers if layer.name in choices]

        shapes = {layer.shape for layer in layers}
        rows.append([
            name, str(len(layers)), "×".join(map(str, shapes.pop())) if len(shapes) == 1 else "several",
            _over(layers, lambda layer: layer.trained_rank), _over(layers, lambda layer: layer.rank_90),
            _over(layers, lambda layer: layer.rank_99), _over(layers, lambda layer: layer.effective_rank, "{:.1f}"),
            _over(layers, lambda layer: layer.noise_rank),
            _over(chosen, lambda choice: choice.rank), _over(layers, lambda layer: layer.break_even_rank),
            _over(chosen, lambda choice: choice.relative_error, "{:.0%}"),
            _over(layers, lambda layer: layer.update_norm_relative, "{:.3f}"),
        ])  # fmt: skip
    # Columns that say nothing here, such as a rank that no full fine-tune has.
    columns = [
        i for i, title in enumerate(header)
        if any(row[i] != "-" for row in rows) and not (verbose and title == "layers")
    ]  # fmt: skip
    text = table([header[i] for i in columns], [[row[i] for i in columns] for row in rows], left=(0,))
    notes = "90% and 99% are the ranks that hold that share of ‖dW‖²"
    if any(layer.noise_rank is not None for layer in report.layers):
        notes += "; above noise: singular values that stand out of the bulk (Marchenko–Pastur edge)"
    return text + "\n\n" + fill(notes + "; effective is exp of the entropy of its singular values.", WIDTH)


def _config(suggestion: Suggestion, verbose: bool) -> str:
    config = suggestion.peft_config()
    entries = len(config["rank_pattern"]) + len(config["alpha_pattern"])
    if entries > SHOWN_PATTERNS and not verbose:
        return (
            f"The config has {entries} patterns; --verbose prints it, and --format json holds it as suggestion.config. "
            "One rank for each module type makes it short."
        )
    return "config\n" + json.dumps(config, indent=1, ensure_ascii=False)


def _over(items: Iterable[Item], get: Callable[[Item], float | None], form: str = "{}") -> str:
    return _span([value for item in items if (value := get(item)) is not None], form)


def _span(values: Iterable[float], form: str = "{}") -> str:
    """The smallest and the largest value, or the one that both are."""
    ordered = sorted(values)
    if not ordered:
        return "-"
    ends = [form.format(ordered[0]), form.format(ordered[-1])]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)
