"""The command line: parse, call, render, exit code.

Nothing heavy is imported before a command runs, so that ``spectra --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra import __version__
from spectra.errors import SpectraError, UsageError
from spectra.output import check_output, emit, progress

if TYPE_CHECKING:
    from spectra.report import Report

OK, GATE, BAD, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """exit codes:
  0  done
  1  a --fail-above gate was crossed
  2  bad usage, unreadable input, or a layer that could not be analysed
     (the report of the rest is still written)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except SpectraError as error:
        print(f"spectra: error: {error}", file=sys.stderr)
        return BAD
    except KeyboardInterrupt:
        print("spectra: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # a disk or a network that fails where nobody expected it
        print(f"spectra: error: {error}", file=sys.stderr)
        return BAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectra",
        description="What did this fine-tune do to the spectrum of the weights?",
        epilog="`spectra COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"spectra {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_audit(commands)
    _add_cache(commands)
    _add_inspect(commands)
    return parser


def _add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    audit = commands.add_parser(
        "audit",
        help="flag the intruder dimensions of fine-tunes, per layer and per singular index",
        description="Flags intruder dimensions: leading singular vectors of the fine-tuned weights that are "
        "nearly orthogonal to every singular vector of the base. Several TUNED give a summary table.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument(
        "tuned", nargs="+", metavar="TUNED", help="adapter folder, checkpoint folder or safetensors file"
    )
    audit.add_argument(
        "--base", metavar="BASE", help="the model it was tuned from (default: the one the adapter's config names)"
    )
    definition = audit.add_argument_group("what counts as an intruder")
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
    layers = audit.add_argument_group("which layers")
    layers.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only modules whose name matches, e.g. 'layers.*.q_proj' (repeatable)",
    )
    layers.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out modules whose name matches (repeatable)",
    )
    how = audit.add_argument_group("how to compute")
    how.add_argument("--engine", choices=("auto", "exact", "krylov", "cached"), default="auto", help="default: auto")
    how.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="precision of the decompositions (default: float32)",
    )
    how.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    how.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="weights worked on at a time; memory grows with it (default: 1)",
    )
    how.add_argument(
        "--threads", type=int, metavar="N", help="threads for one weight (default: the cores, shared among workers)"
    )
    kept = how.add_mutually_exclusive_group()
    kept.add_argument(
        "--cache", metavar="DIR", help="where `spectra cache` kept the base's spectra (default: its own default)"
    )
    kept.add_argument("--no-cache", dest="cache", action="store_false", default=None, help="use no kept spectra")
    how.add_argument("--verify", action="store_true", help="hash every byte of the files into the fingerprints")
    gate = audit.add_argument_group("gate")
    gate.add_argument("--fail-above", type=int, metavar="N", help="exit with 1 if there are more than N intruders")
    gate.add_argument(
        "--fail-on",
        choices=("all", "paper", "non-noise", "new"),
        help="which total --fail-above looks at: all, paper (no embeddings, no heads), non-noise (outside "
        "noise-like bases), new (since --baseline); default: all, or new with --baseline",
    )
    gate.add_argument(
        "--baseline",
        metavar="REPORT.json",
        help="an earlier report; unless --fail-above says otherwise, any new intruder fails",
    )
    output = audit.add_argument_group("output")
    output.add_argument(
        "--format",
        choices=("table", "json", "jsonl", "csv"),
        help="default: what the ending of FILE says, else table; several TUNED as json give one report a line",
    )
    output.add_argument("-o", "--output", metavar="FILE", help="write there instead of to standard output")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument("--verbose", action="store_true", help="draw every layer, list every skipped tensor")
    audit.set_defaults(run=_audit)


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser(
        "cache",
        help="decompose a base once, for many audits of its fine-tunes",
        description="Decomposes the weights of BASE and keeps their spectra, which audits of its fine-tunes then use "
        "instead of decomposing it again. Says first how much that is. What is there already is kept, so an "
        "interrupted run goes on where it ended; a base that changed is noticed.",
    )
    cache.add_argument("base", metavar="BASE", help="checkpoint folder, safetensors file, or org/name in the hub cache")
    cache.add_argument("--include", action="append", default=[], metavar="PATTERN", help="as for audit")
    cache.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="as for audit")
    cache.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="that of the audits (default: float32)"
    )
    cache.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    cache.add_argument("--threads", type=int, metavar="N", help="default: the cores")
    cache.add_argument(
        "--cache",
        metavar="DIR",
        help="keep them there (default: the environment's SPECTRA_CACHE, else spectra in the user's cache folder)",
    )
    cache.add_argument("--dry-run", action="store_true", help="only say how much it would be")
    cache.add_argument("--quiet", action="store_true", help="no progress bar")
    cache.set_defaults(run=_cache)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what files hold and how they would be read, from headers alone",
        description="Says what each path holds, how it would be read, and which base it belongs to. "
        "Reads headers and configs only.",
    )
    inspect.add_argument(
        "paths", nargs="+", metavar="PATH", help="adapter folder, checkpoint folder or safetensors file"
    )
    inspect.add_argument(
        "--base", metavar="BASE", help="match against this base (default: the one the adapter's config names)"
    )
    inspect.add_argument("--include", action="append", default=[], metavar="PATTERN", help="as for audit")
    inspect.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="as for audit")
    inspect.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    inspect.add_argument("--verbose", action="store_true", help="list every tensor")
    inspect.set_defaults(run=_inspect)


