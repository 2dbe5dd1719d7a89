"""What paths are called in files that leave this machine: names of the hub, or paths without what lies above them.

All of it goes by the text of a path alone: nothing is looked up on a disk.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from spectra.errors import in_one_line
from spectra.records.report import Report

# How the hub's cache is laid out: models--ORG--NAME/snapshots/COMMIT/FILE.
_HUB = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)(?:[/\\](.+))?")
# An absolute path in a sentence, of two parts or more.
_ABSOLUTE = re.compile(r"(?<![\w.~/\\:-])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s'\",;:()]+){2,}[/\\]?")
# The settings that change a result: what each is by itself, and how it is given.
_DEFAULTS = {
    "top_k": (10, "--top-k"), "epsilon": (0.5, "--epsilon"), "side": ("left", "--side"), "engine": ("auto", "--engine"),
    "dtype": ("float32", "--dtype"), "device": ("cpu", "--device"), "split_fused": (False, "--split-fused"),
    "include": ((), "--include"), "exclude": ((), "--exclude"),
}  # fmt: skip


def hub_name(path: str | PurePath) -> str | None:
    """``org/name@commit``, with ``/file`` where it goes on, of a path into the hub's cache; None of any other."""
    match = _HUB.search(str(path))
    if match is None:
        return None
    name = match[1].replace("--", "/") + "@" + match[2]
    return name if match[3] is None else f"{name}/{match[3]}"


def public_names(
    paths: Sequence[str | PurePath],
    root: str | PurePath | None = None,
    addresses: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Path → what it may be called elsewhere, each another.

    Its address, where ``addresses`` has one (of the path that is a local copy of it); a name of the hub; a path below
    ``root``, the working directory, as seen from there; of any other path, and of all without ``root``, the last part,
    and as many more as tell it from the others.
    """
    names: dict[str, str] = {}
    outside: dict[str, tuple[str, ...]] = {}
    for path in dict.fromkeys(map(str, paths)):
        plain = os.path.normpath(path if root is None else PurePath(root) / path)
        known = (addresses or {}).get(path) or hub_name(plain)
        if known is not None:
            names[path] = known
        elif root is not None and PurePath(plain).is_relative_to(root):
            names[path] = PurePath(plain).relative_to(root).as_posix()
        else:
            outside[path] = tuple(part for part in PurePath(plain).parts if part not in (PurePath(plain).anchor, ".."))
    for path, parts in outside.items():
        length = 1
        while length < len(parts) and _taken(parts[-length:], path, outside, names):
            length += 1
        names[path] = "/".join(parts[-length:]) or "."
    return names


def _taken(parts: tuple[str, ...], path: str, outside: Mapping[str, tuple[str, ...]], names: Mapping[str, str]) -> bool:
    others = (other[-len(parts) :] for name, other in outside.items() if name != path)
    return parts in others or "/".join(parts) in names.values()


def public_address(url: str) -> str:
    """An address without what may be secret in it: a user's name and password, a signature among its parameters."""
    parts = urlsplit(url)
    if parts.scheme.lower() in ("file", "local"):
        return PurePath(parts.path).name
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def named_model(name: str) -> str:
    """What a config calls a model; of a path on the machine that wrote it, the last part alone."""
    name = hub_name(name) or name
    if name.startswith(("/", "~", "\\")) or PureWindowsPath(name).drive:
        return PureWindowsPath(name).name or name[:1]
    return name


def without_paths(text: str, names: Mapping[str, str], root: str | PurePath | None = None) -> str:
    """A message in which paths are called by ``names``, and what is left of absolute ones by their last part."""
    for path in sorted(names, key=len, reverse=True):
        if PurePath(path).is_absolute():
            text = text.replace(path, names[path])
    if root is not None:
        text = text.replace(f"{root}{os.sep}", "")
    return _ABSOLUTE.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def invocation(reports: Sequence[Report], names: Mapping[str, str], further: Sequence[str] = ()) -> str:
    """The command that makes such reports again, in one line for a shell; ``names`` as :func:`public_names` made them.

    Parameters
    ----------
    further : words that no report has, such as ``--allow-pickle``.
    """
    words = ["spectra", "audit", *(names[str(report.tuned["path"])] for report in reports)]
    bases = dict.fromkeys(str(report.base["path"]) for report in reports)
    if len(bases) == 1:
        words += ["--base", names[next(iter(bases))]]
    for name, (default, option) in _DEFAULTS.items():
        words += _option(option, reports[0].settings.get(name, default), default)
    return " ".join(map(_word, (*words, *further)))


def _option(option: str, value: Any, default: Any) -> list[str]:
    if isinstance(default, tuple):
        return [word for item in value for word in (option, str(item))]
    if value == default:
        return []
    return [option] if value is True else [option, str(value)]


def _word(text: str) -> str:
    return shlex.quote(in_one_line(text, 4000))
