"""``spectra cache``: decomposes a base once, for many audits of its fine-tunes."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial

from spectra.cli.options import BAD, DTYPES, OK, Commands, add_access, add_layers, complain, return_freed_matrices
from spectra.cli.output import emit, progress


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "cache",
        help="decompose a base once, for many audits of its fine-tunes",
        description="Decomposes the weights of BASE and keeps their spectra, which audits of its fine-tunes then use "
        "instead of decomposing it again. Says first how much that is. What is there already is kept, so an "
        "interrupted run continues where it ended; a base that changed is detected.",
    )
    parser.add_argument(
        "base", metavar="BASE", help="checkpoint folder, .safetensors file, or ORG/NAME on the Hugging Face hub"
    )
    add_layers(parser)
    add_access(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="that of the audits (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep them there (default: the environment's SPECTRA_CACHE, else spectra in the user's cache folder)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say how much it would be")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Says how much there is to do and does it; returns the exit code."""
    from spectra.tasks.cache import cache, readable_size

    prepare = partial(
        cache,
        options.base,
        include=options.include,
        exclude=options.exclude,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        cache=options.cache,
        allow_pickle=options.allow_pickle,
        local_files_only=options.local_files_only,
    )
    return_freed_matrices()
    plan = prepare(dry_run=True)
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
        done = prepare(progress=show)
    for item in done.failed:
        complain(item.reason)
    how = f" (with --cache {options.cache})" if options.cache else ""
    counts = f"{len(done.written)} written, {len(done.there)} found in order"
    emit(f"{counts}; `spectra audit` uses them whenever it meets this base{how}\n", None)
    return BAD if done.failed else OK
