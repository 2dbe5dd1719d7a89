"""Many random cases of one test, which is one test all the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def each_seed(seeds: Iterable[int]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test's body once for each seed, each time in a folder of its own; a failure names its seed."""
    cases = tuple(seeds)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**given: Any) -> None:
            folder = given.get("tmp_path")
            for seed in cases:
                if folder is not None:
                    given["tmp_path"] = folder / f"seed-{seed}"
                    given["tmp_path"].mkdir()
                try:
                    test(seed=seed, **given)
                except Exception as error:
                    error.add_note(f"with seed {seed} of {len(cases)}")
                    raise

        # What pytest looks at for fixtures: all but the seed.
        parameters = [item for item in signature.parameters.values() if item.name != "seed"]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate
