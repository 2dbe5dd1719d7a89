"""How a run is done: the options of the verbs, checked once, and what the report records of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from spectra.analysis.layer import DTYPES, check_device, checked_question
from spectra.errors import UsageError
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
    verify: bool
    split_fused: bool = False  # recorded where it is asked for
    access: Access = ANYWHERE  # no part of the record: it changes no result
    initial_adapter: Source | None = None  # nor is this: the layers' notes say where it was used

    def record(self) -> dict[str, Any]:
        record = {**asdict(self.question), **{f.name: getattr(self, f.name) for f in fields(self)}}
        if not self.split_fused:
            del record["split_fused"]
        del record["question"], record["access"], record["initial_adapter"]
        return {key: list(item) if isinstance(item, tuple) else item for key, item in record.items()}


def checked_settings(
    *, top_k: int = 10, epsilon: float = 0.5, side: str = "left", include: Iterable[str] = (),
    exclude: Iterable[str] = (), engine: str = "auto", dtype: str = "float32", device: str = "cpu",
    workers: int = 1, threads: int | None = None, verify: bool = False, split_fused: bool = False,
    allow_pickle: bool = False, local_files_only: bool = False, initial_adapter: Source | None = None,
) -> Settings:  # fmt: skip
    """The options of :func:`spectra.audit_many`, checked; raises UsageError."""
    choose_engine(engine)
    if dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r}; expected float32 or float64")
    check_device(device)
    if workers < 1 or (threads is not None and threads < 1):
        raise UsageError("workers and threads are at least 1")
    return Settings(
        question=checked_question(top_k, epsilon, side),
        engine=engine,
        dtype=dtype,
        device=device,
        threads=threads or max(1, torch.get_num_threads() // workers),
        workers=workers,
        include=tuple(include),
        exclude=tuple(exclude),
        verify=verify,
        split_fused=split_fused,
        access=Access(allow_pickle, local_files_only),
        initial_adapter=initial_adapter,
    )
