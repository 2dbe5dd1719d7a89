"""Work handed to an executor: anything with the interface of ``concurrent.futures``, here or on other machines.

What is handed over is a function and a key, never a weight: a worker opens the files itself, so they must lie where it
can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from spectra.errors import SpectraError, UsageError, in_short, needs_extra

R = TypeVar("R")
PATIENCE = 20  # seconds that a scheduler has to answer


def spread(
    executor: Executor, do: Callable[[str], R], keys: Sequence[str], lost: Callable[[str, str], R]
) -> Iterator[tuple[str, R]]:
    """(key, what ``do`` made of it) of each key, as they come; what is not begun when the caller stops is called off.

    An executor that replaces its workers (as Dask does) hands a key out again where one was lost; what becomes of a key
    that it gives up is for ``lost`` to say, from the key and the reason.

    Raises
    ------
    UsageError : the executor itself broke.
    """
    running: dict[Future[R], str] = {executor.submit(do, key): key for key in keys}
    try:
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                try:
                    result = future.result()
                except SpectraError:
                    raise
                except BrokenExecutor as error:
                    raise UsageError(f"the workers were lost: {in_short(error)}") from None
                except Exception as error:
                    result = lost(key, f"its worker failed: {type(error).__name__}: {in_short(error)}")
                yield key, result
    finally:
        for future in running:
            future.cancel()


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The workers of a Dask cluster, by the address of its scheduler.

    Raises
    ------
    UsageError : Dask is not installed, or nobody answers there.
    """
    try:
        from distributed import Client
    except ImportError:
        raise needs_extra("--dask needs", "Dask", "dask") from None
    try:
        client: Any = Client(address, timeout=PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(f"{address}: no Dask scheduler could be reached there: {in_short(error)}") from None
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise UsageError(f"{address}: this Dask cluster has no workers")
        yield client.get_executor(pure=False)
