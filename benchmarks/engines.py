"""Seconds for one layer's verdict: peft's own detection against each engine, on the same inputs.

    python benchmarks/engines.py [SIZE ...] [--rank R] [--repeat N]     # default: 1024 2048, rank 16

``peft.tuners.lora.intruders.reduce_intruder_dimension`` detects and repairs; its time here is that of
the two full decompositions it makes.  Bases have a trained-like spectrum (outliers on a falling bulk),
float32.  Ratios are taken within one run; counts of intruders are compared.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import spectra


def problem(n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W0, B, A) of size n × n."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    U, V = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(n, n)).Q
    s = torch.linspace(1, 0.05, n) ** 1.5
    s[:8] += torch.linspace(4, 0.5, 8)
    return U * s @ V.T, 3 * normal(n, rank) / n**0.5, normal(rank, n) / n**0.5


def with_peft(W0: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> Callable[[], int]:
    """peft's function on a model of this one layer; returns its number of intruders."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(W0.shape[1], W0.shape[0], bias=False)

    net = Net()
    net.q.weight.data = W0.clone()
    model = get_peft_model(net, LoraConfig(r=B.shape[1], lora_alpha=B.shape[1], target_modules=["q"]))
    layer: Any = model.base_model.model.q
    layer.lora_B["default"].weight.data = B.clone()
    layer.lora_A["default"].weight.data = A.clone()

    def run() -> int:
        said: list[str] = []
        reduce_intruder_dimension(model, logging_sink=said.append)
        model.delete_adapter("intruder_reduced")
        model.set_adapter("default")
        found = re.search(r"Intruders: (\d+)", " ".join(said))
        return int(found[1]) if found else 0

    return run


def with_engine(engine: str, W0: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> Callable[[], int]:
    return lambda: len(spectra.find_intruders(W0, B=B, A=A, engine=engine).intruders)


def timed(run: Callable[[], int], repeat: int) -> tuple[float, int]:
    """Median seconds and the answer, after one run that is not counted."""
    answer, seconds = run(), []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, float32, rank {options.rank}, median of {options.repeat}")
    print(f"{'size':>6}  {'method':<8}{'seconds':>9}{'ratio':>8}{'intruders':>11}")
    for n in options.sizes:
        W0, B, A = problem(n, options.rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = {"peft": with_peft(W0, B, A)}
        runs |= {engine: with_engine(engine, W0, B, A) for engine in ("exact", "krylov")}
        incumbent = 0.0
        for method, run in runs.items():
            seconds, answer = timed(run, options.repeat)
            incumbent = incumbent or seconds
            print(f"{n:>6}  {method:<8}{seconds:>9.2f}{incumbent / seconds:>7.1f}x{answer:>11}", flush=True)


if __name__ == "__main__":
    main()
