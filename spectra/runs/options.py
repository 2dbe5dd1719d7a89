"""The options that verbs share: each written once, with its type, what it is by default, and what it means.

A verb takes the groups that make sense for it as ``**options: Unpack[…]`` under :func:`takes_options`, which gives it
the signature and the docstring that ``help()``, editors and the documentation show.

Annotations are evaluated here (no ``from __future__ import annotations``): they hold the options.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

from spectra.errors import UsageError
from spectra.sources.live import Source

# Called with (work done, work in all, layer just finished); work is in units of m·n·min(m, n).
Progress: TypeAlias = Callable[[float, float, str], None]
CacheFolder: TypeAlias = str | Path | Literal[False] | None
# How signatures show types whose own form is long.
READABLE = {
    "include": "str | Iterable[str]", "exclude": "str | Iterable[str]", "ignore_options": "str | Iterable[str]",
    "initial_adapter": "Source | None", "cache": "str | Path | Literal[False] | None",
    "progress": "Progress | bool | None",
}  # fmt: skip
MARK = "{options}"  # where a docstring's parameters go on with the shared ones


class Option(NamedTuple):
    """What an option is by default, and what it means, in one sentence or two."""

    default: Any
    help: str


class Definition(TypedDict, total=False):
    """What counts as an intruder."""

    top_k: Annotated[int, Option(10, "how many leading singular vectors of each tuned weight to look at.")]
    epsilon: Annotated[float, Option(0.5, "an intruder's |cos| with every base vector is below this.")]
    side: Annotated[str, Option("left", 'which singular vectors: "left", as in the paper, or "right".')]


class Layers(TypedDict, total=False):
    """Which layers."""

    include: Annotated[
        str | Iterable[str],
        Option(
            (),
            "shell patterns, or one; only modules with a match anywhere in their name are analysed.  End a layer's "
            "number with a dot (``layers.1.``), or 10 to 19 match too.",
        ),
    ]
    exclude: Annotated[str | Iterable[str], Option((), "patterns, or one; modules with a match are left out.")]


class AccessOptions(TypedDict, total=False):
    """What may be done to read what is named."""

    allow_pickle: Annotated[
        bool,
        Option(
            False,
            "also read weights that are pickled, where a folder has no others.  Nothing in a pickle is executed, and "
            "one that is more than a dictionary of tensors is refused.",
        ),
    ]
    local_files_only: Annotated[
        bool,
        Option(False, "download nothing: names on the hub are resolved from the local cache only."),
    ]


class Reading(Layers, AccessOptions, total=False):
    """How the fine-tune and its base are read."""

    split_fused: Annotated[
        bool,
        Option(
            False,
            "split matrices that hold several projections (qkv_proj, gate_up_proj, c_attn and others) into these, as "
            "config.json says; on both sides, since a split weight is never compared with a fused one.",
        ),
    ]
    initial_adapter: Annotated[
        Source | None,
        Option(
            None,
            "the adapter as it was saved before training, for one whose initialisation changed the base in a way that "
            "cannot be computed from it (``pissa_niter_*``, ``corda``, ``lora_ga``).",
        ),
    ]
    ignore_options: Annotated[
        str | Iterable[str],
        Option(
            (),
            "names of options in ``adapter_config.json`` that are not known here, read as if they were not there: of "
            "those that are known to change no weight.",
        ),
    ]


class Device(TypedDict, total=False):
    """Where and with how many threads."""

    device: Annotated[str, Option("cpu", '"cpu" or "cuda", with an index if need be.')]
    threads: Annotated[
        int | None,
        Option(
            None,
            "threads for one weight.  It is recorded, since it may change last digits.  By default torch's own number "
            "(which respects OMP_NUM_THREADS), shared among the workers.",
        ),
    ]
    progress: Annotated[
        Progress | bool | None,
        Option(None, "called after each layer as progress(done, total, layer); True shows a bar."),
    ]


class Precision(TypedDict, total=False):
    """The precision of the computation."""

    dtype: Annotated[
        str,
        Option(
            "float32",
            'the precision of the computation, "float32" or "float64".  Weights stored in float64 are decomposed in '
            "float64 either way, since rounding them could hide the update.",
        ),
    ]


class Workers(TypedDict, total=False):
    """How much at a time."""

    workers: Annotated[int, Option(1, "how many base weights are worked on at a time; memory grows with it.")]


class Fingerprints(TypedDict, total=False):
    """What identifies the files."""

    hash_contents: Annotated[bool, Option(False, "hash every byte of all files into the fingerprints.")]


class Engine(TypedDict, total=False):
    """How verdicts are reached."""

    engine: Annotated[
        str,
        Option(
            "auto",
            '"auto", "exact", "krylov" or "cached"; the verdicts are the same.  Krylov decides large weights without '
            "decomposing the base, and gives bounds where the others give cosines; cached decomposes the base once for "
            "all fine-tunes, or takes the spectra that :func:`spectra.cache` kept.",
        ),
    ]
    cache: Annotated[
        CacheFolder,
        Option(None, "the folder of kept spectra; None for the usual one, False to use none."),
    ]


class AuditOptions(Definition, Reading, Engine, Precision, Device, Workers, Fingerprints, total=False):
    """What :func:`spectra.audit` shares with the other verbs."""


class RankOptions(Reading, Precision, Device, Workers, Fingerprints, total=False):
    """What verbs take that decompose the update alone."""


class LayerOptions(Definition, Reading, Precision, Device, total=False):
    """What verbs take that look at single layers."""


class ExtractOptions(Layers, AccessOptions, Precision, Device, Workers, total=False):
    """What :func:`spectra.extract` shares with the other verbs: it reads whole checkpoints as they are."""


class CheckOptions(AccessOptions, Precision, Device, total=False):
    """What verbs take that look at the whole of what they are given."""


class CacheOptions(Layers, AccessOptions, Precision, Device, total=False):
    """What verbs take that read a base alone."""


class InspectOptions(Reading, total=False):
    """What verbs take that read headers alone."""


class LayerReading(Reading, Precision, Device, total=False):
    """What goes through the layers of a fine-tune takes."""


def options_of(group: type) -> dict[str, tuple[Any, Option]]:
    """{name: (type, option)} of a group, in the order in which help shows them."""
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in group.__annotations__.items()}


def defaults_of(group: type) -> dict[str, Any]:
    """What each option of a group is by default."""
    return {name: option.default for name, (_, option) in options_of(group).items()}


Verb = TypeVar("Verb", bound=Callable[..., Any])


def takes_options(group: type, **defaults: Any) -> Callable[[Verb], Verb]:
    """Gives a verb that is written with ``**options: Unpack[group]`` the options of that group by name.

    The verb gets every option, those that were not given as they are by default.  Its docstring's ``{options}`` becomes
    their explanations.

    Parameters
    ----------
    group : a TypedDict of this module.
    defaults : of this verb alone, where they differ.
    """

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb)
        shared = options_of(group)
        kinds = inspect.Parameter
        parameters = [item for item in own.parameters.values() if item.kind is not kinds.VAR_KEYWORD]
        for name, (hint, option) in shared.items():
            default = defaults.get(name, option.default)
            parameters.append(kinds(name, kinds.KEYWORD_ONLY, default=default, annotation=READABLE.get(name, hint)))
        signature = own.replace(parameters=parameters)

        @functools.wraps(verb)
        def wrapped(*given: Any, **named: Any) -> Any:
            try:
                bound = signature.bind(*given, **named)
            except TypeError as error:
                named_only = "; give everything after tuned and base by name" if len(given) > 2 else ""
                raise TypeError(f"{verb.__name__}(): {error}{named_only}") from None
            bound.apply_defaults()
            return verb(*bound.args, **bound.kwargs)

        wrapped.__signature__ = signature  # type: ignore[attr-defined]  # where inspect looks for it
        wrapped.__doc__ = (verb.__doc__ or "").replace(MARK, _explained(shared).strip())
        return wrapped  # type: ignore[return-value]  # which takes and returns what the verb does

    return decorate


def _explained(shared: Mapping[str, tuple[Any, Option]]) -> str:
    """The options as a docstring's parameters, four spaces in."""
    lines = []
    for name, (_, option) in shared.items():
        text = f"{name} : {option.help}".replace(".  ", ".\x00 ")
        wrapped = textwrap.fill(
            text, width=118, initial_indent="    ", subsequent_indent="        ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        lines.append(wrapped.replace("\x00", " "))
    return "\n".join(lines)


def patterns_of(name: str, given: Any) -> tuple[str, ...]:
    """Patterns over module names: one string is one pattern, never its letters; raises UsageError for anything else."""
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{name} = {given!r:.80}; expected a pattern over module names, or several")
    return patterns
