"""What the commands share: groups of arguments, what becomes of them, exit codes.

A command calls ``add_…`` for each group that it has, in the order in which its ``--help`` shows them,
and hands ``settings(options)`` to the pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from spectra.errors import SpectraError, UsageError, in_one_line

if TYPE_CHECKING:
    from spectra.records.report import Report
    from spectra.render.coverage import Covering

# What add_subparsers() returns, and what the add() of a command takes.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PARTIAL_ADVICE = "name a base that has all parts, leave out with --exclude what is not meant, or pass --allow-partial"
OK, GATE, BAD, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """exit codes:
  0  done
  1  a gate was crossed (--fail-above, --fail-above-share, --baseline)
  2  bad usage, unreadable input, a layer that could not be analysed, or a
     part of a fine-tune that was not looked at (--allow-partial accepts that);
     the report of the rest is still written
"""

TEXT = ("txt", "md", "log")  # endings of files that take a table
TUNED = (
    "adapter folder, checkpoint folder or pipeline, .safetensors or .gguf file (.bin with --allow-pickle), ORG/NAME "
    "on the Hugging Face hub, or an address that fsspec reads (s3://...)"
)
DTYPES = ("float32", "float64")

READING = ("include", "exclude", "split_fused", "ignore_options", "allow_pickle", "local_files_only", "initial_adapter")
COMPUTATION = ("engine", "dtype", "device", "workers", "threads", "cache", "hash_contents")
# The options of add_definition, add_layers, add_reading and add_computation, by the names that the verbs give them.
SETTINGS = frozenset({"top_k", "epsilon", "side"} | {*READING} | {*COMPUTATION})


def add_tuned(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """One fine-tune or several: ``options.tuned``, a list; ``several`` says that a folder of them or a list will do."""
    more = "; a folder of several adapters, or @FILE with one name per line" if several else ""
    parser.add_argument("tuned", nargs="+", metavar="TUNED", help=TUNED + more)


def add_base(parser: argparse.ArgumentParser) -> None:
    """The base of all fine-tunes: ``options.base``, None to take it from their configs."""
    parser.add_argument(
        "--base", metavar="BASE", help="the model it was tuned from (default: the one the adapter's config names)"
    )


def add_definition(parser: argparse.ArgumentParser) -> None:
    """What counts as an intruder: ``options.top_k``, ``.epsilon``, ``.side``."""
    definition = parser.add_argument_group("what counts as an intruder")
    definition.add_argument(
        "-k",
        "--top-k",
        type=int,
        default=10,
        metavar="K",
        help="how many leading singular vectors to look at (default: 10)",
    )
    definition.add_argument(
        "-e",
        "--epsilon",
        type=float,
        default=0.5,
        metavar="E",
        help="an intruder's |cos| with every base vector is below this (default: 0.5)",
    )
    definition.add_argument(
        "--side",
        choices=("left", "right"),
        default="left",
        help="which singular vectors (default: left, as in the paper)",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Which layers: ``options.include``, ``.exclude``, lists of patterns."""
    layers = parser.add_argument_group("which layers")
    layers.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only modules with PATTERN, a shell pattern, anywhere in their name, e.g. 'layers.*.q_proj'; end a "
        "layer's number with a dot ('layers.1.'), or 10 to 19 match too (repeatable)",
    )
    layers.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out modules with PATTERN anywhere in their name (repeatable)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How files are read: ``options.split_fused``, ``.initial_adapter``, and what :func:`add_access` adds."""
    reading = parser.add_argument_group("how files are read")
    reading.add_argument(
        "--split-fused",
        action="store_true",
        help="split matrices that hold several projections (qkv_proj, query_key_value, c_attn, gate_up_proj) into "
        "these, as config.json says (default: as they are stored)",
    )
    reading.add_argument(
        "--ignore-option",
        dest="ignore_options",
        action="append",
        default=[],
        metavar="NAME",
        help="read adapter_config.json as if it had no option NAME, one that is not known here and of which you know "
        "that it changes no weight (repeatable)",
    )
    reading.add_argument(
        "--initial-adapter",
        metavar="DIR",
        help="the adapter as it was saved before training; needed if its initialisation changed the base in a way that "
        "cannot be recomputed (pissa_niter, corda, lora_ga)",
    )
    add_access(parser, reading)


def add_partial(parser: argparse.ArgumentParser) -> None:
    """Whether a part of a fine-tune will do: ``options.allow_partial``."""
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="exit with 0 also where some updates were not looked at: their base weight was not found, or their values "
        "are stored in a form or a file that is not read",
    )


def complain_of_parts(records: Sequence[Covering], options: argparse.Namespace) -> bool:
    """Names every fine-tune of which a part was not looked at; whether there is one that is not accepted."""
    from spectra.render.coverage import partial, unseen

    bad = False
    for record in records:
        said = partial(record)
        if said is None:
            continue
        text = f"{record.tuned['path']}: {said} ({'; '.join(unseen(record))})"
        if options.allow_partial:
            print(f"spectra: note: {in_one_line(text, 4000)}", file=sys.stderr)
        else:
            complain(f"{text}; {PARTIAL_ADVICE}")
            bad = True
    return bad


def add_access(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup | None = None) -> None:
    """What may be read: ``options.allow_pickle``, ``.local_files_only``."""
    reading = parser.add_argument_group("how files are read") if group is None else group
    reading.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read weights that torch.save wrote (.bin, .pt), if there are no others; nothing is executed",
    )
    reading.add_argument(
        "--local-files-only",
        action="store_true",
        help="download nothing: for ORG/NAME take what this machine's hub cache holds (as HF_HUB_OFFLINE=1 does)",
    )


def add_computation(
    parser: argparse.ArgumentParser, *, engine: str = "auto", names: Collection[str] = COMPUTATION
) -> None:
    """How to compute: those of ``COMPUTATION`` that are in ``names``, as attributes of the options.

    ``options.cache`` is a folder, None for the usual one, or False for none.
    """
    how = parser.add_argument_group("how to compute")

    def option(name: str, **how_parsed: Any) -> None:
        if name in names:
            how.add_argument(f"--{name.replace('_', '-')}", **how_parsed)

    option("engine", choices=("auto", "exact", "krylov", "cached"), default=engine, help=f"default: {engine}")
    option("dtype", choices=DTYPES, default="float32", help="precision of the decompositions (default: float32)")
    option("device", default="cpu", help="cpu or cuda (default: cpu)")
    at_a_time = "weights worked on at a time; memory grows with it (default: 1)"
    option("workers", type=int, default=1, metavar="N", help=at_a_time)
    option("threads", type=int, metavar="N", help="threads for one weight (default: the cores, shared among workers)")
    if "cache" in names:
        kept = how.add_mutually_exclusive_group()
        kept.add_argument(
            "--cache",
            metavar="DIR",
            help="where `spectra cache` kept the base's spectra (default: SPECTRA_CACHE, else spectra in the user's "
            "cache folder)",
        )
        kept.add_argument("--no-cache", dest="cache", action="store_false", default=None, help="use no kept spectra")
    option("hash_contents", action="store_true", help="hash every byte of the files into the fingerprints")


def add_output(parser: argparse.ArgumentParser, *, formats: Sequence[str], format_help: str, verbose_help: str) -> None:
    """Where the result goes, and how much is said: ``options.format``, ``.output``, ``.quiet``, ``.verbose``.

    ``options.format`` is None where it was not given: :func:`format_of` says what then.
    """
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=formats, help=format_help)
    output.add_argument("-o", "--output", metavar="FILE", help="write there instead of to standard output")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument("--verbose", action="store_true", help=verbose_help)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of :func:`spectra.audit_many` that the command has options for."""
    return {name: value for name, value in vars(options).items() if name in SETTINGS}


