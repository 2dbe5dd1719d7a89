"""``--model-card`` of ``spectra audit``: the section printed, or put into a card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.cli.options import announce
from spectra.cli.output import card_in, check_card, emit, replace_card
from spectra.errors import UsageError

if TYPE_CHECKING:
    from spectra.records.report import Report

DISTRIBUTION = "intruder-spectra"
HOMES = ("homepage", "repository", "source")  # the first of these that the package names is its home


def add_model_card(parser: argparse.ArgumentParser) -> None:
    """A Markdown section for a model card: ``options.model_card``, a file, "-" for standard output, or None."""
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--model-card",
        nargs="?",
        const="-",
        metavar="README.md",
        help="put a section with the figures into this card, between <!-- spectra:begin --> and <!-- spectra:end -->, "
        "or after its content; without a file, or for -, print it instead of the report",
    )


def checked_card(options: argparse.Namespace, count: int) -> Path | None:
    """The card to write into, None where there is none; raises before any work what would be wrong after it."""
    if options.model_card is None:
        return None
    if count > 1:
        raise UsageError("--model-card is about one fine-tune; give one TUNED")
    if options.model_card == "-":
        if options.format is not None and options.output is None:
            raise UsageError("--model-card and --format both ask for standard output; give one of them a file")
        return None
    from spectra.render.card import with_section

    target = check_card(options.model_card)
    with_section(card_in(target), "", target)
    return target


def write_card(report: Report, target: Path | None, options: argparse.Namespace) -> None:
    """Prints the section, or puts it into the card that :func:`checked_card` gave."""
    from importlib.metadata import version

    from spectra.render.card import to_model_card, with_section

    versions = {"torch": version("torch")}
    section = to_model_card(
        report,
        root=public_root(),
        url=home(),
        versions=versions,
        further=further(options),
        addresses=addresses([report], options),
    )
    if target is None:
        emit(section + "\n", None)
        return
    replace_card(target, with_section(card_in(target), section, target))  # it may have changed in the meantime
    announce(target, "model card", options)


def public_root() -> Path | None:
    """The working directory, unless the user's own folder lies somewhere in it and paths from there would name that."""
    here = Path.cwd()
    try:
        return None if here in Path.home().parents else here
    except RuntimeError:  # there is no such folder
        return here


def further(options: argparse.Namespace) -> tuple[str, ...]:
    """The words of a command that change what is read and that no report has."""
    words = ["--allow-pickle"] if options.allow_pickle else []
    if options.initial_adapter is not None:
        words += ["--initial-adapter", Path(options.initial_adapter).name]
    return tuple(words)


def addresses(reports: Sequence[Report], options: argparse.Namespace) -> dict[str, str]:
    """A report's path → the address that was named, of which it is a copy."""
    from spectra.render.naming import public_address

    named = [(str(report.base["path"]), options.base) for report in reports if options.base is not None]
    if len(reports) == len(options.tuned):
        named += [(str(report.tuned["path"]), name) for report, name in zip(reports, options.tuned, strict=True)]
    return {path: public_address(name) for path, name in named if "://" in name}


def home() -> str | None:
    """Where the package says that it has its home."""
    from importlib import metadata

    try:
        named = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    urls = {label.strip().lower(): url.strip() for label, _, url in (entry.partition(",") for entry in named)}
    return next((urls[label] for label in HOMES if label in urls), None)
