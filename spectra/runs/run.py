"""Fine-tunes opened, matched and checked before any work: which base weights each changes, and how each is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol, TypeVar

from torch import Tensor

from spectra.adapters import Plan, Skipped, lying_beside, plan_updates, uses_initial, without_options
from spectra.errors import ConvergenceError, NonFiniteError, SpectraError, UsageError, in_short
from spectra.files.checkpoint import Checkpoint
from spectra.pairing.fused import split_apart
from spectra.pairing.pairs import LayerPair, pair_layers, why_not_merged
from spectra.pairing.precision import caveat, quantised_as
from spectra.records.coverage import UNSEEN
from spectra.runs.settings import Settings
from spectra.sources.claimed import about_claimed
from spectra.sources.live import Source, said_of
from spectra.sources.resolve import Bases, named_base, open_tuned
from spectra.updates.algebra import TunedWeight, merged

NAMED = 3  # of what is not looked at, in an error


class Run(Protocol):
    """One fine-tune: which base weights it changes, and how each is read."""

    base: Checkpoint
    pairs: tuple[LayerPair, ...]
    skipped: tuple[Skipped, ...]
    settings: Settings

    def facts(self) -> dict[str, Any]:
        """What the report says under ``tuned``."""
        ...

    def update(self, pair: LayerPair) -> dict[str, Any]:
        """What the report says of one layer's update."""
        ...

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        """W1, and whether a copy of the base that came with it is another weight than W0."""
        ...

    def prefetch(self, pair: LayerPair) -> None:
        """Has the disk work ahead."""
        ...

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        """(status, message) of a layer that could not be analysed."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(eq=False)
class SingleRun:
    """One fine-tune of a base, matched; :func:`open_run` opens one.

    ``counterpart`` names the base's tensor for a name of a full fine-tune's, or None.
    """

    tuned: Checkpoint
    base: Checkpoint
    settings: Settings
    plan: Plan
    pairs: tuple[LayerPair, ...]
    skipped: tuple[Skipped, ...]
    counterpart: Callable[[str], str | None]

    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.tuned.path),
            "format": self.plan.format,
            **fingerprint(self.tuned, self.settings.hash_contents),
            **self.plan.facts,
        }

    def update(self, pair: LayerPair) -> dict[str, Any]:
        return {
            "kind": pair.update.kind,
            "rank": pair.update.rank,
            "alpha": pair.update.alpha,
            "scaling": pair.update.scaling,
            "parameters": pair.update.parameters,
            "dense_parameters": pair.shape[0] * pair.shape[1],
        }

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        update = pair.read_update(self.tuned, W0.dtype, self.settings.device)
        return update.tuned(W0), pair.base_copy_differs(self.tuned, W0)

    def prefetch(self, pair: LayerPair) -> None:
        self.tuned.prefetch([pair.made] if pair.made else pair.update.tensors)

    def non_finite(self, pair: LayerPair) -> tuple[str, ...]:
        """The tensors of an update that hold NaN or infinity; of what follows from stored ones, the weight itself."""
        if pair.made:
            return () if is_finite(self.tuned.load(pair.made)) else (pair.made.name,)
        values = ((name, self.tuned.read(name)) for name in pair.update.tensors)
        return tuple(name for name, value in values if value.is_floating_point() and not is_finite(value))

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        names = pair.update.tensors
        if isinstance(error, NonFiniteError):  # say which of them
            names = self.non_finite(pair)
            scaled = pair.made is not None and pair.made.quantised is not None
            why = "its stored scales give NaN or infinity" if scaled else "holds NaN or infinity"
            error = NonFiniteError(why if names else "too large for this precision; try --dtype float64")
        return explain(error, f"{self.tuned.path}: {', '.join(names or pair.update.tensors)}")


def open_run(tuned: Source, base: Source | None, settings: Settings, bases: Bases | None = None) -> SingleRun:
    """Opens a fine-tune and its base, fetching what is not on this machine, and matches them by their headers.

    Parameters
    ----------
    tuned, base : what the user names; without ``base`` it is the one that ``tuned`` names or sits in.
    bases : those that are open already.

    Raises
    ------
    SpectraError : it cannot be read, does not fit the base, or changes none of its weights.
    """
    opened = without_options(open_tuned(tuned, settings.access), settings.ignore_options)
    opened_base = (bases or Bases(settings.access)).of(opened, base)
    if settings.split_fused:
        opened_base, opened = split_apart(opened_base, opened)
    before = settings.initial_adapter
    initial = open_tuned(before, settings.access) if before is not None else None
    plan = plan_updates(opened, initial)
    pairing = pair_layers(opened_base, opened, plan, include=settings.include, exclude=settings.exclude)
    if not pairing.pairs:
        raise UsageError(f"{opened.path}: nothing to analyse ({pairing.why_empty})")
    skipped = (*pairing.skipped, *lying_beside(opened, plan))
    return SingleRun(opened, opened_base, settings, plan, pairing.pairs, skipped, pairing.counterpart)


def check_whole(run: SingleRun, what: str) -> None:
    """Raises UsageError where a part of the fine-tune is not looked at, of which ``what`` would be made."""
    unseen = [item for item in run.skipped if item.kind in UNSEEN]
    if unseen:
        listed = "; ".join(f"{item.name}: {item.reason}" for item in unseen[:NAMED])
        more = f"; and {len(unseen) - NAMED} more" if len(unseen) > NAMED else ""
        raise UsageError(f"{run.tuned.path}: {what} of a part of the fine-tune would lose the rest ({listed}{more})")


class MergedRun:
    """Several fine-tunes of one base merged with weights: W0 + Σ weight·dW.

    Raises
    ------
    UsageError : nothing to merge, a weight that is no finite number, not one base, vocabularies that were
        resized to different lengths, or a base weight that one of them has in another form or layout than another.
    """

    def __init__(self, parts: Sequence[tuple[float, SingleRun]]):
        if not parts:
            raise UsageError("a merge of nothing")
        for weight, run in parts:
            if not math.isfinite(weight):
                raise UsageError(f"{run.tuned.path}: weight = {weight}; expected a finite number")
            if run.plan.sharing:
                raise UsageError(f"{run.tuned.path}: its layers are copies (layer_replication), so it is not merged")
        self.parts = tuple(parts)
        self.base, self.settings = parts[0][1].base, parts[0][1].settings
        self.skipped = tuple({item: None for _, run in parts for item in run.skipped})
        check_one_base([run for _, run in parts])
        self._sources: dict[Hashable, list[tuple[float, SingleRun, LayerPair]]] = defaultdict(list)
        for weight, run in parts:
            for pair in run.pairs:
                self._sources[pair.base_key].append((weight, run, pair))
        self.pairs = tuple(
            replace(sources[0][2], float64=any(pair.float64 for _, _, pair in sources))
            for sources in self._sources.values()
        )
        how = why_not_merged(self.pairs)
        if how:
            raise UsageError(f"{self.name}: {how}, so they cannot be merged")

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g}*{run.tuned.path}" for weight, run in self.parts)

    def facts(self) -> dict[str, Any]:
        parts = []
        for weight, run in self.parts:
            facts = run.facts()
            parts.append({"weight": weight, **{key: value for key, value in facts.items() if key != "path"}})
        covers = {part["fingerprint_covers"] for part in parts}
        value: dict[str, Any] = {"path": self.name, "format": "merged"}
        for key in ("fingerprint", "fingerprint_headers"):
            text = "\n".join(f"{part['weight']!r} {part[key]}" for part in parts)
            value[key] = f"sha256:{sha256(text.encode()).hexdigest()}"
        value["fingerprint_covers"] = covers.pop() if len(covers) == 1 else "headers"
        return {**value, "rank": None, "alpha": None, "scaling": None, "parts": parts}

    def update(self, pair: LayerPair) -> dict[str, Any]:
        parts = [run.update(own) for _, run, own in self._sources[pair.base_key]]
        ranks = [part["rank"] for part in parts]
        return {
            **parts[0],
            "kind": "merged",
            "rank": None if None in ranks else sum(ranks),
            "alpha": None,
            "scaling": None,
            "parameters": sum(part["parameters"] for part in parts),
        }

    def weight(self, pair: LayerPair, W0: Tensor) -> tuple[TunedWeight, bool]:
        differing = []

        def parts() -> Iterator[tuple[float, TunedWeight]]:  # one at a time in memory
            for weight, run, own in self._sources[pair.base_key]:
                tuned, differs = run.weight(own, W0)
                differing.append(differs)
                yield weight, tuned

        return merged(W0, parts()), any(differing)

    def prefetch(self, pair: LayerPair) -> None:
        for _, run, own in self._sources[pair.base_key]:
            run.prefetch(own)

    def explain(self, pair: LayerPair, error: Exception) -> tuple[str, str]:
        sources = [(run, own) for _, run, own in self._sources[pair.base_key]]
        if isinstance(error, NonFiniteError):  # of the parts whose values these are, if any
            sources = [(run, own) for run, own in sources if run.non_finite(own)] or sources
        explained = [run.explain(own, error) for run, own in sources]
        return explained[0][0], "; ".join(message for _, message in explained)


def check_one_base(runs: Sequence[Run]) -> None:
    """Raises UsageError where fine-tunes of different bases were given."""
    paths = {run.base.place: run.base.path for run in runs}
    if len(paths) > 1:
        raise UsageError(
            f"these are fine-tunes of different bases ({', '.join(map(str, paths.values()))}); name one with --base"
        )


def fingerprint(checkpoint: Checkpoint, hash_contents: bool) -> dict[str, Any]:
    """The report's fields for what identifies a checkpoint."""
    made = checkpoint.fingerprint(hash_contents=hash_contents)
    where = {"in_memory": True} if checkpoint.in_memory else {}
    return {**where, "fingerprint": made.value, "fingerprint_covers": made.covers, "fingerprint_headers": made.headers}


