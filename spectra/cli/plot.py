"""``spectra plot``: the figures, of fine-tunes or of a comparison that was made before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.cli.compare import add_compared, compared
from spectra.cli.options import (
    BAD,
    OK,
    Commands,
    Unreadable,
    add_computation,
    add_definition,
    add_layers,
    add_reading,
    announce,
    complain_of_layers,
    return_freed_matrices,
    settings,
)
from spectra.cli.output import check_output, emit, progress
from spectra.errors import CorruptFileError, SpectraError, UsageError, in_short
from spectra.plots.kinds import KINDS

if TYPE_CHECKING:
    from spectra.records.comparison import Comparison
    from spectra.records.layer import LayerSpectra

FORMATS = ("png", "svg", "pdf")
# What cannot be changed of a comparison that was made before, and what these options are by themselves.
AS_MADE: dict[str, Any] = {
    "base": None, "top_k": 10, "epsilon": 0.5, "side": "left", "include": [], "exclude": [], "draws": 0, "quick": False,
    "engine": "cached", "dtype": "float32", "size": None, "allow_pickle": False,
    "local_files_only": False,
    "initial_adapter": None,
}  # fmt: skip
LAYER_SETTINGS = (
    "top_k", "epsilon", "side", "include", "exclude", "dtype", "device", "threads", "allow_pickle", "local_files_only",
    "initial_adapter",
)  # fmt: skip


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "plot",
        help="draw similarity matrices, sweeps, counts, spectra, trajectories: PNG, SVG or PDF",
        description="Draws one figure of fine-tunes, or of reports or a comparison that were saved as JSON.\n\n"
        "kinds:\n" + "\n".join(f"  {name:<12}{kind.help}" for name, kind in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help="what to draw: one of the kinds above")
    add_compared(parser, draws=0)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="leading vectors of each side that a similarity matrix shows (default: all, at most 256)",
    )
    output.add_argument("--format", choices=FORMATS, help="default: by the ending of FILE, else png")
    output.add_argument("-o", "--output", metavar="FILE", help="write there (default: spectra-KIND.png)")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument(
        "--verbose", action="store_true", help="print a line per weight, with the memory used, to standard error"
    )
    add_definition(parser)
    add_layers(parser)
    add_reading(parser)
    add_computation(parser, engine="cached")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draws; returns the exit code."""
    kind = KINDS[options.kind]
    kept = [path for path in options.tuned if path.endswith(".json") and not path.endswith(".index.json")]
    if kept and (len(kept) < len(options.tuned) or options.merge):
        raise UsageError(f"{kept[0]}: what was saved is drawn by itself; name it alone, or fine-tunes")
    changed = [name for name, value in AS_MADE.items() if kept and getattr(options, name) != value]
    if changed:
        option = changed[0].replace("_", "-")
        raise UsageError(f"{kept[0]}: what was saved is drawn as it was made; --{option} is for fine-tunes")
    if kept and kind.needs == "layers":
        raise UsageError(f"{kept[0]}: what was saved holds no singular vectors; name the fine-tunes themselves")
    target = check_output(options.output or f"spectra-{options.kind}.{options.format or 'png'}", picture=True)
    assert target is not None

    from spectra.plots import file_format, render  # says so at once where matplotlib is missing

    ending = options.format or file_format(target)

    unreadable = Unreadable()
    source: Any
    if kind.needs == "layers":
        source, failed = _layers(options)
    else:
        source = _saved(kept) if kept else _comparison(options, unreadable)
        failed = complain_of_layers(source.reports)
    try:
        picture = render(kind.draw(source), ending)
    except UsageError:
        if not failed:
            raise
        return BAD  # none is left to draw; what is wrong with each was said
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
        if not kept or isinstance(error, SpectraError):
            raise
        raise CorruptFileError(kept[0], f"what it says cannot be drawn: {in_short(error)}") from None
    emit(picture, target)
    announce(target, kind.help, options)
    return BAD if failed or unreadable else OK


def _saved(paths: Sequence[str]) -> Comparison:
    """A comparison that was saved, or reports side by side."""
    from spectra.records.comparison import Comparison
    from spectra.records.report import Report
    from spectra.sources.saved import load
    from spectra.tasks.compare import compared_reports

    records = [load(path) for path in paths]
    if len(records) == 1 and isinstance(records[0], Comparison):
        return records[0]
    for path, record in zip(paths, records, strict=True):
        if not isinstance(record, Report):
            raise UsageError(f"{path}: expected a report, or a comparison by itself")
    return compared_reports(records)


def _comparison(options: argparse.Namespace, unreadable: Unreadable) -> Comparison:
    from spectra.sources.resolve import checkpoints_of

    if options.kind == "trajectory" and len(options.tuned) == 1:
        options.tuned = checkpoints_of(options.tuned[0], within=True)
    # What a figure does not show is not computed.
    options.quick = options.quick or not (options.draws or options.kind == "weights")
    return compared(options, unreadable)


def _layers(options: argparse.Namespace) -> tuple[Sequence[LayerSpectra], bool]:
    """The arrays to draw, and whether some layer could not be analysed."""
    from spectra.sources.resolve import checkpoints_of
    from spectra.tasks.compare import SIZE, layer_spectra

    if options.merge:
        raise UsageError(f"--merge is for figures of whole fine-tunes, not for {options.kind}")
    if not options.tuned:
        raise UsageError("nothing to draw: name fine-tunes")
    return_freed_matrices()
    chosen = {name: value for name, value in settings(options).items() if name in LAYER_SETTINGS}
    tuned, failed = [step for path in options.tuned for step in checkpoints_of(path)], False
    if not options.include:
        chosen["include"], failed = _worst(tuned, options)
    size = SIZE if options.size is None else options.size
    with progress(options.quiet, options.verbose) as show:
        return layer_spectra(tuned, options.base, size=size, **chosen, progress=show), failed


def _worst(tuned: Sequence[str | Path], options: argparse.Namespace) -> tuple[list[str], bool]:
    """The layers with the most intruders; and whether any failed."""
    from spectra.tasks.audit import audit_many
    from spectra.tasks.plot import worst_of

    with progress(options.quiet, options.verbose) as show:
        reports = audit_many(tuned, options.base, **(settings(options) | {"engine": "auto"}), progress=show)
    failed, patterns = complain_of_layers(reports), worst_of(reports)
    if not options.quiet:
        names = ", ".join(pattern.replace("[[]", "[") for pattern in patterns)
        print(f"spectra: drawing {names}; others with --include", file=sys.stderr)
    return patterns, failed
