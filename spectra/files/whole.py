"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from spectra.errors import UsageError

PARTIAL = ".part"  # how a file ends that is being written


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, in a folder that is made if need be.

    Raises
    ------
    UsageError : it could not be written.
    """
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}{PARTIAL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())  # or a power cut could leave the name without the content
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{file}: could not be written: {error.strerror or error}") from None
