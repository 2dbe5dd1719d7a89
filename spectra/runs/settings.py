"""How a run is done: the options of a verb, checked, and what the report records of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from spectra.analysis.layer import DTYPES, check_device, checked_question
from spectra.errors import UsageError
from spectra.runs.options import AuditOptions, defaults_of, patterns_of
from spectra.sources.live import Source
from spectra.sources.resolve import ANYWHERE, Access
from spectra.svd import choose_engine
from spectra.svd.engine import Question


@dataclass(frozen=True)
class Settings:
    """How to analyse; what the report records under ``settings``."""

    question: Question
    engine: str
    dtype: str
    device: str
    threads: int
    workers: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    hash_contents: bool
    split_fused: bool = False  # recorded where it is asked for
    ignore_options: tuple[str, ...] = ()  # likewise
    access: Access = ANYWHERE  # no part of the record: it changes no result
    initial_adapter: Source | None = None  # nor is this: the layers' notes say where it was used

    def record(self) -> dict[str, Any]:
        record = {**asdict(self.question), **{f.name: getattr(self, f.name) for f in fields(self)}}
        for name in ("split_fused", "ignore_options"):
            if not record[name]:
                del record[name]
        del record["question"], record["access"], record["initial_adapter"]
        return {key: list(item) if isinstance(item, tuple) else item for key, item in record.items()}


def checked_settings(**given: Any) -> Settings:
    """The settings among the options of a verb, checked; those that are not given are as by default.

    Raises
    ------
    UsageError : an option of another type or value than it can have; it is named, with what was expected.
    """
    options = {**defaults_of(AuditOptions), **given}
    _expect(options, ("workers",), int, "a whole number, at least 1")
    _expect(options, ("side", "engine", "dtype", "device"), str, "a string")
    _expect(options, ("hash_contents", "split_fused", "allow_pickle", "local_files_only"), bool, "True or False")
    if options["threads"] is not None:
        _expect(options, ("threads",), int, "a whole number, at least 1, or None")
    workers, threads = options["workers"], options["threads"]
    choose_engine(options["engine"])
    if options["dtype"] not in DTYPES:
        raise UsageError(f"dtype = {options['dtype']!r}; expected float32 or float64")
    check_device(options["device"])
    if workers < 1 or (threads is not None and threads < 1):
        raise UsageError("workers and threads are at least 1")
    return Settings(
        question=checked_question(options["top_k"], options["epsilon"], options["side"]),
        engine=options["engine"],
        dtype=options["dtype"],
        device=options["device"],
        threads=threads or max(1, torch.get_num_threads() // workers),
        workers=workers,
        include=patterns_of("include", options["include"]),
        exclude=patterns_of("exclude", options["exclude"]),
        hash_contents=options["hash_contents"],
        split_fused=options["split_fused"],
        ignore_options=patterns_of("ignore_options", options["ignore_options"]),
        access=Access(options["allow_pickle"], options["local_files_only"]),
        initial_adapter=options["initial_adapter"],
    )


def _expect(options: Mapping[str, Any], names: Iterable[str], kind: type, words: str) -> None:
    for name in names:
        value = options[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{name} = {value!r:.80}; expected {words}")
