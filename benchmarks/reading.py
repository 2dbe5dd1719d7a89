"""What a quantised weight costs to read, against one in bfloat16: from the file, in the page cache, to float32.

Blocks are random bytes, and so may be their scales: the time does not depend on them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.options import Options, Row
from benchmarks.plots import bars
from spectra.files.checkpoint import open_checkpoint
from spectra.files.gguf.headers import LAYOUTS
from spectra.files.stored.quantised.ggml import READ

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Reading quantised weights"
NAME = "model.layers.0.self_attn.v_proj.weight"  # whose rows no converter reorders
GGUF_NAME = "blk.0.attn_v.weight"
PLAIN = "bfloat16"


def run(options: Options) -> Iterator[Row]:
    n = (options.sizes or (options.scale(quick=512, default=4096),))[0]
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        folder = Path(home)
        readers: dict[str, Callable[[], torch.Tensor]] = {PLAIN: _reader(_bfloat16(folder / "bf16", n))}
        readers |= {f"MLX, {bits} bits": _reader(_mlx(folder / f"mlx{bits}", n, bits)) for bits in (8, 6, 4, 3, 2)}
        readers |= {f"GGUF {kind}": _reader(_gguf(folder / f"{kind}.gguf", n, kind)) for kind in sorted(READ)}
        best: dict[str, float] = {}
        for _ in range(options.repeat):  # in turn, so that what disturbs the machine meets all of them
            for what, read in readers.items():
                started = time.perf_counter()
                shape = tuple(read().shape)
                seconds = time.perf_counter() - started
                assert shape == (n, n)
                best[what] = min(best.get(what, np.inf), seconds)
        for what, seconds in best.items():
            ratio = seconds / best[PLAIN]
            bar = _bar(what)
            yield {
                "stored as": what, "shape": f"{n}×{n}", "seconds": seconds, "× bfloat16": ratio, "at most": bar,
                "met": "" if bar is None else "yes" if ratio <= bar else "no",
            }  # fmt: skip


def _bar(what: str) -> float | None:
    if what == PLAIN:
        return None
    if "IQ" in what or "TQ" in what:
        return 15
    return 2 if what in ("GGUF Q8_0", "MLX, 8 bits") else 5


def _reader(path: Path) -> Callable[[], torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return lambda: checkpoint.load(NAME).float()


def _bfloat16(folder: Path, n: int) -> Path:
    folder.mkdir()
    values = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    save_file({NAME: values.bfloat16()}, folder / "model.safetensors")
    return folder


def _mlx(folder: Path, n: int, bits: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (n, n * bits // 32), generator=generator).to(torch.int32).view(torch.uint32)
    module = NAME.removesuffix(".weight")
    scales = torch.rand(n, n // 64, generator=generator).half()
    tensors = {NAME: words, f"{module}.scales": scales, f"{module}.biases": scales.clone()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"quantization": {{"group_size": 64, "bits": {bits}}}}}')
    return folder


def _gguf(file: Path, n: int, kind: str) -> Path:
    import gguf

    values, width = LAYOUTS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, size=(n, n // values * width), dtype=np.uint8)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor(GGUF_NAME, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def notes(rows: list[Row]) -> list[str]:
    missed = [f"{row['stored as']} ({row['× bfloat16']:.1f})" for row in rows if row["met"] == "no"]
    return [
        "At most 2 times bfloat16 is asked of 8 bits, 5 of K-quants and fewer bits, 15 of the IQ and TQ types; missed "
        f"by {', '.join(missed) if missed else 'none'}."
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    bars(axes, [row["stored as"] for row in rows], [row["× bfloat16"] for row in rows], "{:.2g}×")
    axes.set_xlabel("time to read a weight, in times of bfloat16")
