"""Names of a fine-tune's modules found among the base's, which model classes call differently."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from itertools import dropwhile
from typing import Any

from spectra.adapters import PlannedUpdate
from spectra.errors import WrongBaseError
from spectra.files.checkpoint import Checkpoint
from spectra.files.derived import Unreadable, Weight
from spectra.files.orientation import TIED
from spectra.files.stored import other_forms
from spectra.files.stored.rows import own_name

# What model classes put before the names of one and the same network.
WRAPPERS = frozenset(
    [
        "model",
        "transformer",
        "language_model",
        "base_model",
        "backbone",
        "module",
        "_orig_mod",
        "bert",
        "roberta",
        "distilbert",
        "electra",
        "deberta",
        "albert",
        "camembert",
        "xlm_roberta",
        "mpnet",
        "vit",
        "gpt_neox",
    ]
)
# transformers 5 renamed these; (tuned prefix, base prefix), tried in both directions
RENAMES = (("language_model.model.", "model.language_model."),)
DEEPEST = 16  # parts of a prefix; a crafted file could have any number
MANY = 50  # names that differ by wrappers alone; beyond, none of them could be meant anyway


class NameMatcher:
    """Finds base weights for target names that differ by what a model class puts before them.

    One prefix is taken off and another put on; which ones is decided by all targets together: the
    change of prefix that serves most of them wins.  A tie between two that lead to different weights is an error, not a
    guess, and so is a second one that serves several, unless the first takes off and puts on wrappers alone and serves
    all that the second does: a tower with more layers than the language model is no better for it.
    """

    def __init__(self, base: Checkpoint, updates: Sequence[PlannedUpdate], config: Mapping[str, Any] | None = None):
        """``config`` is the fine-tune's own, where it has one: it tells the forms of its weights."""
        self.base = base
        exact = {update.module: _first(update.targets, base.weights) for update in updates}
        taken = {name for name in exact.values() if name is not None}
        self._weights = dict(base.weights)
        if not all(exact.values()):
            forms = other_forms(base.weights, base.config, config) if config else base.alternatives
            self._weights = {**forms, **base.weights}
        similar = _Similar(self._weights, {target for update in updates for target in update.targets})
        votes: Counter[tuple[str, str]] = Counter()
        self._options: dict[str, list[tuple[tuple[str, str], str]]] = {}
        self._served: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._better: dict[tuple[tuple[str, str], tuple[str, str]], bool] = {}
        for update in updates:
            itself = exact[update.module]
            options = [(("", ""), itself)] if itself is not None else []
            targets = update.targets if itself is None else ()
            for change, name in [option for target in targets for option in similar.to(target)]:
                if name not in taken and self._could_fit(update, self._weights[name]):
                    options.append((change, name))
            self._options[update.module] = options
            votes.update(change for change, _ in options)
            for change, _ in options:
                self._served[change].add(update.module)
        self._votes = votes
        self._matched: dict[str, str] = {}
        self._changes: set[tuple[str, str]] = set()

    @staticmethod
    def _could_fit(update: PlannedUpdate, info: Weight) -> bool:
        if update.shape is None or isinstance(info, Unreadable):
            return True  # shapes are compared, and differences explained, when the pair is made
        if update.layout == "conv":
            return len(info.shape) > 2
        return sorted(info.shape) == sorted(update.shape)

    def find(self, update: PlannedUpdate) -> tuple[Weight | None, bool]:
        """The base's tensor, or None; and whether it is another module's that this one shares."""
        options = self._options[update.module]
        if update.may_be_new:  # a new head is not to be taken for whatever ends in the same name
            options = [(change, name) for change, name in options if self._votes[change] > 1 or _wrappers_only(change)]
        best = max((self._votes[change] for change, _ in options), default=0)
        winners = [change for change, _ in options if self._votes[change] == best]
        names = list(dict.fromkeys(name for change, name in options if self._votes[change] == best))
        rivals = [
            name for change, name in options if len(names) == 1 and self._is_rival(change, name, winners, names[0])
        ]
        if rivals or (len(names) > 1 and not update.may_be_new):
            names += rivals
            raise WrongBaseError(
                self.base.path,
                f"{update.module!r} could be any of {', '.join(map(repr, sorted(names)))}; Spectra does not guess",
            )
        if len(names) == 1:
            self._matched[update.module] = names[0]
            self._changes.update(change for change, _ in options if self._votes[change] == best)
            return self._weights[names[0]], False
        tied = self._tied(update)
        return tied, tied is not None

    def _is_rival(self, change: tuple[str, str], name: str, winners: Sequence[tuple[str, str]], matched: str) -> bool:
        """Whether a change of prefix that fewer updates can follow may be meant nevertheless."""
        if change in winners or own_name(self._weights[name]) == own_name(self._weights[matched]):
            return False
        return self._votes[change] > 1 and not any(self._is_better(winner, change) for winner in winners)

    def _is_better(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        """Whether a change is one of wrappers alone and serves all that another does."""
        if (one, other) not in self._better:
            self._better[one, other] = _wrappers_only(one) and self._served[other] <= self._served[one]
        return self._better[one, other]

    def _tied(self, update: PlannedUpdate) -> Weight | None:
        if update.module.split(".")[-1] not in ("lm_head", "embed_out"):
            return None
        embeddings = [name for name in self.base.weights if name.endswith(TIED)]
        return self.base.weights[embeddings[0]] if len(embeddings) == 1 else None

    def counterpart(self, name: str) -> str | None:
        """The base's tensor for any of the fine-tune, once :meth:`find` has been asked for all updates."""
        module, _, parameter = name.rpartition(".")
        weight = self._matched.get(module, "")
        if weight.endswith(".weight"):  # a parameter of a module that was matched
            own = weight.removesuffix("weight") + parameter
            return own if own in self.base.tensors else None
        if name in self.base.tensors:
            return name
        moved = {_moved(name, change) for change in self._changes} & self.base.tensors.keys()
        return moved.pop() if len(moved) == 1 else None


class _Similar:
    """Names of the base that a change of prefix leads to.

    Each name is taken apart once, so that thousands of them with one ending cost no more than others.
    """

    def __init__(self, names: Collection[str], targets: Container[str]):
        self._names = names
        self._longer: dict[str, list[str]] = defaultdict(list)  # target → names that end in it
        self._cores: dict[str, list[str]] = defaultdict(list)  # name without its wrappers → names
        for name in names:
            for ending in _endings(name):
                if ending in targets:
                    self._longer[ending].append(name)
            core = without_wrappers(name)
            if len(self._cores[core]) < MANY:
                self._cores[core].append(name)

    def to(self, target: str) -> Iterator[tuple[tuple[str, str], str]]:
        """(change of prefix, name) of each that is plausible."""
        candidates = [*self._longer.get(target, ()), *(end for end in _endings(target) if end in self._names)]
        candidates += self._cores.get(without_wrappers(target), ())
        for here, there in [*RENAMES, *((b, a) for a, b in RENAMES)]:
            if target.startswith(here) and there + target.removeprefix(here) in self._names:
                candidates.append(there + target.removeprefix(here))
        for name in dict.fromkeys(candidates):
            change = _prefix_change(target, name)
            if change is not None and _end(target) == _end(name):
                yield change, name


def _endings(name: str) -> Iterator[str]:
    """The name without its first parts, of which no more than a few belong to a prefix."""
    start = 0
    for _ in range(DEEPEST):
        start = name.find(".", start) + 1
        if not start:
            return
        yield name[start:]


def without_wrappers(name: str) -> str:
    """The name without the wrappers that it begins with."""
    first, dot, _ = name.partition(".")
    if dot and first not in WRAPPERS:
        return name
    parts = name.split(".")
    return ".".join(dropwhile(WRAPPERS.__contains__, parts[:-1])) + "." + parts[-1]


def _first(names: Sequence[str], among: Container[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _wrappers_only(change: tuple[str, str]) -> bool:
    return WRAPPERS.issuperset(part for prefix in change for part in prefix.split(".") if part)


def _end(name: str) -> str:
    """What two names of one weight always share: the last part, and its module's unless it stands alone."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "in_proj_weight", "qweight") else parts[-1]


def _moved(name: str, change: tuple[str, str]) -> str | None:
    """The name after a change of prefix, or None where it has not the prefix that is to be taken off."""
    here, there = (prefix + "." if prefix and not prefix.endswith(".") else prefix for prefix in change)
    return there + name.removeprefix(here) if name.startswith(here) else None


def _prefix_change(target: str, name: str) -> tuple[str, str] | None:
    """(prefix to take off ``target``, prefix to put on) that gives ``name``, if it is plausible.

    Plausible is: one of the two is empty, both are made of wrappers alone, or it is a known rename.
    """
    for here, there in [*RENAMES, *((b, a) for a, b in RENAMES)]:
        if target.startswith(here) and name == there + target.removeprefix(here):
            return here, there
    mine, theirs = target.split("."), name.split(".")
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    change = ".".join(mine[: len(mine) - shared]), ".".join(theirs[: len(theirs) - shared])
    if not shared or (all(change) and not _wrappers_only(change)):
        return None
    return change