def base_facts(run: Run) -> dict[str, Any]:
    """What a report says under ``base``."""
    if isinstance(run, SingleRun):
        agrees, precision = named_base(run.tuned, run.base), caveat(run.base, run.tuned, run.plan)
        said = about_claimed(run.tuned, run.base, agrees, run.settings.access.allow_pickle)
    else:
        agrees, precision, said = None, caveat(run.base), None
    return {
        "path": str(run.base.path),
        "format": run.base.layout,
        **fingerprint(run.base, run.settings.hash_contents),
        "named_by_adapter": agrees,
        "claimed": said,
        "quantised": quantised_as(run.base),
        "caveat": precision,
    }


def is_finite(value: Tensor) -> bool:
    """Whether all values are finite; of eight bits, too, for which torch cannot tell."""
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())


def explain(error: Exception, what: str) -> tuple[str, str]:
    """(status, message) of a layer that could not be analysed."""
    if isinstance(error, NonFiniteError):
        return "non_finite", f"{what}: {error}"
    if isinstance(error, ConvergenceError):
        return "not_converged", f"{what}: {error}"
    if isinstance(error, SpectraError):
        return "failed", str(error)
    return "failed", f"{what}: {in_short(error)}"


def opened(
    openings: Iterable[Callable[[], AnyRun]], on_unreadable: Callable[[SpectraError], None] | None
) -> list[AnyRun]:
    """The runs that could be opened; the errors of the others are handed over, or raised where nobody takes them."""
    runs = []
    for opening in openings:
        try:
            runs.append(opening())
        except SpectraError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    if runs:
        check_initial(runs)
    return runs


def check_initial(runs: Iterable[Run]) -> None:
    """Raises UsageError unless an initial adapter that was given is that of exactly one fine-tune."""
    singles: list[Run] = []
    for run in runs:
        singles += [own for _, own in run.parts] if isinstance(run, MergedRun) else [run]
    given = {said_of(item) for item in [run.settings.initial_adapter for run in singles] if item is not None}
    users = {
        run.tuned.place: run.tuned.path for run in singles if isinstance(run, SingleRun) and uses_initial(run.plan)
    }
    for path in given:
        if not users:
            raise UsageError(f"{path}: no fine-tune here has an initialisation that needs an initial adapter")
        if len(users) > 1:
            raise UsageError(
                f"{path}: it is the initial adapter of one fine-tune, but {len(users)} need one "
                f"({', '.join(sorted(map(str, users.values())))}); give them one at a time"
            )
