"""``iter_layers``: the weights of a fine-tune and its base, one layer at a time, to compute something else with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from spectra.errors import UsageError
from spectra.runs.jobs import Problem, as_finished, jobs_of
from spectra.runs.options import LayerReading, takes_options
from spectra.runs.progress import shown
from spectra.runs.run import Run, check_initial, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import Source

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.pairing.pairs import LayerPair
    from spectra.runs.jobs import Job
    from spectra.updates.algebra import TunedWeight


@dataclass(frozen=True, eq=False)
class Update:
    """What a fine-tune does to one base weight: W1 = W0 + dW.

    Attributes
    ----------
    name : the layer.
    kind : of the update: "low_rank", "row_scaled" and "column_scaled" (DoRA), "dense", and so on, as in a report.
    role : "linear", "embedding", "head" or "conv".
    rank, alpha, scaling : an adapter's own, or None.
    """

    name: str
    kind: str
    role: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    _weight: TunedWeight

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B, A), float64, (m, r) and (r, n), with dW = B·A; None where dW is not stored as a product."""
        return self._weight.low_rank()

    def delta(self) -> Tensor:
        """dW, (m, n), in the working precision."""
        return self._weight.delta()

    def tuned(self) -> Tensor:
        """W1, (m, n), in the working precision."""
        return self._weight.dense()

    def __repr__(self) -> str:
        m, n = self._weight.shape
        return f"<Update of {self.name}: {self.kind}, ({m}, {n}){'' if self.rank is None else f', rank {self.rank}'}>"


@takes_options(LayerReading)
def iter_layers(
    tuned: Source, base: Source | None = None, **options: Unpack[LayerReading]
) -> Iterator[tuple[str, Tensor, Update]]:
    """Goes through the layers that a fine-tune changes, one base weight in memory at a time.

    Parameters
    ----------
    tuned, base : as for :func:`spectra.audit`.
    {options}

    Yields
    ------
    (name, W0, update) : the layer's name; the base weight, (m, n), oriented as (out_features, in_features), in the
        working precision; and its :class:`Update`.  ``update.factors`` is (B, A), with the scaling included, or None
        where dW is no product; ``update.delta()`` always gives dW.

    Raises
    ------
    UsageError : if a layer cannot be read (the message names it).
    SpectraError : as for :func:`spectra.audit`; before the first layer if the headers already show it.

    Examples
    --------
    >>> import spectra
    >>> name, W0, update = next(spectra.iter_layers("fixtures/lora-r4"))
    >>> B, A = update.factors
    >>> B.shape[1] == update.rank
    True
    """
    run = open_run(tuned, base, checked_settings(**options))
    check_initial([run])
    return _layers(run, options)


def _layers(run: Run, options: LayerReading) -> Iterator[tuple[str, Tensor, Update]]:
    def update(W0: Tensor, run: Run, pair: LayerPair, weight: TunedWeight, _: bool) -> tuple[str, Tensor, Update]:
        facts = run.update(pair)
        made = Update(
            pair.name, facts["kind"], pair.role, facts["rank"], facts["alpha"], facts["scaling"], weight
        )  # fmt: skip
        return pair.name, W0, made

    def of_job(job: Job) -> list[tuple[str, Tensor, Update] | Problem]:
        return [outcome for _, _, outcome in job.each(lambda W0: W0, update)]

    with shown(options["progress"]) as progress:
        for outcomes in as_finished(jobs_of([run]), run.settings, of_job, progress):
            for outcome in outcomes:
                if isinstance(outcome, Problem):
                    raise UsageError(outcome.message)
                yield outcome