def _audit(options: argparse.Namespace) -> int:
    if options.baseline is not None and len(options.tuned) > 1:
        raise UsageError("--baseline compares one fine-tune with one earlier report; give one TUNED")
    if options.fail_on == "new" and options.baseline is None:
        raise UsageError("--fail-on new needs --baseline REPORT.json")
    if options.fail_on is not None and options.fail_above is None and options.baseline is None:
        raise UsageError("--fail-on needs --fail-above N")
    target = check_output(options.output)
    options.format = options.format or _format_of(target)

    from spectra.report import load_report

    baseline = load_report(options.baseline) if options.baseline is not None else None
    from spectra.pipeline import audit_many

    _return_freed_matrices()
    unreadable = []

    def skip(error: SpectraError) -> None:
        print(f"spectra: error: {error}", file=sys.stderr)
        unreadable.append(error)

    with progress(options.quiet) as show:
        reports = audit_many(
            options.tuned,
            options.base,
            top_k=options.top_k,
            epsilon=options.epsilon,
            side=options.side,
            include=options.include,
            exclude=options.exclude,
            engine=options.engine,
            dtype=options.dtype,
            device=options.device,
            workers=options.workers,
            threads=options.threads,
            verify=options.verify,
            cache=options.cache,
            progress=show,
            on_unreadable=skip,
        )
    if not reports:
        return BAD
    if baseline is not None:
        reports = [report.against(baseline) for report in reports]
    emit(_rendered(reports, options), target)
    if target is not None and not options.quiet:
        print(f"spectra: wrote {target} ({options.format})", file=sys.stderr)
    code = _verdict(reports, options)
    return BAD if unreadable else code


def _format_of(target: Path | None) -> str:
    """What the ending of an output file asks for."""
    ending = target.suffix.removeprefix(".") if target is not None else ""
    return ending if ending in ("json", "jsonl", "csv") else "table"


def _rendered(reports: Sequence[Report], options: argparse.Namespace) -> str:
    if options.format == "json" and len(reports) == 1:
        return reports[0].to_json() + "\n"
    if options.format in ("json", "jsonl"):
        return "".join(report.to_json(indent=None) + "\n" for report in reports)
    if options.format == "csv":
        from spectra.render.table import to_csv

        return to_csv(reports)
    from spectra.render.text import render_report, render_summary

    if len(reports) > 1:
        return render_summary(reports)
    encoding = "utf-8" if options.output else getattr(sys.stdout, "encoding", None) or "ascii"
    return render_report(reports[0], verbose=options.verbose, ascii_only=not encoding.lower().startswith("utf"))


def _verdict(reports: Sequence[Report], options: argparse.Namespace) -> int:
    failed = [layer for report in reports for layer in report.failed]
    for layer in failed:
        print(f"spectra: error: {layer.name}: {layer.status}: {layer.error}", file=sys.stderr)
    if failed:
        return BAD
    limit = options.fail_above
    if limit is None and options.baseline is not None:
        limit = 0
    if limit is None:
        return OK
    scope = options.fail_on or ("new" if options.baseline is not None else "all")
    code = OK
    for report in reports:
        total = report.total(scope)
        if total > limit:
            print(
                f"spectra: gate: {report.tuned['path']}: intruders ({scope}): {total}, more than {limit}",
                file=sys.stderr,
            )
            code = GATE
    return code


def _cache(options: argparse.Namespace) -> int:
    from functools import partial

    from spectra.precompute import cache_base, readable_size

    run = partial(
        cache_base,
        options.base,
        include=options.include,
        exclude=options.exclude,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        root=options.cache,
    )
    _return_freed_matrices()
    plan = run(dry_run=True)
    if plan.stale:
        folders = ", ".join(map(str, plan.stale))
        print(
            f"spectra: {plan.base} has changed since it was cached; the earlier spectra "
            f"({readable_size(plan.stale_bytes)} in {folders}) are no longer used for it",
            file=sys.stderr,
        )
    layers = f"{len(plan.layers)} layer{'s' * (len(plan.layers) != 1)}"
    there = {0: "none", len(plan.layers): "all"}.get(len(plan.there), str(len(plan.there))) + " of them there already"
    lines = [f"{plan.base}: {layers}, {readable_size(plan.bytes)} in {plan.folder}; {there}"]
    reasons = Counter(item.reason for item in plan.skipped).most_common()
    lines += [f"  skipped    {count} × {reason}" for reason, count in reasons]
    emit("\n".join(lines) + "\n", None)
    if options.dry_run:
        return OK
    with progress(options.quiet) as show:
        done = run(progress=show)
    for item in done.failed:
        print(f"spectra: error: {item.reason}", file=sys.stderr)
    how = f" (with --cache {options.cache})" if options.cache else ""
    counts = f"{len(done.written)} written, {len(done.there)} found in order"
    emit(f"{counts}; `spectra audit` uses them whenever it meets this base{how}\n", None)
    return BAD if done.failed else OK


def _inspect(options: argparse.Namespace) -> int:
    from spectra.inspection import inspect, render_inspection, to_json

    # Every path is looked at, also after one that cannot be read.
    found, code = [], OK
    for path in options.paths:
        try:
            found.append(inspect(path, options.base, include=options.include, exclude=options.exclude))
        except SpectraError as error:
            print(f"spectra: error: {error}", file=sys.stderr)
            code = BAD
    if found:
        text = to_json(found) if options.format == "json" else render_inspection(found, verbose=options.verbose)
        emit(text, None)
    return code


def _return_freed_matrices() -> None:
    """Makes glibc give freed matrices back at once.

    By default it comes to keep freed blocks of up to 32 MiB for reuse, where they lie in fragments:
    up to twice the memory in use (measured).  Other C libraries do without.
    """
    with contextlib.suppress(OSError, AttributeError):
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20)


if __name__ == "__main__":
    sys.exit(main())
