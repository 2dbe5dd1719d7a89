"""Every error Spectra raises on purpose.

    SpectraError
    ├── UsageError                    (ValueError)           an argument makes no sense
    │   └── MissingLayerError         (KeyError)             a record has no layer of that name
    ├── CheckpointError
    │   ├── MissingFileError          (FileNotFoundError)    nothing there, or nothing readable
    │   ├── CorruptFileError          (ValueError)           truncated, swapped, malformed
    │   ├── UnsafeFileError           (ValueError)           reading it could run code or leave the folder
    │   └── AmbiguousFilesError       (ValueError)           several candidates, none preferred
    ├── AdapterError                  (ValueError)           an adapter contradicts itself
    │   └── UnsupportedMethodError    (NotImplementedError)  a method this version cannot read
    ├── WrongBaseError                (ValueError)           base and tuned do not belong together
    └── NumericError
        ├── NonFiniteError            (ArithmeticError)      NaN or infinity in a weight
        └── ConvergenceError          (ArithmeticError)      no driver converged

The message says what arrived, what was expected and what to do; for files it begins with the path
and names the tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class SpectraError(Exception):
    """The root of all errors raised on purpose."""


class UsageError(SpectraError, ValueError):
    """An argument makes no sense."""


class MissingLayerError(UsageError, KeyError):
    """A record has no layer, or no fine-tune, of that name."""

    __str__ = UsageError.__str__  # a KeyError would quote it


class CheckpointError(SpectraError):
    """Something is wrong with a file; the message begins with its path.

    Parameters
    ----------
    path : the file or folder.
    problem : what is wrong, and what to do.
    tensor : the tensor concerned, where there is one.
    """

    def __init__(self, path: str | Path, problem: str, tensor: str | None = None):
        self.path = Path(path)
        self.tensor = tensor
        where = f"{path}: tensor {in_one_line(tensor, 200)!r}" if tensor else f"{path}"
        super().__init__(in_one_line(f"{where}: {problem}"))

    def __reduce__(self) -> tuple[Any, ...]:  # workers send them
        return _as_it_was, (type(self), str(self), self.path, self.tensor)


def _as_it_was(kind: type[CheckpointError], message: str, path: Path, tensor: str | None) -> CheckpointError:
    error = kind.__new__(kind)
    error.args, error.path, error.tensor = (message,), path, tensor
    return error


class MissingFileError(CheckpointError, FileNotFoundError):
    """Nothing is there, or nothing that could be read."""

    def __str__(self) -> str:  # OSError would format its own
        return str(self.args[0])


class CorruptFileError(CheckpointError, ValueError):
    """A file is truncated, swapped or malformed."""


class UnsafeFileError(CheckpointError, ValueError):
    """Reading the file could run code, or would leave the folder it belongs to."""


class AmbiguousFilesError(CheckpointError, ValueError):
    """Several files could be meant."""


class AdapterError(CheckpointError, ValueError):
    """An adapter contradicts itself."""


class UnsupportedMethodError(AdapterError, NotImplementedError):
    """A fine-tuning method, or an option of one, that this version cannot read."""


class WrongBaseError(CheckpointError, ValueError):
    """The base and the fine-tune do not belong together."""


class NumericError(SpectraError, ArithmeticError):
    """A weight cannot be decomposed."""


class NonFiniteError(NumericError):
    """NaN or infinity in a weight."""


class ConvergenceError(NumericError):
    """No driver converged."""


# What ends one layer and not the run; torch says "out of memory" with a RuntimeError.
LAYER_ERRORS = (SpectraError, MemoryError, RuntimeError)


def in_one_line(text: str, most: int = 1500) -> str:
    """A text as it is, unless it has control characters, which become escapes, or is longer than ``most``.

    What files say of themselves comes into messages; none of it may forge a line or steer a terminal.
    """
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} […] {text[-most // 3 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_short(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def needs_extra(what: str, library: str, extra: str) -> UsageError:
    """The error of what an optional library is missing for; the package is installed from a clone."""
    return UsageError(f"{what} {library}: in the folder of Spectra, pip install '.[{extra}]'")
