"""Similarity matrices of the layers that a report flags: the leading vectors of W0 and of W1, and no more of them.

A report keeps no arrays, so the few layers that are to be looked at are read once more.  Small weights are
decomposed by their float64 Gram matrix, large ones by block Lanczos; a full decomposition of a large weight, which
may take longer than its audit, is never made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import numpy as np
from torch import Tensor

from spectra.pairing.pairs import LayerPair
from spectra.records.comparison import report_labels
from spectra.records.layer import Similarity
from spectra.records.report import Report, worst_layers
from spectra.runs.jobs import Job, as_finished, jobs_of
from spectra.runs.options import CheckOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.run import Run, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import Source
from spectra.svd import Base, check_finite
from spectra.svd.base import ROOMY
from spectra.svd.decompose import decompose_gram
from spectra.svd.lanczos import Turned, leading_pairs
from spectra.updates.algebra import DenseWeight, TunedWeight

NUMBER = 12  # matrices of a report where no number is given
SIZE = 64  # leading vectors of each side
LARGE = 32  # the same of weights from ROOMY on, where 64 took three times as long (2048 and 4096 wide)
ACCURACY = 1e-3  # of a direction from Lanczos: a cosine is then off by less than a shade of the picture


@takes_options(CheckOptions)
def similarity_matrices(
    reports: Report | Sequence[Report],
    *,
    number: int = NUMBER,
    size: int = SIZE,
    initial_adapter: Source | None = None,
    **options: Unpack[CheckOptions],
) -> list[Similarity]:
    """How the leading singular vectors of the worst layers of each report relate to the base's.

    Parameters
    ----------
    reports : of fine-tunes whose files still lie where they were; merges and models in memory have none, and are
        left out.  Nothing is downloaded: what the audit took from a hub is in its cache.
    number : how many layers of each report, those with the most intruders first.
    size : how many leading vectors of W0 and of W1; of weights from 1024 on at most 32.
    initial_adapter : as for :func:`spectra.audit`.
    {options}

    Returns
    -------
    list of Similarity : of those layers for which ``size`` vectors, or else the ``top_k`` compared ones, could be
        computed cheaply; a weight whose leading values lie too close together for Lanczos is left out.

    Raises
    ------
    SpectraError : the fine-tunes cannot be read any more, or no longer have those layers.
    """
    reports = [reports] if isinstance(reports, Report) else list(reports)
    runs, wanted = [], {}
    for label, report in zip(report_labels(reports), reports, strict=True):
        names = {layer.name for layer in worst_layers(report, number)}
        if not names or report.tuned["format"] == "merged" or _in_memory(report):
            continue
        chosen = report.settings
        settings = checked_settings(
            **{**options, "local_files_only": True}, top_k=chosen["top_k"], epsilon=chosen["epsilon"],
            side=chosen["side"], split_fused=bool(chosen.get("split_fused")),
            ignore_options=chosen.get("ignore_options", ()), initial_adapter=initial_adapter,
        )  # fmt: skip
        run = open_run(report.tuned["path"], report.base["path"], settings)
        run = replace(run, pairs=tuple(pair for pair in run.pairs if pair.name in names))
        runs.append(run)
        wanted[id(run)] = label
    if not runs:
        return []
    of_job = partial(_of_job, labels=wanted, size=size)
    with shown(options["progress"]) as progress:
        matrices = [one for some in as_finished(jobs_of(runs), runs[0].settings, of_job, progress) for one in some]
    order = {
        (label, layer.name): place
        for label, report in zip(report_labels(reports), reports, strict=True)
        for place, layer in enumerate(worst_layers(report, number))
    }
    labels = list(report_labels(reports))
    return sorted(matrices, key=lambda one: (labels.index(one.tuned), order[one.tuned, one.name]))


def _in_memory(report: Report) -> bool:
    """Whether the fine-tune or its base was a model in memory, or is not known any more (a canonical report)."""
    parts = (report.tuned, report.base)
    return any(part.get("in_memory") or part.get("path") is None for part in parts)


def _of_job(job: Job, *, labels: Mapping[int, str], size: int) -> list[Similarity]:
    """The matrices of one base weight; what cannot be computed is left out."""

    def prepared(W0: Tensor) -> tuple[Base, dict[int, Tensor | None]]:
        check_finite(W0)
        return Base(W0, job.parts[0][0].settings.question.side), {}

    def matrix(
        base: tuple[Base, dict[int, Tensor | None]], run: Run, pair: LayerPair, tuned: TunedWeight, _: bool
    ) -> Similarity | None:
        cosines = _cosines(base[0], tuned, size, run.settings.question.top_k, base[1])
        return None if cosines is None else Similarity(pair.name, labels[id(run)], base[0].side, cosines)

    return [outcome for _, _, outcome in job.each(prepared, matrix) if isinstance(outcome, Similarity)]


def _cosines(
    base: Base, tuned: TunedWeight, size: int, top_k: int, known: dict[int, Tensor | None]
) -> np.ndarray | None:
    """(≤ k, ≤ k) |cos| for k = ``size``, or else ``top_k``; ``known`` keeps W0's vectors for further fine-tunes."""
    p = min(base.W0.shape)
    size = min(size, p if p < ROOMY else LARGE)
    for k in dict.fromkeys((size, min(top_k, size))):
        if k not in known:
            known[k] = _leading(base, DenseWeight(base.W0, base.W0), k)
        before = known[k]
        after = None if before is None else _leading(base, tuned, k)
        if before is not None and after is not None:
            cosines: np.ndarray = (before.T @ after).abs().clamp_max(1.0).cpu().numpy()
            return cosines
    return None


def _leading(base: Base, weight: TunedWeight, k: int) -> Tensor | None:
    """The ≤ k leading singular vectors on the side in question, float64; None where only a full decomposition tells."""
    if base.W.shape[0] < ROOMY:
        spectrum = decompose_gram(weight, base.side, keep=k)
        return spectrum.vectors[:, : min(k, spectrum.rank)]
    pairs = leading_pairs(base, weight, k, ACCURACY)
    if pairs is None:
        return None
    Y = pairs.Y.double()
    if not base.is_aligned:
        Y = Turned(weight, base.short == "left").rmatmul64(Y)
    unit: Tensor = Y / Y.norm(dim=0)
    return unit
