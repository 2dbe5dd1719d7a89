"""``spectra repair``: scales the intruder dimensions of a fine-tune, and checks a repair that was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from spectra.cli.options import (
    BAD,
    OK,
    TUNED,
    Commands,
    add_base,
    add_computation,
    add_definition,
    add_layers,
    add_reading,
    complain_of_layers,
    is_unicode,
    return_freed_matrices,
)
from spectra.cli.output import check_output, emit, progress
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.records.repair import Repair

Value = TypeVar("Value")

FORMATS = ("table", "json", "jsonl", "csv")
WRITTEN = ("float32", "bfloat16", "float16")
# The options that repair() takes as they are.
PASSED = (
    "method", "noise_like", "keep_rank", "merged", "store_dtype", "force", "top_k", "epsilon", "side", "include",
    "exclude", "split_fused", "ignore_options", "initial_adapter", "allow_pickle", "local_files_only", "engine",
    "dtype", "device", "workers", "threads", "cache", "hash_contents",
)  # fmt: skip
LONGEST = 1 << 16  # of a range of indices

EXIT_CODES = """exit codes:
  0  done
  2  bad usage, unreadable input, or a layer that could not be analysed
"""


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "repair",
        help="scale the intruder dimensions of a fine-tune, and write the result in the same format",
        description="Scales singular vectors of the fine-tuned weights, by default their intruder\n"
        "dimensions, and writes the result to a new folder: an adapter as an adapter, a\ncheckpoint as a checkpoint. "
        "The fine-tune is not touched. Only an evaluation can\nshow what was forgotten and learnt, before and after.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tuned", metavar="TUNED", help=TUNED)
    add_base(parser)
    _add_repair(parser)
    _add_result(parser)
    add_definition(parser)
    add_layers(parser)
    add_reading(parser)
    add_computation(parser, names=("engine", "dtype", "device", "workers", "threads", "cache", "hash_contents"))
    parser.set_defaults(run=run)


def _add_repair(parser: argparse.ArgumentParser) -> None:
    repair = parser.add_argument_group("what to scale")
    repair.add_argument(
        "--method", choices=("intruders",), default="intruders", help="what is repaired (default: intruders)"
    )
    repair.add_argument(
        "--scale",
        action="append",
        default=[],
        metavar="[PATTERN=]S",
        help="what the singular values are multiplied by, from 1 (no change) to 0 (removed); PATTERN=S applies to "
        "modules that match (the last match wins), a plain S to the rest (repeatable). "
        "--dry-run alone shows what 0 would do",
    )
    repair.add_argument(
        "--which",
        choices=("all", "top"),
        help="every intruder, or the first of each weight, as the paper does (default: all)",
    )
    repair.add_argument(
        "--noise-like",
        action="store_true",
        help="--which also in layers whose base is plain noise, which else stay as they are",
    )
    repair.add_argument(
        "--vectors",
        action="append",
        default=[],
        metavar="PATTERN=I,J",
        help="instead of --which: the singular vectors with these indices, e.g. 'layers.3.*.q_proj=0,2-4' (repeatable; "
        "indices from all patterns that match are combined)",
    )


def _add_result(parser: argparse.ArgumentParser) -> None:
    result = parser.add_argument_group("result")
    result.add_argument("--to", metavar="OUT", help="the folder to write, which must be new")
    result.add_argument("--force", action="store_true", help="replace an earlier result of this command at OUT")
    result.add_argument("--dry-run", action="store_true", help="compute and report everything, write nothing")
    result.add_argument(
        "--keep-rank",
        action="store_true",
        help="keep the adapter's rank by the best approximation (default: exact; each vector adds one rank)",
    )
    result.add_argument("--merged", action="store_true", help="write an adapter merged into its base, as a checkpoint")
    result.add_argument(
        "--store-dtype",
        choices=WRITTEN,
        help="precision of the changed factors as written (default: float32, or float64 if stored in float64)",
    )
    result.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="of the report (default: table); jsonl is JSON on one line",
    )
    result.add_argument("-o", "--output", metavar="FILE", help="write the report there instead of to standard output")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    result.add_argument("--verbose", action="store_true", help="list every layer and every file left behind")


def run(options: argparse.Namespace) -> int:
    """Repairs; returns the exit code."""
    target = check_output(options.output)
    scale, which = _checked(options)
    return_freed_matrices()

    from spectra.repairs.repair import repair

    with progress(options.quiet, options.verbose) as show:
        record = repair(
            options.tuned,
            options.base,
            scale=scale,
            to=None if options.dry_run else options.to,
            which=which,
            **{name: getattr(options, name) for name in PASSED},
            progress=show,
        )
    emit(_rendered(record, options), target)
    _tell(record, options)
    return BAD if record.audit is not None and complain_of_layers([record.audit]) else OK


def _checked(
    options: argparse.Namespace,
) -> tuple[float | dict[str, float], Literal["all", "top"] | dict[str, list[int]]]:
    """(scale, which) as :func:`spectra.repair` takes them."""
    if not options.scale and not options.dry_run:
        raise UsageError("--scale is missing: say what to multiply by, e.g. --scale 0.7; 0 removes")
    if options.to is None and not options.dry_run:
        raise UsageError("--to OUT is missing: name the folder to write, or try with --dry-run")
    if not options.scale:
        options.scale = ["0"]
        if not options.quiet:
            print("spectra: note: without --scale this shows what 0, their removal, would do", file=sys.stderr)
    if options.which is not None and options.vectors:
        raise UsageError("--vectors names the singular vectors themselves and goes without --which")
    if options.merged and options.keep_rank:
        raise UsageError("--keep-rank is about an adapter's rank, and --merged writes no adapter")
    if options.merged and options.store_dtype is not None:
        raise UsageError("--store-dtype is about an adapter's factors; --merged writes each weight as the base has it")
    scales = _by_pattern("--scale", options.scale, _scale, bare="*")
    vectors = _by_pattern("--vectors", options.vectors, _indices)
    return scales["*"] if scales.keys() == {"*"} else scales, vectors or options.which or "all"


def _by_pattern(
    option: str, texts: Sequence[str], read: Callable[[str], Value], *, bare: str | None = None
) -> dict[str, Value]:
    """PATTERN=VALUE by pattern, in the order given; first, under ``bare``, a value that has none."""
    values: dict[str, Value] = {}
    for text in sorted(texts, key=lambda text: "=" in text):  # what has no pattern is for the rest
        pattern, equals, value = text.rpartition("=")
        if (equals and not pattern) or (not equals and bare is None):
            raise UsageError(f"{option} {text}: expected PATTERN=VALUE")
        name = pattern if equals else str(bare)
        if name in values:
            raise UsageError(f"{option} {text}: a second value for {'the rest' if name == bare else name}")
        try:
            values[name] = read(value)
        except ValueError as error:
            raise UsageError(f"{option} {text}: {error}") from None
    return values


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if not 0 <= value <= 1:
        raise ValueError("expected a number from 0 (removed) to 1 (no change)")
    return value + 0.0  # -0 is 0


def _indices(text: str) -> list[int]:
    """ "0,2-4" as [0, 2, 3, 4]."""
    indices: set[int] = set()
    for part in map(str.strip, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part!r} is no index; expected e.g. 0,2 or 0-3")
        start, end = int(first), int(last or first)
        if not start <= end < start + LONGEST:
            raise ValueError(f"{part!r} is no rising range of at most {LONGEST} indices")
        indices.update(range(start, end + 1))
    return sorted(indices)


def _tell(record: Repair, options: argparse.Namespace) -> None:
    """Says what was written; what the report does not show where it is CSV counts as a message even when quiet."""
    if record.output is not None and not options.quiet:
        print(f"spectra: wrote {options.to} ({record.output['format']})", file=sys.stderr)
    if options.format == "csv":
        for remark in record.remarks:
            print(f"spectra: note: {remark}", file=sys.stderr)
        for name, reason in record.left_behind.items():
            print(f"spectra: left behind: {name}: {reason}", file=sys.stderr)


def _rendered(record: Repair, options: argparse.Namespace) -> str:
    if options.format in ("json", "jsonl"):
        return record.to_json(indent=1 if options.format == "json" else None) + "\n"
    from spectra.render.repair import render_repair, to_csv

    if options.format == "csv":
        return to_csv(record)
    return render_repair(record, verbose=options.verbose, ascii_only=not is_unicode(options))