def format_of(target: Path | None, formats: Sequence[str]) -> str:
    """The format that the ending of an output file asks for; without one, and for text, the first.

    Raises
    ------
    UsageError : it asks for another.
    """
    ending = target.suffix.removeprefix(".") if target is not None else ""
    if target is not None and "sarif" in formats and target.name.lower().endswith(".sarif.json"):
        return "sarif"  # the standard has both endings
    if ending.lower() in formats[1:]:
        return ending.lower()
    if target is not None and ending.lower() not in ("", *TEXT):
        known = ", ".join(f".{known}" for known in (*formats[1:], *TEXT))
        raise UsageError(f"{target}: ends in none of {known}; rename it, or name the format with --format")
    return formats[0]


def is_unicode(options: argparse.Namespace) -> bool:
    """Whether where the result goes takes more than ASCII."""
    encoding = "utf-8" if options.output else getattr(sys.stdout, "encoding", None) or "ascii"
    return encoding.lower().startswith("utf")


def complain_of_layers(reports: Sequence[Report]) -> bool:
    """Names every layer that could not be analysed; whether there is one."""
    failed = [layer for report in reports for layer in report.failed]
    for layer in failed:
        complain(f"{layer.name}: {layer.status}: {layer.error}")
    return bool(failed)


class Unreadable(list[SpectraError]):
    """The fine-tunes that could not be read; each is complained of as it comes."""

    def __call__(self, error: SpectraError) -> None:
        complain(error)
        self.append(error)


def announce(target: Path | None, kind: str, options: argparse.Namespace) -> None:
    """Says what file was written."""
    if target is not None and not options.quiet:
        print(f"spectra: wrote {target} ({kind})", file=sys.stderr)


def complain(what: object) -> None:
    """Writes one line about what went wrong to standard error."""
    print(f"spectra: error: {in_one_line(str(what), 4000)}", file=sys.stderr)


def return_freed_matrices() -> None:
    """Makes glibc give freed matrices back at once.

    By default it comes to keep freed blocks of up to 32 MiB for reuse, where they lie in fragments:
    up to twice the memory in use (measured).  Other C libraries do without.
    """
    with contextlib.suppress(OSError, AttributeError):
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20)
