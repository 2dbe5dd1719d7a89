"""How far a run has come, told or shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from spectra.errors import UsageError
from spectra.runs.options import Progress


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with a time estimate on standard error."""
    from tqdm import tqdm

    # The unit is arithmetic work, not layers, so that the estimate holds with unequal layers.
    with tqdm(
        total=1.0,
        file=sys.stderr,
        leave=False,
        bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}, about {remaining} left  {desc}",
    ) as bar:

        def show(done: float, work: float, layer: str) -> None:
            bar.set_description_str(layer, refresh=False)
            bar.update(done / work - bar.n)

        yield show


@contextlib.contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """What is to be called as the run goes on: what was given, a bar for True, nothing for None or False.

    Raises
    ------
    UsageError : something that cannot be called.
    """
    if progress is True:
        with progress_bar() as show:
            yield show
        return
    if progress and not callable(progress):
        raise UsageError(f"progress = {progress!r:.80}; expected a function, or True for a bar")
    yield progress or None
