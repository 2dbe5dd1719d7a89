"""Where results and messages go: standard output or a file, and a progress bar on standard error."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from spectra.errors import MissingFileError, UsageError
from spectra.files.whole import write_whole

# How what we write begins, in each of its formats.
REPORT_MARKS = (
    b'{\n "schema": "spectra.',
    b'{"schema": "spectra.',
    b"tuned,layer,",
    b"label,path,method,",
    b"layer,module_type,",
    b"No intruder dimensions ",
    b"Intruder dimensions: ",
    b"Cannot tell: ",
    b"Nothing changed: ",
    b"Partial: ",
    b"fine-tune  ",
    b"base       ",
    b"Suggestion: ",
    b"Repaired: ",
    b"Unchanged: no singular vector ",
    b"Dry run: ",
    b"Verified: ",
    b"NOT verified: ",
    b"folder,layer,error,",
    b'{\n "properties": {\n  "maker": "intruder-spectra"',  # SARIF
    b"<!doctype html>\n<!-- spectra.page/",
)
JOURNAL_MARK = b'{"schema": "spectra.run/'  # how what `--resume` appends to begins
# How pictures begin; ours name their maker somewhere within.
PICTURE_MARKS = (b"\x89PNG", b"%PDF", b"<?xml")
TABLE_MARK, TABLE_SCHEMA = b"PAR1", b"spectra.rows/1"  # parquet, and what ours have in their metadata
MAKER = b"intruder-spectra"
MAX_CARD_BYTES = 10_000_000
GIB = 2**30


@contextlib.contextmanager
def progress(quiet: bool, verbose: bool = False) -> Iterator[Callable[[float, float, str], None] | None]:
    """A bar with a time estimate on standard error, where somebody may be looking; ``verbose``, a line a weight."""
    if verbose and not quiet:
        before = _memory()[0]  # with the libraries loaded
        yield _say
        peak = _memory()[1]
        print(
            f"spectra: peak memory {peak / GIB:.2f} GiB, {max(0, peak - before) / GIB:.2f} GiB above the libraries",
            file=sys.stderr,
        )
        return
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from spectra.runs.progress import progress_bar

    with progress_bar() as show:
        yield show


def _say(done: float, work: float, layer: str) -> None:
    print(f"spectra: {100 * done / work:3.0f}%  memory {_memory()[0] / GIB:.2f} GiB  {layer}", file=sys.stderr)


def _memory() -> tuple[int, int]:
    """Bytes of this process that are resident now, and at most so far; where only the latter is known, it twice."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # no such module on Windows
        return 0, 0
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), peak
    except (OSError, ValueError):
        return peak, peak


def check_output(output: str | None, *, picture: bool = False) -> Path | None:
    """Where to write, checked before any work: nothing but an earlier report, or picture, is ever replaced."""
    if output is None:
        return None
    target = Path(output)
    try:
        if not target.parent.is_dir():
            raise MissingFileError(target.parent, "no such folder to write into")
        if target.is_dir():
            raise UsageError(f"{target}: this is a folder; name a file to write")
        replaceable = not target.exists() or _is_ours(target, picture)
    except PermissionError as error:
        raise UsageError(f"{target}: could not be written: {error.strerror}") from None
    if not replaceable:
        what = "picture" if picture else "report"
        raise UsageError(f"{target}: exists and is no {what} of spectra's, so it is not overwritten")
    return target


def check_distinct(**outputs: str | Path | None) -> None:
    """Raises UsageError where two of a command's outputs would be the same file."""
    seen: dict[Path, str] = {}
    for option, name in outputs.items():
        if name is None:
            continue
        place, said = Path(name).resolve(), "--" + option.replace("_", "-")
        if place in seen:
            raise UsageError(f"{name}: {seen[place]} and {said} name the same file")
        seen[place] = said


def _is_ours(path: Path, picture: bool) -> bool:
    """Whether a file is empty or begins as what we write begins."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(64)
        if picture and start.startswith(PICTURE_MARKS):
            return MAKER in start + file.read()
        if not picture and start.startswith(TABLE_MARK):
            return TABLE_SCHEMA in start + file.read()
    if start.startswith(JOURNAL_MARK):
        return False  # a run goes on from it
    return not start or (not picture and start.startswith(REPORT_MARKS))


def check_card(name: str) -> Path:
    """A Markdown file that may be there or not, checked before any work."""
    target = Path(name)
    if target.suffix.lower() not in (".md", ".markdown"):
        raise UsageError(f"{target}: expected a Markdown file, such as README.md, or - for standard output")
    if not target.parent.is_dir():
        raise MissingFileError(target.parent, "no such folder to write into")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise UsageError(f"{target}: is no regular file; name the file itself")
    return target


def card_in(target: Path) -> bytes:
    """What a model card holds; nothing where it is not there."""
    try:
        if not target.exists():
            return b""
        if target.stat().st_size > MAX_CARD_BYTES:
            raise UsageError(f"{target}: over {MAX_CARD_BYTES:,} bytes; expected a model card")
        return target.read_bytes()
    except OSError as error:
        raise UsageError(f"{target}: could not be read: {error.strerror or error}") from None


def replace_card(target: Path, content: bytes) -> None:
    """Writes a model card whole or not at all, with the permissions that it had."""
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    write_whole(target, content)
    if mode is not None:
        target.chmod(mode)


def emit(content: str | bytes, target: Path | None) -> None:
    """Writes text to standard output, or anything to a file that appears whole or not at all."""
    if target is not None:
        write_whole(target, content if isinstance(content, bytes) else content.encode())
    else:
        _print(content if isinstance(content, str) else content.decode())


def _print(text: str) -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if sys.stdout.isatty():
        from spectra.render.columns import fitted

        text = fitted(text, shutil.get_terminal_size().columns)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has seen enough; the verdict still goes out as the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(f"standard output: could not be written: {error.strerror or error}") from None
